# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM as someone at its console sees it: input that may end, and how the VM ended.

``End`` tells apart what an exit code must tell apart; :class:`~kvmsim.emulator.Outcome` has only
the guest's status.
"""

from __future__ import annotations

import enum
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvmsim.confidential.platform import Platform
from kvmsim.emulator import Emulator, MemoryBackend, Outcome, VmConfig
from kvmsim.exits import Exit, IoExit
from kvmsim.hostmem import HostMemory
from kvmsim.running import RunningVm
from kvmsim.vmm.bounce import Disk
from kvmsim.vmm.prealloc import Progress


class End(enum.Enum):
    """How a VM ended."""

    GUEST = "guest"  #: the guest wrote its exit port
    IDLE = "idle"  #: console input has ended and every vCPU waits for more
    CRASHED = "crashed"  #: triple fault, or an exit that nothing can be done about
    OWNER_LOST = "owner_lost"  #: the process that serves its private memory is gone
    STOPPED = "stopped"  #: from outside
    FAILED = "failed"  #: the emulator itself


#: How the runner begins the reasons of its own.
_REASONS: Final = {"machine check:": End.OWNER_LOST, "internal error:": End.FAILED}
_PROMPTS: Final = re.compile(r"^(?:> )+")


class Lines:
    """Console output cut into lines; the guest's prompt is no part of a line."""

    def __init__(self) -> None:
        self._part = b""

    def feed(self, data: bytes) -> list[str]:
        """Take output; return the lines that it completes."""
        *lines, self._part = (self._part + data).split(b"\n")
        return [_PROMPTS.sub("", line.decode("utf-8", "replace").rstrip("\r")) for line in lines]


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a VM; ``status`` is the guest's if ``end`` is GUEST, else 0 or 1."""

    end: End
    status: int
    message: str


class ConsoleVm(Emulator):
    """An emulator that knows the end of its input and how it ended.

    ``on_output(bytes)`` is called in the runner thread; ``on_end()`` once, in a thread of its own,
    when no vCPU will ever run again.
    """

    def __init__(
        self,
        host: HostMemory,
        config: VmConfig,
        on_output: Callable[[bytes], None],
        on_end: Callable[[], None],
        *,
        running: type[RunningVm] = RunningVm,
        platform: Platform | None = None,
        disk: Disk | None = None,
        on_prealloc: Callable[[MemoryBackend, Progress], None] = lambda backend, progress: None,
    ) -> None:
        super().__init__(
            host, config, on_output, running=running, platform=platform, disk=disk,
            on_prealloc=on_prealloc,
        )  # fmt: skip
        self._on_end = on_end
        self._input_ended = False
        self._end: End | None = None
        self._watcher: threading.Thread | None = None

    def boot(self, image: bytes) -> None:
        """Load a guest kernel and start all vCPUs; ImageError if it cannot be loaded."""
        super().boot(image)
        self._watcher = threading.Thread(target=self._watch, name=f"end of {self.config.label}")
        self._watcher.start()

    def end_input(self) -> None:
        """No more input will come: end the VM when all it does is to wait for some."""

        def ended() -> None:
            self._input_ended = True
            if self._idle():
                self.stop(self.outcome.message if self.outcome else "")

        self.running.post(ended)

    def ending(self, timeout: float | None = None) -> Ending | None:
        """Wait for the end; None after ``timeout`` seconds."""
        outcome = self.wait(timeout)
        if outcome is None:
            return None
        return Ending(self._end or _end_of(outcome), outcome.status, outcome.message)

    def close(self) -> None:
        """Stop if need be, give back all memory, leave the owners."""
        super().close()
        if self._watcher is not None:
            self._watcher.join()

    def _watch(self) -> None:
        self.running.wait()
        self._on_end()

    def _handle(self, index: int, left: Exit) -> bool:
        goes_on = super()._handle(index, left)
        if not goes_on:
            self._end = End.GUEST if isinstance(left, IoExit) else End.CRASHED
        return goes_on and not self._idle()

    def _idle(self) -> bool:
        """Whether input has ended and every vCPU is halted; then that is the outcome."""
        if not self._input_ended:
            return False
        if not all(self.machine.is_halted(i) for i in range(self.config.vcpus)):
            return False
        self._end = End.IDLE
        self.outcome = Outcome(0, "console input has ended and every vCPU is halted")
        return True


def _end_of(outcome: Outcome) -> End:
    """How a VM ended that its VMM did not end."""
    for prefix, end in _REASONS.items():
        if outcome.message.startswith(prefix):
            return end
    return End.STOPPED
