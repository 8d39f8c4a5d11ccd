# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of protected VMs under pKVM is freed under them, and given back by them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounts import Mounted, Mounter
from torture import Console

from kvmsim.confidential.pkvm import PkvmGuard
from kvmsim.confidential.platform import Platform
from kvmsim.emulator import Emulator, MemoryBackend, VmConfig
from kvmsim.fallocate import punch
from kvmsim.hostmem import HostMemory
from kvmsim.vmm.bootparams import Technology

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

MIB, PAGE = 1 << 20, 4096
RAM, AT = 16 << 20, 12 << 20
WORD = 0x1122_3344_5566_7788
SUM = WORD * 512 % (1 << 64)


class Guest:
    """A protected VM, its file and its console."""

    def __init__(self, host: HostMemory, platform: Platform, ram: Path, image: bytes) -> None:
        ram.touch()
        os.truncate(ram, RAM)
        self.ram, self.console = ram, Console()
        config = VmConfig((MemoryBackend(str(ram)),), 2, ram.name, technology=Technology.PKVM)
        self.emulator = Emulator(host, config, self.console.output, platform=platform)
        self.console.emulator = self.emulator
        self.close = contextlib.ExitStack()
        self.close.callback(self.emulator.close)
        self.emulator.boot(image)
        self.console.expect(r"^> ")
        assert self.ask(f"fill {AT:#x} 4 {WORD:#x}").startswith("ok")

    @property
    def guard(self) -> PkvmGuard:
        assert isinstance(self.emulator.guard, PkvmGuard)
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

    def owned(self) -> int:
        count: int = self.guard.describe()["pages"].get("OWNED", 0)
        return count

    def punch(self, gpa: int, npages: int) -> None:
        with self.ram.open("r+b") as file:
            punch(file.fileno(), gpa, npages * PAGE)


Boot = Callable[[str], Guest]


@pytest.fixture
def mounted(mount: Mounter) -> Mounted:
    return mount()


@pytest.fixture
def boot(mounted: Mounted, host: HostMemory, image: bytes) -> Iterator[Boot]:
    platform = Platform(host)
    with contextlib.ExitStack() as stack:

        def start(name: str) -> Guest:
            guest = Guest(host, platform, mounted.path / name, image)
            stack.callback(guest.close.close)
            return guest

        yield start


@pytest.mark.logs("ram: dead")
@pytest.mark.parametrize("how", ["punch", "shrink", "a shared page", "at work"])
def test_a_guest_dies_of_a_page_that_is_freed_under_it(
    boot: Boot, mounted: Mounted, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    guest, other = boot("ram"), boot("other") if how == "punch" else None
    if how == "a shared page":
        assert guest.ask(f"convert {AT:#x} 4 shared").startswith("ok")
    elif how == "at work":
        guest.emulator.feed(f"spin 1 {AT:#x} 4\nspin 0 {AT:#x} 4\n".encode())
        guest.console.expect("ok spin vcpu=0")
    owned = guest.owned()
    if how == "shrink":
        os.truncate(guest.ram, AT)
    else:
        guest.punch(AT, 2)
    outcome = guest.emulator.wait(30)
    assert outcome is not None
    assert f"dead: gpa {AT:#x}+" in outcome.message
    assert "it must be dying" in outcome.message
    assert [record.getMessage() for record in caplog.records] == [f"ram: {outcome.message}"]
    if how in ("punch", "at work"):
        assert guest.owned() == owned - 2
    guest.punch(AT + PAGE, 3)  # once it is dead that is all the same
    if other is not None:
        assert other.number(f"sum {AT:#x} 4", "sum") == SUM * 4 % (1 << 64)
        other.close.close()
    assert mounted.ask("status")["kills"] == 0
    mounted.audit()
    guest.close.close()
    assert not any(guest.guard.residue().values())


def test_what_it_has_relinquished_may_be_freed(boot: Boot, mounted: Mounted) -> None:
    guest = boot("ram")
    owned = guest.owned()
    assert guest.ask(f"relinquish {AT + PAGE:#x} 2").startswith("ok")
    assert guest.owned() == owned - 2
    assert guest.number(f"peek {AT + PAGE:#x}", "value") == 0, "wiped, and donated anew"
    assert guest.ask(f"relinquish {AT + PAGE:#x} 2").startswith("ok")
    guest.punch(AT + PAGE, 2)
    assert guest.number(f"peek {AT + 2 * PAGE:#x}", "value") == 0
    assert guest.number(f"sum {AT:#x} 4", "sum") == SUM * 2 % (1 << 64)
    assert "error relinquish" in guest.ask(f"relinquish {AT + 1:#x} 1")
    mounted.audit()
    guest.close.close()
    assert not any(guest.guard.residue().values())
