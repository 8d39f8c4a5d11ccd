# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of a TD is moved: what the guest accepted it keeps, with what lies in it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounts import Mounted, Mounter
from torture import Console

from hwemu.encryptedaccess import Encrypt, Outcome
from hwemu.tdx.entry import SeptState
from kvmsim.confidential.platform import Platform
from kvmsim.confidential.tdx import TdxGuard
from kvmsim.emulator import Emulator, MemoryBackend, VmConfig
from kvmsim.fallocate import punch
from kvmsim.hostmem import HostMemory
from kvmsim.vmm.bootparams import Technology
from privfs import control

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

MIB, PAGE = 1 << 20, 4096
RAM, AT = 16 << 20, 12 << 20
WORD = 0x1122_3344_5566_7788
SUM = WORD * 512 % (1 << 64)


class Guest:
    """A TD, its file and its console."""

    def __init__(
        self, emulator: Emulator, console: Console, ram: Path, close: Callable[[], None]
    ) -> None:
        self.emulator, self.console, self.ram, self.close = emulator, console, ram, close

    @property
    def guard(self) -> TdxGuard:
        assert isinstance(self.emulator.guard, TdxGuard)
        return self.emulator.guard

    def ask(self, line: str) -> str:
        self.emulator.feed(line.encode() + b"\n")
        return self.console.expect(r"(ok|error|panic).*\n").group(0).strip()

    def number(self, line: str, name: str) -> int:
        answer = self.ask(line)
        found = re.search(rf" {name}=(\S+)", answer)
        assert answer.startswith("ok"), answer
        assert found, answer
        return int(found[1], 0)

    def entry(self, gpa: int) -> tuple[SeptState, int]:
        """State and hpa in the Secure EPT's entry for ``gpa``."""
        with self.emulator.running.lock:
            found = self.guard.td.tree.columns(gpa // PAGE, 1)
        return SeptState(int(found.state[0])), int(found.hpa[0])

    def pages(self) -> int:
        count: int = self.guard.describe()["pamt_pages"]["REG"]
        return count

    def compact(self) -> int:
        moved: int = control.compact(self.ram, 0, 1 << 32, lambda progress: None)["bytes"]
        return moved


Boot = Callable[..., Guest]


@pytest.fixture
def moving() -> Iterator[HostMemory]:
    made = HostMemory(movable=True)
    yield made
    made.close()


@pytest.fixture
def mounted(mount: Mounter) -> Mounted:
    return mount()


@pytest.fixture
def boot(mounted: Mounted, image: bytes) -> Iterator[Boot]:
    with contextlib.ExitStack() as stack:

        def start(
            host: HostMemory,
            encrypt: Encrypt | None = Encrypt.VIEW,
            size: int = RAM,
        ) -> Guest:
            ram = mounted.path / "ram"
            ram.touch()
            os.truncate(ram, size)
            memory = MemoryBackend(str(ram), size=RAM, prealloc=True)
            config = VmConfig((memory,), 2, technology=Technology.TDX, encrypt=encrypt)
            console = Console()
            emulator = Emulator(host, config, console.output, platform=Platform(host))
            closing = stack.enter_context(contextlib.ExitStack())
            closing.callback(emulator.close)
            console.emulator = emulator
            emulator.boot(image)
            console.expect(r"^> ")
            guest = Guest(emulator, console, ram, closing.close)
            assert guest.ask(f"fill {AT:#x} 4 {WORD:#x}").startswith("ok")
            return guest

        yield start


@pytest.mark.parametrize("encrypt", [Encrypt.VIEW, None])
def test_what_was_accepted_stays_accepted(
    moving: HostMemory, boot: Boot, mounted: Mounted, encrypt: Encrypt | None
) -> None:
    guest = boot(moving, encrypt)
    state, before = guest.entry(AT)
    pages, placed = guest.pages(), moving.arena.statistics().placed_bytes
    assert state is SeptState.MAPPED
    assert guest.compact() > RAM // 2
    assert guest.number(f"sum {AT:#x} 4", "sum") == SUM * 4 % (1 << 64)
    state, after = guest.entry(AT)
    assert state is SeptState.MAPPED
    assert after != before
    with guest.emulator.running.lock:
        assert guest.emulator.running.stage2.walk(AT).hpa == after
    assert guest.pages() == pages
    assert moving.arena.statistics().placed_bytes == placed, "nothing keeps the old addresses"
    assert guest.ask(f"poke {AT:#x} 7").startswith("ok")
    assert guest.number(f"peek {AT:#x}", "value") == 7
    mounted.audit()
    guest.close()
    assert not any(guest.guard.residue().values())


def test_a_td_at_work_loses_no_store(moving: HostMemory, boot: Boot, mounted: Mounted) -> None:
    """``test``: both vCPUs write what the other checks."""
    guest = boot(moving)
    for _ in range(2):
        guest.emulator.feed(b"test 0x800000 64\n")
        for _ in range(3):
            assert guest.compact() > RAM // 2
        answer = guest.console.expect(r"(ok|error|panic).*\n").group(0)
        assert answer.startswith("ok test"), answer
    assert guest.number(f"sum {AT:#x} 4", "sum") == SUM * 4 % (1 << 64)
    status = mounted.ask("status")
    assert (status["kills"], status["failures"], status["moves"]) == (0, 0, 6)
    assert guest.emulator.running.statistics.pages_moved > 0
    mounted.audit()


def test_a_punch_before_it_arrives(moving: HostMemory, boot: Boot, mounted: Mounted) -> None:
    """Moved twice meanwhile; what is punched is lost, its neighbours are not."""
    guest = boot(moving)
    pages = guest.pages()
    guest.compact()
    guest.compact()
    with guest.ram.open("r+b") as file:
        punch(file.fileno(), AT + PAGE, PAGE)
    assert guest.pages() == pages - 1
    assert guest.number(f"sum {AT:#x} 1", "sum") == SUM
    assert guest.number(f"accept {AT + PAGE:#x} 1", "lost") == 1
    assert guest.number(f"peek {AT + PAGE:#x}", "value") == 0
    assert guest.number(f"sum {AT + 2 * PAGE:#x} 2", "sum") == SUM * 2 % (1 << 64)
    mounted.audit()


def test_it_ends_before_they_arrive(moving: HostMemory, boot: Boot, mounted: Mounted) -> None:
    guest = boot(moving)
    guest.compact()
    guest.close()
    assert not any(guest.guard.residue().values())
    mounted.audit()


def test_a_move_heals_no_poison(moving: HostMemory, boot: Boot) -> None:
    guest = boot(moving)
    assert guest.emulator.host_write(AT, b"x").outcome is Outcome.POISONS
    guest.compact()
    assert guest.number(f"peek {AT + PAGE:#x}", "value") == WORD
    guest.emulator.feed(f"peek {AT:#x}\n".encode())
    outcome = guest.emulator.wait(30)
    assert outcome is not None
    assert "133: machine check: the host has written" in outcome.message


def test_ciphertext_in_the_file_stays_where_it_is(moving: HostMemory, boot: Boot) -> None:
    guest = boot(moving, Encrypt.BACKING)
    with pytest.raises(control.ControlError, match="UNMOVABLE") as refused:
        guest.compact()
    assert refused.value.errno == errno.EOPNOTSUPP


def test_so_does_a_file_whose_extents_are_large(moving: HostMemory, boot: Boot) -> None:
    guest = boot(moving, size=(4 << 30) + PAGE)
    with pytest.raises(control.ControlError, match="UNMOVABLE"):
        guest.compact()


def test_kvm_asks_that_nothing_moves(host: HostMemory, boot: Boot) -> None:
    guest = boot(host)
    with pytest.raises(control.ControlError, match="UNMOVABLE"):
        guest.compact()
    assert guest.number(f"sum {AT:#x} 4", "sum") == SUM * 4 % (1 << 64)
