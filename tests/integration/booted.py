# SPDX-License-Identifier: GPL-2.0-or-later
"""Confidential guests at their prompt, each on a file of a mount, with something in its memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from torture import Console

from kvmsim.confidential.base import Confidential
from kvmsim.confidential.hostview import hpa_of
from kvmsim.confidential.platform import Platform
from kvmsim.emulator import Emulator
from kvmsim.fallocate import punch
from privfs import control

MIB, PAGE = 1 << 20, 4096
#: The guest's memory; where there are four pages of words, and what these add up to, each.
RAM, AT = 16 * MIB, 12 * MIB
WORD = 0x1122_3344_5566_7788
SUM = WORD * 512 % (1 << 64)
PAGES = 4


class Prompt:
    """A booted guest and its console."""

    def __init__(self, emulator: Emulator, console: Console) -> None:
        self.emulator, self.console = emulator, console

    def ask(self, line: str) -> str:
        """The answer to a command, good or bad."""
        self.emulator.feed(line.encode() + b"\n")
        return self.console.expect(r"(ok|error|panic).*\n").group(0).strip()

    def number(self, line: str, name: str) -> int:
        """A field of an answer that must be good."""
        answer = self.ask(line)
        found = re.search(rf" {name}=(\S+)", answer)
        assert answer.startswith("ok"), answer
        assert found, answer
        return int(found[1], 0)


class Guest(Prompt):
    """A booted guest, its file and its console."""

    def __init__(
        self,
        emulator: Emulator,
        console: Console,
        ram: Path,
        platform: Platform,
        close: Callable[[], None],
    ) -> None:
        super().__init__(emulator, console)
        self.ram, self.platform, self.close = ram, platform, close

    @property
    def guard(self) -> Confidential:
        assert self.emulator.guard is not None
        return self.emulator.guard

    def whole(self, gpa: int = AT, npages: int = PAGES) -> bool:
        """Whether the words are there."""
        return self.number(f"sum {gpa:#x} {npages}", "sum") == SUM * npages % (1 << 64)

    def entry(self, gpa: int) -> tuple[bool, int]:
        """Whether the hardware's table lets the guest use a page, and the hpa that it has there."""
        running = self.emulator.running
        with running.lock:
            tables = self.guard.tables()
            tables.prepare()
            leaf = running.stage2.columns(running.vm.kind.half(private=True) | gpa, 1)
            found = tables.entries(gpa // PAGE, leaf)
        return int(found.state[0]) in tables.words.mapped, int(found.hpa[0])

    def hpa(self, gpa: int) -> int:
        """Where its file has the page."""
        with self.emulator.running.lock:
            return hpa_of(self.emulator.running, gpa)

    def in_file(self, gpa: int, size: int = PAGE) -> bytes:
        """What lies in the file, whoever may see it."""
        with self.platform.lock:
            return self.platform.memory.read(self.hpa(gpa), size)

    def punch(self, gpa: int, npages: int) -> None:
        """Free pages of its file under it."""
        with self.ram.open("r+b") as file:
            punch(file.fileno(), gpa, npages * PAGE)

    def compact(self) -> int:
        """Move all of its file; how many bytes that were."""
        moved: int = control.compact(self.ram, 0, 1 << 32, lambda progress: None)["bytes"]
        return moved


Boot = Callable[..., Guest]
