# SPDX-License-Identifier: GPL-2.0-or-later
"""One private file as a value machine: its state with the operations in flight on it.

When the pages of a file change is decided here, on what a :class:`~privfs.filestate.FileState`
holds and what :mod:`privfs.claims` lets a request have; this module knows no I/O, no clock and no
user.  Requests go in (:meth:`MemFile.submit`), steps come out as values, and the completion of
each step comes back in (:meth:`MemFile.step_done`).  A rule that is broken raises
:class:`~privfs.personality.Refused` or answers :class:`Done` with an errno and changes nothing.

The order of a destructive operation is the contract of this project: *invalidate, prove, free,
answer*.  :data:`~privfs.operation.STEPS` states it; no other code decides it.  Compare
``kvm_gmem_punch_hole()`` in ``virt/kvm/guest_memfd.c``: begin, truncate, end under one lock.

Operations whose ranges overlap wait for each other in order of arrival (:data:`COMPATIBLE`), as
they do in the kernel behind ``inode->i_rwsem`` and ``filemap_invalidate_lock``; a fault that meets
a destructive operation, active or waiting, is parked by the caller until :class:`Settled`.

Units: pages of 4096 bytes in half-open ranges, except ``offset``, ``length`` and ``size`` (bytes).
"""

from __future__ import annotations

import enum
import errno
from collections import deque
from collections.abc import Hashable
from dataclasses import replace
from typing import Self

from privfs import seals
from privfs.budget import Budget
from privfs.claims import claim_of, new_size
from privfs.extents import SINGLE
from privfs.filestate import FileState, HostView
from privfs.operation import (
    COMPATIBLE,
    STEPS,
    Claim,
    Done,
    Effect,
    Kind,
    Moved,
    Operation,
    OpId,
    Perform,
    Request,
    Settled,
    Step,
)
from privfs.personality import PAGE_SIZE, Personality, Refused


class Look(enum.Enum):
    """What a fault finds."""

    PRESENT = "present"
    HOLE = "hole"
    PARK = "park"


