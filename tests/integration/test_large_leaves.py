# SPDX-License-Identifier: GPL-2.0-or-later
"""Large leaves under a guest at work: made where memory lies together, gone whole with any page."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torture
from mounts import Mounted

from hwemu.stage2 import WalkError
from kvmsim.hostmem import HostMemory
from kvmsim.uapi import PAGE_SIZE
from kvmsim.vmm.loader import LOW_SIZE

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

RAM = 16 << 20
BLOCK = 2 << 20
GPA = 10 << 20  # behind the kernel; the file begins at LOW_SIZE
OFFSET = GPA - LOW_SIZE
WORD = 0x1111
SUM = WORD * (BLOCK // 8)


class Guest:
    """A machine at its prompt, and how its private memory is mapped."""

    def __init__(self, guest: torture.Guest) -> None:
        self.command = guest.console.command
        self.running = guest.emulator.running

    def level(self, gpa: int) -> int:
        """The level of the private leaf there; 0: none."""
        with self.running.lock:
            try:
                return self.running.stage2.walk(gpa).level
            except WalkError:
                return 0

    def ask(self, line: str, field: str) -> int:
        """A number out of the answer to a command."""
        answer = self.command(line)
        found = re.search(rf"{field}=(0x[0-9a-f]+|\d+)", answer)
        assert found is not None, answer
        return int(found[1], 0)

    def fill(self) -> None:
        self.command(f"fill {GPA:#x} 512 {WORD:#x}")

    def sum(self) -> int:
        return self.ask(f"sum {GPA:#x} 512", "sum")


Boot = Callable[[Path], Guest]


@pytest.fixture
def boot(host: HostMemory, image: bytes) -> Iterator[Boot]:
    made: list[torture.Guest] = []

    def start(path: Path) -> Guest:
        made.append(torture.boot(host, image, path))
        return Guest(made[-1])

    yield start
    for guest in made:
        guest.close()


def make(mounted: Mounted, *, allocated: bool) -> Path:
    path = mounted.path / "ram"
    path.touch()
    os.truncate(path, RAM)
    if allocated:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, RAM)
    return path


def punch(path: Path, offset: int, length: int) -> None:
    command = ["fallocate", "--punch-hole", f"--offset={offset}", f"--length={length}", path]
    subprocess.run(command, check=True, timeout=30)


def test_allocated_memory_is_mapped_by_large_leaves_and_a_punch_takes_one_whole(
    mount: Callable[..., Mounted], boot: Boot
) -> None:
    path = make(mount(), allocated=True)
    guest = boot(path)
    guest.fill()
    assert guest.sum() == SUM
    assert (guest.level(GPA), guest.level(GPA + BLOCK - 1)) == (2, 2)

    punch(path, OFFSET + 5 * PAGE_SIZE, PAGE_SIZE)
    assert guest.level(GPA) == 0
    assert guest.ask(f"peek {GPA:#x} private", "value") == WORD
    assert (guest.level(GPA), guest.level(GPA + 5 * PAGE_SIZE)) == (1, 0), "a hole is in it"

    # the guest touches the hole: all lies together again, and the next fault maps it so
    assert guest.sum() == SUM - WORD * (PAGE_SIZE // 8), "one page is zeros, the others stay"
    assert (guest.level(GPA), guest.level(GPA + 5 * PAGE_SIZE)) == (2, 2)


def test_memory_that_is_allocated_page_by_page_is_mapped_so(
    mount: Callable[..., Mounted], boot: Boot
) -> None:
    mounted = mount()
    guest = boot(make(mounted, allocated=False))
    guest.ask(f"peek {GPA:#x} private", "value")
    assert guest.level(GPA) == 1
    assert guest.level(GPA + PAGE_SIZE) == 0
    assert mounted.stat("ram")["allocated"] < BLOCK


def test_a_store_of_large_pages_is_mapped_by_large_leaves(
    mount: Callable[..., Mounted], boot: Boot
) -> None:
    path = make(mount("pagesize=2M"), allocated=False)
    guest = boot(path)
    asked = guest.running.statistics.pages_asked
    guest.fill()
    assert guest.running.statistics.pages_asked - asked == 1
    assert guest.level(GPA) == 2
    assert guest.sum() == SUM
    punch(path, OFFSET, BLOCK)
    assert guest.level(GPA) == 0
    assert guest.sum() == 0


def test_a_page_that_is_converted_leaves_its_block_small(
    mount: Callable[..., Mounted], boot: Boot
) -> None:
    guest = boot(make(mount(), allocated=True))
    guest.fill()
    assert guest.level(GPA) == 2
    shared = GPA + 7 * PAGE_SIZE
    guest.command(f"convert {shared:#x} 1 shared")
    guest.command(f"poke {shared:#x} 0x5 shared")
    assert guest.ask(f"peek {GPA:#x} private", "value") == WORD
    assert (guest.level(GPA), guest.level(shared)) == (1, 0)
    guest.command(f"convert {shared:#x} 1 private")
    assert guest.sum() == SUM - WORD * (PAGE_SIZE // 8)
