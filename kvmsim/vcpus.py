# SPDX-License-Identifier: GPL-2.0-or-later
"""The vCPUs of a running VM as its runner keeps them, and who is asked about them."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from hwemu.cpu import api as cpu_api
from kvmsim import exits
from kvmsim.effect import Effect
from kvmsim.fault import Fault
from kvmsim.guard import Verdict


class State(enum.Enum):
    """Whether a vCPU may be taken."""

    RUNNABLE = "runnable"
    WAITS = "waits for a page"
    HALTED = "halted"
    IDLE = "not started"


Handler = Callable[[int, exits.Exit], bool]


class Supervisor(Protocol):
    """What else the owner of a VM may want to decide, in the runner thread."""

    def enter(self, index: int) -> bool:
        """A vCPU is about to run guest code; False if it was halted instead."""

    def msr(self, index: int, access: cpu_api.MsrExit) -> int | None:
        """Return what a register that the engine does not keep holds (0 for a write); None: #GP."""

    def ended(self, why: str) -> None:
        """Learn that no vCPU will run any more."""


@dataclass(slots=True)
class Vcpu:
    """One vCPU: its engine and where it stands."""

    index: int
    cpu: cpu_api.Cpu
    state: State = State.IDLE
    exit: exits.Exit | None = None  #: decided while it waited; handled when it is taken
    stopped_at: tuple[Fault, Effect] | None = None
    verdict: Verdict | None = None  #: what the processor said to the fault that it stopped at
    left_by_guard: bool = False  #: its last exit is completed by the guard
    again: bool = False  #: the next request asks for the extent's memfd too
    awaited: Fault | None = None  #: the fault whose page makes it runnable again
    interrupted: bool = False  #: leaves at its next turn, whatever it waits for
    settling: bool = False  #: leaves with InterruptedExit behind the instruction it is in
    polled: bool = False  #: ends its slices even when no other is runnable
    faults: int = 0
    zapped: deque[tuple[int, int]] = field(default_factory=deque)  #: since its last flush


@dataclass(slots=True)
class RunnerStatistics:
    """Counts of one VM's runner."""

    slices: int = 0
    flushes: int = 0
    pages_asked: int = 0
    pages_moved: int = 0  #: that the owner had moved, and that came back elsewhere
    shootdowns: int = 0
