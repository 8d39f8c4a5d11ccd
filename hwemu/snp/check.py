# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules as rows: what must hold, what is answered if it does not, and where that is written.

A table of checks is asked from the top; the first row that does not hold answers.  Whoever asks
does so before changing anything, so what is refused leaves no trace.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

C = TypeVar("C")


class Fault(enum.Enum):
    """Answers that are not a status in a register."""

    PF = "#PF, RMP"
    NPF = "#NPF, RMP"
    NPF_SIZEM = "#NPF, RMP and SIZEM"
    NPF_VMPL = "#NPF, RMP and VMPL"
    VC = "#VC 0x404"
    GP = "#GP(0)"


@dataclass(frozen=True, slots=True)
class Check(Generic[C]):
    """One row; ``holds`` may rely on all rows above it."""

    must: str
    answer: enum.IntEnum | Fault
    holds: Callable[[C], bool]
    source: str

    @property
    def status(self) -> int:
        """The number that is answered; for tables without faults."""
        assert not isinstance(self.answer, Fault), self
        return int(self.answer)


def failing(checks: Sequence[Check[C]], case: C) -> Check[C] | None:
    """Return the first row that does not hold, or None."""
    for check in checks:
        if not check.holds(case):
            return check
    return None
