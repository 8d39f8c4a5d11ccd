# SPDX-License-Identifier: GPL-2.0-or-later
"""Operations on a private file, as values: what is asked, in which steps it goes, what comes out.

:data:`STEPS` states the order of the contract once, *invalidate, prove, free, answer*, and
:data:`COMPATIBLE` which operations may overlap.  :class:`~privfs.memfile.MemFile` carries them out.

Units: pages of 4096 bytes in half-open ranges, except ``offset``, ``length`` and ``size`` (bytes).
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from privfs.personality import MAX_BYTES, PAGE_SIZE, Action

MAX_PAGES: Final = MAX_BYTES // PAGE_SIZE
OpId = Hashable


class Step(enum.Enum):
    """What the shell performs for an operation."""

    INVALIDATE = "invalidate"  #: every user proves that it cannot reach the range
    FREE = "free"
    ALLOCATE = "allocate"
    COPY = "copy"  #: what an extent holds, into a new one


class Kind(enum.Enum):
    """Kinds of operation."""

    ALLOCATE = "allocate"
    FAULT = "fault"
    PUNCH = "punch"
    ZERO = "zero"
    RESIZE = "resize"
    DESTROY = "destroy"
    MIGRATE = "migrate"


STEPS: Final[dict[Kind, tuple[Step, ...]]] = {
    Kind.ALLOCATE: (Step.ALLOCATE,),
    Kind.FAULT: (Step.ALLOCATE,),
    Kind.PUNCH: (Step.INVALIDATE, Step.FREE),
    Kind.ZERO: (Step.INVALIDATE, Step.FREE, Step.ALLOCATE),
    Kind.RESIZE: (Step.INVALIDATE, Step.FREE),
    Kind.DESTROY: (Step.INVALIDATE, Step.FREE),
    # migrate_pages(): unmap, copy, let the new page be found, free the old one.
    Kind.MIGRATE: (Step.INVALIDATE, Step.COPY, Step.FREE),
}

#: Kinds that may overlap each other in time; every other overlapping pair queues, and so do
#: any two operations that change the size.
COMPATIBLE: Final = frozenset({Kind.ALLOCATE, Kind.FAULT})

KINDS: Final = {
    Action.ALLOCATE: Kind.ALLOCATE,
    Action.PUNCH: Kind.PUNCH,
    Action.ZERO: Kind.ZERO,
}


class Fallocate(NamedTuple):
    """``fallocate(mode, offset, length)``; bytes."""

    mode: int
    offset: int
    length: int


class Resize(NamedTuple):
    """``ftruncate(size)``; bytes."""

    size: int


class FaultIn(NamedTuple):
    """A guest touched a hole: allocate exactly this page, or the huge page that it is part of."""

    page: int


class Destroy(NamedTuple):
    """The file goes: invalidate and free everything."""


class Migrate(NamedTuple):
    """Move what extent number ``extent`` holds into a new memfd; one that is empty ends."""

    extent: int


Request = Fallocate | Resize | FaultIn | Destroy | Migrate


class Perform(NamedTuple):
    """Effect: perform ``step`` on ``[start, end)`` and report :meth:`MemFile.step_done`.

    ``dead`` names the extents, as ``(index, instance)``, that FREE ends for good.
    """

    op: OpId
    step: Step
    kind: Kind
    start: int
    end: int
    dead: tuple[tuple[int, int], ...] = ()


class Done(NamedTuple):
    """Effect: answer the caller of ``op``; errno 0 is success."""

    op: OpId
    errno: int
    why: str = ""


class Moved(NamedTuple):
    """Effect: ``extent`` is instance ``new`` from now on; instance ``old`` is still to be freed."""

    op: OpId
    extent: int
    start: int
    end: int
    old: int
    new: int
    pages: int


class Settled(NamedTuple):
    """Effect: an operation has left; parked faults of this file may run again."""


Effect = Perform | Done | Moved | Settled


@dataclass(slots=True)
class Operation:
    """An operation that has begun.  ``left`` are its steps to come, the first one under way."""

    op: OpId
    kind: Kind
    start: int
    end: int
    size: int | None  #: bytes, set when the operation succeeds
    left: tuple[Step, ...]
    reserved: int
    answered: bool = False  #: the caller is gone: acks are collected, nothing is freed
    failed: int = 0  #: errno of an allocation that is being undone
    undo: deque[tuple[int, int]] = field(default_factory=deque)  #: ranges still to be undone
    old: int = 0  #: the instance that was moved away from

    def copy(self) -> Operation:
        """Return an independent copy."""
        return Operation(
            self.op, self.kind, self.start, self.end,
            self.size, self.left, self.reserved, self.answered, self.failed, self.undo.copy(),
            self.old,
        )  # fmt: skip

    def key(self) -> Hashable:
        """Return the state as a hashable value."""
        return (
            self.op, self.kind.value, self.start, self.end,
            self.size, len(self.left), self.answered, self.failed, tuple(self.undo),
            self.old,
        )  # fmt: skip


class Claim(NamedTuple):
    """The pages that an operation concerns."""

    kind: Kind
    start: int
    end: int
    sizes: bool = False  #: may change the size of the file, undo that, or allocate past the end

    def excludes(self, other: Claim) -> bool:
        """Say whether two operations must not run at the same time.

        Those at the end of the file never do, as behind ``inode_lock()``: the later one computes
        its size from the earlier one's, and a growth that is undone must know what it added.
        """
        if self.sizes and other.sizes:
            return True
        if self.kind in COMPATIBLE and other.kind in COMPATIBLE:
            return False
        return self.start < other.end and other.start < self.end