class MemFile(FileState):
    """One private file with the operations that are active on it or wait for their turn."""

    __slots__ = ("_active", "_admitting", "_waiting")

    def __init__(self, personality: Personality, budget: Budget, quota: int = 0) -> None:
        super().__init__(personality, budget, quota)
        self._active: list[Operation] = []
        self._admitting = False
        self._waiting: list[tuple[OpId, Request]] = []

    # --- requests -----------------------------------------------------------------------------

    def submit(self, op: OpId, request: Request) -> list[Effect]:
        """Begin ``request``, or queue it behind overlapping ones; ``op`` names it from now on."""
        try:
            claim = claim_of(self, request)
        except Refused as refused:
            return [Done(op, refused.errno, str(refused))]
        if self._must_wait(claim, self._waiting):
            self._waiting.append((op, request))
            return []
        return self._begin(op, request, claim)

    def step_done(self, op: OpId, failed: int = 0, upto: int | None = None) -> list[Effect]:
        """Report the end of the step under way.

        ``failed`` is an errno.  An ALLOCATE that failed part-way names in ``upto`` the page it
        got to; what lies before stays allocated (I16: a retry is idempotent).
        """
        active = self._find(op)
        step = active.left[0]
        if step is Step.ALLOCATE and failed and active.size is not None:
            return self._undo(active, failed, upto)
        if step is Step.ALLOCATE:
            self._allocated(active, active.end if upto is None and not failed else upto)
        elif step is Step.FREE and not failed:
            self._freed(active)
        elif step is Step.COPY and not failed:
            return self._copied(active)
        if step is Step.INVALIDATE and active.answered:
            return self._leave(active, None)
        if failed:
            return self._leave(active, Done(op, failed, f"{step.value} failed"))
        if active.failed:
            return self._undo_next(active)
        active.left = active.left[1:]
        return self._advance(active)

    def abandon(self, op: OpId, code: int, why: str) -> list[Effect]:
        """Give up an invalidation without proof: the errno goes out, nothing is freed."""
        active = self._find(op)
        if active.left[0] is not Step.INVALIDATE:
            raise ValueError(f"operation {op!r} is past its invalidation: too late to abandon")
        return self._leave(active, None if active.answered else Done(op, code, why))

    def cancel(self, op: OpId, code: int) -> list[Effect]:
        """Answer the caller at once, if that is still safe.

        A queued operation is dropped; one that is invalidating goes on as *zap-only* and frees
        nothing; one that has begun to free, allocate or copy ends by itself.  An unknown op has
        ended.
        """
        for i, (queued, _) in enumerate(self._waiting):
            if queued == op:
                del self._waiting[i]
                return [Done(op, code, "cancelled while queued"), *self._admit(), Settled()]
        for active in self._active:
            if active.op == op and not active.answered and active.left[0] is Step.INVALIDATE:
                active.answered = True
                return [Done(op, code, "cancelled before anything was freed")]
        return []

    # --- faults -------------------------------------------------------------------------------

    def look(self, page: int) -> Look:
        """Say what a fault on ``page`` finds; raise ``ENOENT`` or ``EFBIG`` where none can be."""
        if self.dead:
            raise Refused(errno.ENOENT, f"fault on page {page:#x}: the file is gone")
        if self._destructive(page, page + 1):
            return Look.PARK
        if page * PAGE_SIZE >= self.size:
            raise Refused(
                errno.EFBIG, f"fault on page {page:#x}: beyond the end at {self.size} bytes"
            )
        if page in self.pages:
            return Look.PRESENT
        seals.check(self.seals, seals.Deed.FAULT_IN, f"fault on page {page:#x}")
        return Look.HOLE

    def window(self, page: int, start: int, end: int) -> tuple[int, int]:
        """Return the run of grantable pages around ``page`` inside ``[start, end)``.

        All of it is allocated, in the extent of ``page``, inside the file and untouched by any
        destructive operation.  ``page`` itself must be PRESENT.
        """
        layout = self.personality.layout
        low, high = layout.extent_range(layout.extent_of(page))
        low, high = max(low, start), min(high, end, self.size // PAGE_SIZE)
        for claim in self._claims():
            if claim.kind not in COMPATIBLE:
                if claim.end <= page:
                    low = max(low, claim.end)
                elif claim.start > page:
                    high = min(high, claim.start)
        if self.pages.range_cardinality(low, high) == high - low:
            return low, high
        first, last = page, page + 1
        while first > low and first - 1 in self.pages:
            first -= 1
        while last < high and last in self.pages:
            last += 1
        return first, last

    # --- the host -----------------------------------------------------------------------------

    def may_be_mapped(self) -> None:
        """Raise what :meth:`map_by_host` is refused with now: EOPNOTSUPP, EINVAL or EBUSY."""
        what = f"map a file of {self.size} bytes by the host"
        if not self.personality.mappable:
            raise Refused(errno.EOPNOTSUPP, f"{what}: not on files of {self.personality.name}")
        if not self.size:
            raise Refused(errno.EINVAL, f"{what}: give it its size first")
        if self.host is not None or self.instances or not self.idle:
            raise Refused(errno.EBUSY, f"{what}: it is in use, or may be mapped already")

    def map_by_host(self, *, shared: bool) -> None:
        """Let the host map the file from now on, with its pages or without any; Refused.

        With them it lies in one extent, which lives as long as the file: there an offset of the
        one is the same offset of the other.
        """
        self.may_be_mapped()
        self.host = HostView.PAGES if shared else HostView.NOTHING
        if shared:
            self.personality = replace(self.personality, layout=SINGLE)
            self.renew(0)

    # --- views --------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """True while no operation is active or queued."""
        return not self._active and not self._waiting

    @property
    def alone(self) -> bool:
        """True while no more than one operation is active."""
        return len(self._active) <= 1

    def operations(self) -> list[tuple[OpId, str, int, int]]:
        """List the active operations as (op, step, start, end)."""
        return [(a.op, a.left[0].value, a.start, a.end) for a in self._active]

    def key(self) -> Hashable:
        """Return the state as a hashable value."""
        operations = tuple([a.key() for a in self._active])
        return super().key(), operations, tuple(self._waiting)

    def copy(self, budget: Budget) -> Self:
        """Return an independent copy that draws on ``budget``."""
        twin = super().copy(budget)
        twin._active = [a.copy() for a in self._active]
        twin._admitting = False
        twin._waiting = self._waiting.copy()
        return twin

    # --- the machine --------------------------------------------------------------------------

    def _must_wait(self, claim: Claim, ahead: list[tuple[OpId, Request]]) -> bool:
        if not self._active and not ahead:
            return False
        return any(claim.excludes(other) for other in self._claims(ahead))

    def _claims(self, waiting: list[tuple[OpId, Request]] | None = None) -> list[Claim]:
        claims = [
            Claim(a.kind, a.start, a.undo[-1][1] if a.undo else a.end, self._sizes(a))
            for a in self._active
        ]
        for _, request in self._waiting if waiting is None else waiting:
            try:
                claims.append(claim_of(self, request))
            except Refused:
                continue  # will be answered with its errno when its turn comes
        return claims

    def _sizes(self, active: Operation) -> bool:
        beyond = active.kind is Kind.ALLOCATE and active.end * PAGE_SIZE > self.size
        return beyond or active.size is not None or active.failed != 0

    def _destructive(self, start: int, end: int) -> bool:
        if not self._active and not self._waiting:
            return False
        return any(
            c.start < end and start < c.end and c.kind not in COMPATIBLE for c in self._claims()
        )

    def _begin(self, op: OpId, request: Request, claim: Claim | None = None) -> list[Effect]:
        """Begin an operation that nothing stands in the way of.

        One that has waited gives no claim: the rules are read once more.
        """
        try:
            if claim is None:
                claim = claim_of(self, request)
            size = new_size(self, request) if claim.sizes else None
            reserved = self._reserve(claim)
        except Refused as refused:
            return [Done(op, refused.errno, str(refused))]
        active = Operation(
            op, claim.kind, claim.start, claim.end, size, STEPS[claim.kind], reserved
        )
        self._active.append(active)
        return self._advance(active)

    def _reserve(self, claim: Claim) -> int:
        """Reserve the pages that an operation will need, and say how many; or change nothing."""
        if claim.kind is Kind.MIGRATE:
            return self.reserve_copy(claim.start, claim.end)
        if claim.kind not in (Kind.ALLOCATE, Kind.FAULT, Kind.ZERO):
            return 0
        held = self.pages.range_cardinality(claim.start, claim.end)
        wanted = claim.end - claim.start - held  # what ZERO frees it may use again
        growing = 0
        if self._active:
            growing = sum(a.reserved for a in self._active if a.kind is not Kind.MIGRATE)
        self.reserve(wanted, growing)
        return wanted

    def _advance(self, active: Operation) -> list[Effect]:
        """Emit the next step that has something to do, or finish."""
        while active.left:
            step = active.left[0]
            if not self._needless(active, step):
                dead = self._doomed(active) if step is Step.FREE else ()
                return [Perform(active.op, step, active.kind, active.start, active.end, dead)]
            active.left = active.left[1:]
        return self._leave(active, Done(active.op, active.failed))

    def _needless(self, active: Operation, step: Step) -> bool:
        """A page that is not allocated is mapped by nobody: nothing to invalidate or free."""
        if active.kind is Kind.DESTROY or self.shared:
            return False  # users must learn that it is gone; the host allocates and frees unseen
        held = self.pages.range_cardinality(active.start, active.end)
        if active.kind is Kind.MIGRATE:  # users let go of an empty extent too
            return not self._doomed(active) or (step is Step.COPY and not held)
        if step is Step.ALLOCATE:
            return held == active.end - active.start
        return not held and not self._doomed(active)

    def _doomed(self, active: Operation) -> tuple[tuple[int, int], ...]:
        """Extents that lie wholly in a range that leaves the file, or in any that is freed."""
        layout = self.personality.layout
        if active.kind is Kind.MIGRATE:
            index = layout.extent_of(active.start)
            old = active.old or self.instances.get(index, 0)
            return ((index, old),) if old else ()
        if not layout.whole and active.kind not in (Kind.RESIZE, Kind.DESTROY):
            return ()
        return self.living(active.start, active.end)

    def _allocated(self, active: Operation, upto: int | None) -> None:
        added = 0
        if upto is not None and upto > active.start:
            added = self.hold(active.start, upto)
        self._budget.used += added - active.reserved
        active.reserved = 0

    def _undo(self, active: Operation, failed: int, upto: int | None) -> list[Effect]:
        """Give back what a growth that failed added past the end: it belongs to no file.

        No more than that: v7 and the shim allocate past the end with KEEP_SIZE too.
        """
        start = max(active.start, self.size // PAGE_SIZE)
        active.undo = deque(self.holes(start, start if upto is None else upto))
        self._allocated(active, upto)
        active.failed, active.size, active.left = failed, None, (Step.FREE,)
        return self._undo_next(active)

    def _undo_next(self, active: Operation) -> list[Effect]:
        if not active.undo:
            return self._leave(active, Done(active.op, active.failed))
        active.start, active.end = active.undo.popleft()
        return self._advance(active)

    def _copied(self, active: Operation) -> list[Effect]:
        """Let the new extent be the one that users get, before the old one is freed."""
        ((index, old),) = self._doomed(active)
        active.old, new = old, self.renew(index)
        pages = self.pages.range_cardinality(active.start, active.end)
        active.left = active.left[1:]
        moved = Moved(active.op, index, active.start, active.end, old, new, pages)
        return [moved, *self._advance(active)]

    def _freed(self, active: Operation) -> None:
        if active.kind is Kind.MIGRATE:
            if not active.old:  # nothing was in it
                del self.instances[self.personality.layout.extent_of(active.start)]
            return
        gone = self.pages.range_cardinality(active.start, active.end)
        self.pages.remove_range(active.start, active.end)
        for index, _ in self._doomed(active):
            del self.instances[index]
        if active.kind is Kind.ZERO:
            active.reserved += gone
        else:
            self._budget.used -= gone
        if active.kind is Kind.DESTROY:
            self.dead = True

    def _leave(self, active: Operation, done: Done | None) -> list[Effect]:
        """Remove an operation and let the next ones begin.

        The caller is answered before what queued behind it begins; parked faults come last.
        """
        self._active.remove(active)
        self._budget.used -= active.reserved
        effects: list[Effect] = []
        if done is not None:
            if done.errno == 0 and active.size is not None:
                self.size = active.size
            if done.errno == 0 and active.kind is Kind.DESTROY:
                self.size = 0
            effects.append(done)
        effects += self._admit()
        effects.append(Settled())
        return effects

    def _admit(self) -> list[Effect]:
        """Begin every queued operation that nothing ahead of it overlaps, in order."""
        if self._admitting:
            return []  # one that ended as it began: the loop below goes on, or the queue is a stack
        self._admitting = True
        effects: list[Effect] = []
        i = 0
        while i < len(self._waiting):
            op, request = self._waiting[i]
            try:
                blocked = self._must_wait(claim_of(self, request), self._waiting[:i])
            except Refused:
                blocked = False  # _begin answers it
            if blocked:
                i += 1
                continue
            del self._waiting[i]
            effects += self._begin(op, request)
            i = 0
        self._admitting = False
        return effects

    def _find(self, op: OpId) -> Operation:
        for active in self._active:
            if active.op == op:
                return active
        raise KeyError(f"no operation {op!r} is under way in this file")
