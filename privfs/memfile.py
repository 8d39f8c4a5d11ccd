# SPDX-License-Identifier: GPL-2.0-or-later
"""One private file as a value machine: size, page bitmap, operations in flight.

Everything that changes the pages of a file lives here; this module knows no I/O, no clock and
no user.  Requests go in (:meth:`MemFile.submit`), steps come out as values, and the completion of
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
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace

from pyroaring import BitMap

from privfs import seals
from privfs.budget import Budget
from privfs.extents import SINGLE
from privfs.operation import (
    COMPATIBLE,
    KINDS,
    MAX_PAGES,
    STEPS,
    Claim,
    Destroy,
    Done,
    Effect,
    Fallocate,
    FaultIn,
    Kind,
    Migrate,
    Moved,
    Operation,
    OpId,
    Perform,
    Request,
    Resize,
    Settled,
    Step,
)
from privfs.personality import (
    PAGE_SIZE,
    Action,
    BeyondEof,
    Personality,
    Refused,
    fallocate_rule,
    resize_rule,
)


class Look(enum.Enum):
    """What a fault finds."""

    PRESENT = "present"
    HOLE = "hole"
    PARK = "park"


class HostView(enum.Enum):
    """What the host sees of a file that it may map."""

    NOTHING = "every touch is SIGBUS"
    PAGES = "the pages that guests have"


class MemFile:
    """One private file.

    ``size`` is in bytes, ``pages`` the bitmap of allocated pages, ``instances`` maps the index of
    a living extent to its instance number, which is never used again.  ``quota`` bounds the pages
    of this file, 0 is no bound of its own.  ``purpose`` is what its first user asked for,
    ``users`` counts those that it is promised to now.
    """

    __slots__ = ("_active", "_admitting", "_budget", "_next_instance", "_waiting", "dead",
                 "host", "instances", "pages", "personality", "purpose", "quota",
                 "seals", "size", "users")  # fmt: skip

    def __init__(self, personality: Personality, budget: Budget, quota: int = 0) -> None:
        self.personality = personality
        self.quota = quota
        self.seals = seals.Seal(personality.seals or 0)
        self.purpose: seals.Purpose | None = None
        self.users = 0
        self.host: HostView | None = None
        self.size = 0
        self.pages = BitMap()
        self.instances: dict[int, int] = {}
        self.dead = False
        self._budget = budget
        self._next_instance = 1
        self._active: list[Operation] = []
        self._admitting = False
        self._waiting: list[tuple[OpId, Request]] = []

    # --- requests -----------------------------------------------------------------------------

    def submit(self, op: OpId, request: Request) -> list[Effect]:
        """Begin ``request``, or queue it behind overlapping ones; ``op`` names it from now on."""
        try:
            claim = self._claim(request)
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

    # --- promises -----------------------------------------------------------------------------

    def add_seals(self, mask: int, *, stores: bool) -> None:
        """Add seals, as F_ADD_SEALS; ``stores`` says whether a user may be storing.

        EINVAL for unknown seals or a file that has none, and for F_SEAL_WRITE where no user can
        be kept from storing; EPERM once sealed against more, EBUSY for F_SEAL_WRITE while there
        are users that may store (``mapping_deny_writable``).
        """
        what = f"add seals {mask:#x}"
        if self.personality.seals is None or mask & ~int(seals.ALL_SEALS):
            raise Refused(errno.EINVAL, f"{what}: not on files of {self.personality.name}")
        if mask & seals.Seal.WRITE and not self.personality.read_only_users:
            raise Refused(errno.EINVAL, f"{what}: descriptors of this memory are never read-only")
        seals.check(self.seals, seals.Deed.SEAL, what)
        if mask & seals.Seal.WRITE and not self.seals & seals.Seal.WRITE and stores:
            raise Refused(errno.EBUSY, f"{what}: users hold grants for stores; let them leave")
        self.seals |= seals.Seal(mask)

    def promise(self, wanted: int) -> None:
        """Bind the file to a purpose: the first user's counts, later ones must ask for it too."""
        what = f"register for purpose {wanted:#x}"
        if wanted & ~int(seals.ALL_PURPOSES):
            raise Refused(errno.EINVAL, f"{what}: unknown bits")
        asked = seals.Purpose(wanted) | seals.Purpose.USER_INACCESSIBLE
        if self.purpose is None:
            self.purpose = asked
        elif self.purpose != asked:
            held = "|".join(seals.names(self.purpose))
            raise Refused(errno.EINVAL, f"{what}: the file is bound to {held}")

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
            self.instances[0] = self._next_instance
            self._next_instance += 1

    @property
    def shared(self) -> bool:
        """Whether the host may touch pages, and so allocate them without asking."""
        return self.host is HostView.PAGES

    def adopt(self, runs: Iterable[tuple[int, int]]) -> None:
        """Count pages that the host has touched; there is no budget that could refuse them."""
        if self.dead:
            return
        before = len(self.pages)
        for start, end in runs:
            self.pages.add_range(start, min(end, self.size // PAGE_SIZE))
        self._budget.used += len(self.pages) - before

    # --- views --------------------------------------------------------------------------------

    @property
    def allocated(self) -> int:
        """Allocated pages."""
        return len(self.pages)

    def data_from(self, page: int) -> int | None:
        """Return the first allocated page at or after ``page``."""
        before = self.pages.rank(page - 1) if page else 0
        return self.pages[before] if before < len(self.pages) else None

    def holes(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the runs of pages of ``[start, end)`` that are not allocated, in order."""
        page = start
        while page < end:
            if page in self.pages:
                page = self.hole_from(page)
                continue
            data = self.data_from(page)
            last = end if data is None else min(data, end)
            yield page, last
            page = last

    def hole_from(self, page: int) -> int:
        """Return the first page at or after ``page`` that is not allocated."""
        if page not in self.pages:
            return page
        low, step = page + 1, 1  # [page, low) is allocated
        while self.pages.range_cardinality(low, low + step) == step:
            low, step = low + step, step * 2
        high = low + step  # somewhere in [low, high] is the first hole
        while low < high:
            middle = (low + high) // 2
            if self.pages.range_cardinality(low, middle + 1) == middle + 1 - low:
                low = middle + 1
            else:
                high = middle
        return low

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
        return (
            self.size, tuple(self.pages), tuple(sorted(self.instances.items())), self.dead,
            tuple([a.key() for a in self._active]), tuple(self._waiting),
            self.seals, self.purpose, self.users, self.host,
        )  # fmt: skip

    def copy(self, budget: Budget) -> MemFile:
        """Return an independent copy that draws on ``budget``."""
        twin = MemFile.__new__(type(self))
        twin.personality = self.personality
        twin.size = self.size
        twin.pages = self.pages.copy()
        twin.instances = self.instances.copy()
        twin.dead = self.dead
        twin.quota, twin.seals, twin.purpose = self.quota, self.seals, self.purpose
        twin.users = self.users
        twin.host = self.host
        twin._budget = budget
        twin._next_instance = self._next_instance
        twin._active = [a.copy() for a in self._active]
        twin._admitting = False
        twin._waiting = self._waiting.copy()
        return twin

    # --- the machine --------------------------------------------------------------------------

    def _claim(self, request: Request) -> Claim:
        """Name the pages that a request concerns; raise what it is refused with today."""
        if self.dead:
            raise Refused(errno.ENOENT, f"{request}: the file is gone")
        unit = self.personality.page_size // PAGE_SIZE
        match request:
            case Fallocate(mode, offset, length):
                row = fallocate_rule(self.personality, mode, offset, length, self.size)
                if row.action is not Action.ALLOCATE:
                    seals.check(self.seals, seals.Deed.ERASE, request)
                end = min(-(-(offset + length) // (unit * PAGE_SIZE)) * unit, MAX_PAGES)
                start = min(offset // (unit * PAGE_SIZE) * unit, end)
                sizes = self._new_size(request) is not None
                if sizes:
                    seals.check(self.seals, seals.Deed.GROW, request)
                beyond = row.action is Action.ALLOCATE and end * PAGE_SIZE > self.size
                return Claim(KINDS[row.action], start, end, sizes or beyond)
            case Resize(size):
                resize_rule(self.personality, size, self.size)
                if size != self.size:
                    deed = seals.Deed.GROW if size > self.size else seals.Deed.SHRINK
                    seals.check(self.seals, deed, request)
                return Claim(Kind.RESIZE, min(size, self.size) // PAGE_SIZE, MAX_PAGES, True)
            case FaultIn(page):
                page -= page % unit
                return Claim(Kind.FAULT, page, page + unit)
            case Destroy():
                return Claim(Kind.DESTROY, 0, MAX_PAGES)
            case Migrate(extent):
                self._require_movable(request)
                return Claim(Kind.MIGRATE, *self.personality.layout.extent_range(extent))

    def _require_movable(self, request: Migrate) -> None:
        """What is promised to stay where it is stays (``migrate_page`` of v7's shmem: EOPNOTSUPP).

        The promise is to users: a file that has none may be moved, whatever its last one asked for.
        """
        if self.shared:
            raise Refused(
                errno.EOPNOTSUPP, f"{request}: the host may have mapped its pages where they are"
            )
        if self.users and (self.purpose or 0) & seals.Purpose.UNMOVABLE:
            raise Refused(
                errno.EOPNOTSUPP,
                f"{request}: its users were promised that its pages stay where they are "
                "(MEMFILE_F_UNMOVABLE)",
            )

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
                claims.append(self._claim(request))
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
                claim = self._claim(request)
            size = self._new_size(request) if claim.sizes else None
            reserved = 0
            if claim.kind in (Kind.ALLOCATE, Kind.FAULT):
                wanted = claim.end - claim.start
                reserved = wanted - self.pages.range_cardinality(claim.start, claim.end)
                self._reserve(reserved)
            elif claim.kind is Kind.ZERO:
                reserved = claim.end - claim.start
                held = self.pages.range_cardinality(claim.start, claim.end)
                self._reserve(reserved - held)  # what it frees it may use again
                reserved -= held
            elif claim.kind is Kind.MIGRATE:
                reserved = self._reserve_copy(claim)
        except Refused as refused:
            return [Done(op, refused.errno, str(refused))]
        active = Operation(
            op, claim.kind, claim.start, claim.end, size, STEPS[claim.kind], reserved
        )
        self._active.append(active)
        return self._advance(active)

    def _reserve(self, pages: int) -> None:
        """Reserve pages of the file's quota and of the mount's budget, or change nothing."""
        growing = (a.reserved for a in self._active if a.kind is not Kind.MIGRATE)
        held = len(self.pages) + sum(growing)
        if self.quota and pages and held + pages > self.quota:
            raise Refused(
                errno.ENOSPC,
                f"{pages} pages wanted, the file holds {held} and may hold {self.quota}: "
                "punch holes in it, or mount with a larger -o quota=",
            )
        self._budget.reserve(pages)

    def _reserve_copy(self, claim: Claim) -> int:
        """Reserve room for a second copy of what an extent holds; no quota is asked.

        The file holds no more for it in the end, but for a while the mount does.
        """
        held = self.pages.range_cardinality(claim.start, claim.end)
        try:
            self._budget.reserve(held)
        except Refused as refused:
            raise Refused(
                refused.errno, f"{refused}; while an extent moves, the mount holds it twice"
            ) from None
        return held

    def _new_size(self, request: Request) -> int | None:
        match request:
            case Resize(size):
                return size
            case Fallocate(mode, offset, length):
                row = self.personality.fallocate[mode]
                if row.beyond_eof is BeyondEof.GROW and offset + length > self.size:
                    return offset + length
        return None

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
        gone = layout.within(active.start, active.end)
        fewer = gone if len(gone) < len(self.instances) else sorted(self.instances)
        return tuple((i, self.instances[i]) for i in fewer if i in gone and i in self.instances)

    def _allocated(self, active: Operation, upto: int | None) -> None:
        start, end = active.start, active.start if upto is None else upto
        added = 0
        if end > start:
            added = end - start - self.pages.range_cardinality(start, end)
            self.pages.add_range(start, end)
            for index, _, _ in self.personality.layout.split(start, end):
                if index not in self.instances:
                    self.instances[index] = self._next_instance
                    self._next_instance += 1
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
        active.old, new = old, self._next_instance
        self.instances[index] = new
        self._next_instance += 1
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
                blocked = self._must_wait(self._claim(request), self._waiting[:i])
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
