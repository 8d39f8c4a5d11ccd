# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest to be attacked: the guest kernel, somebody at its console, its exits remembered."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

from hwemu.stage2 import Stage2Error
from kvmsim.attack.outcome import AttackError
from kvmsim.confidential.platform import Platform
from kvmsim.console import Lines
from kvmsim.emulator import Emulator, VmConfig
from kvmsim.exits import Exit, MemoryFaultExit
from kvmsim.hostmem import HostMemory
from kvmsim.vmm.bounce import Disk

#: A word that the guest keeps to itself, and one that the attacker would have it read.
SECRET: Final = 0x5EC2_E701_5EC2_E702
FORGED: Final = 0xF026_ED01_F026_ED02

_T = TypeVar("_T")
_SECONDS: Final = 60.0
_ANSWER: Final = re.compile(r"^(ok|error|panic:)")
_VALUE: Final = re.compile(r"value=(0x[0-9a-f]+)")


class Ended(Exception):
    """The guest has ended; ``str()`` says how."""


class LabGuest(Emulator):
    """A guest that is asked and answers."""

    def __init__(
        self,
        host: HostMemory,
        config: VmConfig,
        platform: Platform,
        *,
        disk: Disk | None = None,
    ) -> None:
        self.faults: list[MemoryFaultExit] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._cut = Lines()
        self._watcher: threading.Thread | None = None
        super().__init__(host, config, self._printed, platform=platform, disk=disk)

    def boot(self, image: bytes) -> None:
        """Boot, and wait until it prompts."""
        super().boot(image)
        self._watcher = threading.Thread(target=self._watch, name=f"end of {self.config.label}")
        self._watcher.start()
        self.ask("info")

    def ask(self, command: str) -> str:
        """Have a command done; its answer. Ended if the guest has none."""
        self.feed(command.encode() + b"\n")
        while True:
            try:
                line = self._lines.get(timeout=_SECONDS)
            except queue.Empty:
                raise AttackError(f"{self.config.label}: {command!r} is not answered") from None
            if line is None:
                self._lines.put(None)
                outcome = self.wait(0)
                raise Ended(outcome.message if outcome else "for no known reason")
            if _ANSWER.match(line):
                return line

    def must(self, command: str) -> str:
        """Have a command done that belongs to no attack; AttackError unless it is."""
        try:
            answer = self.ask(command)
        except Ended as ended:
            raise AttackError(f"{command!r}: the guest has ended: {ended}") from ended
        if not answer.startswith("ok"):
            raise AttackError(f"{command!r}: {answer}")
        return answer

    def poke(self, gpa: int, value: int) -> None:
        """Store a word in a private page."""
        self.must(f"poke {gpa:#x} {value:#x}")

    def peek(self, gpa: int, side: str = "private") -> int:
        """Load a word; AttackError if that fails."""
        return value_of(self.must(f"peek {gpa:#x} {side}"))

    def in_runner(self, work: Callable[[], _T]) -> _T:
        """Do something where the VMM does its work: no vCPU is in guest code."""
        done: Future[_T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        self.running.post(run)
        return done.result(_SECONDS)

    def half(self, *, private: bool = True) -> int:
        """What a gpa of that side has beside its gfn."""
        return self.running.vm.kind.half(private=private)

    def hpa(self, gpa: int) -> int:
        """Where the private page at ``gpa`` lies, as the second stage says."""
        try:
            return self.running.stage2.walk(gpa | self.half()).hpa
        except Stage2Error as error:
            raise AttackError(f"gpa {gpa:#x} is not mapped: {error}") from error

    def close(self) -> None:
        """End it and give everything back."""
        super().close()
        if self._watcher is not None:
            self._watcher.join()

    def _printed(self, data: bytes) -> None:
        for line in self._cut.feed(data):
            self._lines.put(line)

    def _watch(self) -> None:
        self.running.wait()
        self._lines.put(None)

    def _handle(self, index: int, left: Exit) -> bool:
        if isinstance(left, MemoryFaultExit):
            self.faults.append(left)
        return super()._handle(index, left)


def value_of(answer: str) -> int:
    """The word in an answer of ``peek``."""
    found = _VALUE.search(answer)
    if found is None:
        raise AttackError(f"no value in {answer!r}")
    return int(found[1], 16)
