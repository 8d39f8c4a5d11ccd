# SPDX-License-Identifier: GPL-2.0-or-later
"""The user's half of the contract: which grants may still be installed.

A grant carries the seq of the last invalidation that the owner had sent when it answered.  The
user may install it only if it has since processed no overlapping invalidation: that is
``mmu_invalidate_retry_gfn()`` with the snapshot delivered by the owner, so that no barrier can be
forgotten and no END message is needed.

No order of delivery is relied upon: a grant may overtake an invalidation, an invalidation another
one or the answer to a registration.

The caller holds one lock (KVM's ``mmu_lock``) over :meth:`User.received` together with the zap
that it asks for, and over :meth:`User.installable` together with the store of the table entry.
Units are file pages in half-open ranges.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Final, NamedTuple

from privfs.notifier.wire import (
    VERSION,
    Fence,
    Flag,
    Op,
    Reason,
    Record,
    WireError,
    label_words,
)
from privfs.seals import ALL_PURPOSES

#: Processed invalidations that a file remembers; older grants are refused.
RING: Final = 256


class Opened(NamedTuple):
    """WELCOME: the session may register files, or was refused with ``status``."""

    req: int
    status: int
    session: int


class Registered(NamedTuple):
    """REGISTERED: this process is a user of inode ``ino``, or was refused with ``status``."""

    req: int
    status: int
    ino: int
    writable: bool
    pages: int


class Granted(NamedTuple):
    """PAGE: ``[start, end)`` of extent ``instance`` may be installed if still ``installable``."""

    req: int
    ino: int
    instance: int
    start: int
    end: int
    seq: int


class Denied(NamedTuple):
    """PAGE with an errno."""

    req: int
    ino: int
    status: int


class Replied(NamedTuple):
    """REPLY to UNREGISTER, ALLOCATE or PUNCH."""

    req: int
    status: int


class ExtentArrived(NamedTuple):
    """EXTENT: the memfd that comes along holds file pages ``[start, end)``."""

    ino: int
    instance: int
    start: int
    end: int


class Zap(NamedTuple):
    """INVALIDATE: make ``[start, end)`` unreachable, prove it, then :meth:`User.ack`.

    ``dead`` are extent instances to unmap and close before the ack.
    """

    ino: int
    start: int
    end: int
    seq: int
    reason: Reason
    dead: tuple[int, ...]


class Closed(NamedTuple):
    """BYE: no invalidation can come any more; nothing may be mapped from now on."""

    status: int


Happening = (
    Opened | Registered | Granted | Denied | Replied | ExtentArrived | Zap | Closed
)  # fmt: skip


class _File:
    __slots__ = ("extents", "floor", "ring")

    def __init__(self, ring: int) -> None:
        self.ring: deque[tuple[int, int, int]] = deque(maxlen=ring)
        self.floor = 0
        self.extents: dict[int, tuple[int, int]] = {}

    def note(self, seq: int, start: int, end: int) -> None:
        """Remember an invalidation; the ring stays in the order of seqs."""
        ring = self.ring
        if len(ring) == ring.maxlen:
            self.floor = max(self.floor, ring[0][0])
        overtaken = bool(ring) and ring[-1][0] > seq
        ring.append((seq, start, end))
        if overtaken:
            self.ring = deque(sorted(ring), ring.maxlen)

    def copy(self) -> _File:
        twin = _File(0)
        twin.ring = self.ring.copy()
        twin.floor = self.floor
        twin.extents = self.extents.copy()
        return twin


class User:
    """One session's state in the process that maps the pages.

    Methods named after an op return the :class:`Record` to send.  ``req`` numbers are the lowest
    that are free, so that they stay small and can be reused.
    """

    def __init__(self, ring: int = RING) -> None:
        self._ring = ring
        self._files: dict[int, _File] = {}
        self._pending: dict[int, tuple[Op, int]] = {}
        self._newest = 0  #: seq of the newest invalidation of a file that was not registered

    # --- records to send ----------------------------------------------------------------------

    def hello(self, label: str = "", replaces: int = 0, fence: Fence = Fence.NONE) -> Record:
        """Open the session; ``label`` (16 bytes) names it in ``privfs map`` and in logs.

        ``replaces`` is the id of a session of this process whose socket has broken: everything
        that it had mapped is unmapped.  ESRCH answers when there is none such.  ``fence`` covers
        all that will be mapped; a userfaultfd is sent along.
        """
        low, high = label_words(label)
        flags = Flag.FD if fence is Fence.UFFD else Flag.NONE
        req = self._begin(Op.HELLO, 0)
        return Record(Op.HELLO, flags, int(fence), req, low, VERSION, replaces, high)

    def register(self, purpose: int = ALL_PURPOSES, *, exclusive: bool = False) -> Record:
        """Become a user of the file whose descriptor is sent along.

        ``purpose`` (:class:`privfs.seals.Purpose`) is what the file is to be for; the first user
        decides, later ones must ask for the same.  KVM asks for everything, and so do we.
        ``exclusive``: no other session may have the file; EBUSY answers while one has it.
        """
        flags = Flag.FD | (Flag.EXCLUSIVE if exclusive else 0)
        return Record(Op.REGISTER, flags, req=self._begin(Op.REGISTER, 0), start=purpose)

    def unregister(self, ino: int) -> Record:
        """Stop using a file.  Everything must be unmapped before this record is sent."""
        self._files.pop(ino, None)
        return Record(Op.UNREGISTER, req=self._begin(Op.UNREGISTER, ino), obj=ino)

    def get(
        self, ino: int, page: int, start: int, end: int, *, write: bool, again: bool = False
    ) -> Record:
        """Ask for ``page``, and for what is allocated around it in ``[start, end)``.

        ``again`` asks for the extent's memfd once more.
        """
        flags = (Flag.WRITE if write else 0) | (Flag.EXTENT if again else 0)
        return Record(Op.GET, flags, 0, self._begin(Op.GET, ino), ino, start, end, page)

    def allocate(self, ino: int, start: int, end: int) -> Record:
        """``fallocate(KEEP_SIZE)`` through the owner."""
        return Record(Op.ALLOCATE, req=self._begin(Op.ALLOCATE, ino), obj=ino, start=start, end=end)

    def punch(self, ino: int, start: int, end: int) -> Record:
        """``fallocate(PUNCH_HOLE)`` through the owner; its INVALIDATE comes back to us too."""
        return Record(Op.PUNCH, req=self._begin(Op.PUNCH, ino), obj=ino, start=start, end=end)

    def ack(self, seq: int) -> Record:
        """Promise that no thread of this process can reach the range of invalidation ``seq``."""
        return Record(Op.ACK, seq=seq)

    def bye(self) -> Record:
        """End the session in order; nothing may be registered any more."""
        return Record(Op.BYE)

    # --- records received ---------------------------------------------------------------------

    def received(self, record: Record) -> Happening:
        """Take one checked record from the owner; raise WireError on an answer to no question."""
        op = record.op
        if op == Op.INVALIDATE:
            return self._invalidate(record)
        if op == Op.EXTENT:
            file = self._files.get(record.obj)
            if file is not None:
                file.extents[record.seq] = (record.start, record.end)
            return ExtentArrived(record.obj, record.seq, record.start, record.end)
        if op == Op.BYE:
            return Closed(record.status)
        asked, ino = self._pending.get(record.req, (None, 0))
        if asked is None or _ANSWERS[asked] != op:
            raise WireError(f"{Op(op).name} answers request {record.req}, which is not pending")
        del self._pending[record.req]
        if op == Op.PAGE:
            if record.status:
                return Denied(record.req, ino, record.status)
            return Granted(record.req, ino, record.obj, record.start, record.end, record.seq)
        if op == Op.REGISTERED:
            if not record.status:
                file = self._files[record.obj] = _File(self._ring)
                file.floor = max(record.seq, self._newest)
            return Registered(record.req, record.status, record.obj, bool(record.start), record.end)
        if op == Op.WELCOME:
            return Opened(record.req, record.status, record.seq)
        return Replied(record.req, record.status)

    def _invalidate(self, record: Record) -> Zap:
        file = self._files.get(record.obj)
        dead: tuple[int, ...] = ()
        if file is None:
            self._newest = max(self._newest, record.seq)
        else:
            file.note(record.seq, record.start, record.end)
            if record.flags & Flag.EXTENT or record.status in (Reason.TRUNCATE, Reason.REVOKE):
                dead = tuple(
                    instance
                    for instance, (first, last) in file.extents.items()
                    if record.start <= first and last <= record.end
                )
                for instance in dead:
                    del file.extents[instance]
        return Zap(record.obj, record.start, record.end, record.seq, Reason(record.status), dead)

    # --- the install rule ---------------------------------------------------------------------

    def installable(self, ino: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        """Return the part of a grant ``[start, end)`` around ``page`` that may be installed.

        Empty (``start == end``) when an invalidation newer than ``seq`` has covered ``page``, or
        so many have been processed since that it cannot be told: the fault must ask again.
        """
        file = self._files.get(ino)
        if file is None or seq < file.floor:
            return page, page
        for newer, first, last in reversed(file.ring):
            if newer <= seq:
                break
            if first <= page < last:
                return page, page
            if last <= page:
                start = max(start, last)
            else:
                end = min(end, first)
        return start, end

    def extent(self, ino: int, instance: int) -> tuple[int, int] | None:
        """Return the pages of a living extent instance, or None if its death was processed."""
        file = self._files.get(ino)
        return file.extents.get(instance) if file else None

    # --- state --------------------------------------------------------------------------------

    def _begin(self, op: Op, ino: int) -> int:
        req = 1
        while req in self._pending:
            req += 1
        self._pending[req] = (op, ino)
        return req

    def key(self) -> Hashable:
        """Return the state as a hashable value."""
        return (
            tuple([
                (ino, tuple(f.ring), f.floor, tuple(f.extents.items()))
                for ino, f in self._files.items()
            ]),
            frozenset(self._pending.items()),
            self._newest,
        )  # fmt: skip

    def copy(self) -> User:
        """Return an independent copy."""
        twin = type(self).__new__(type(self))
        twin._ring = self._ring
        twin._files = {ino: f.copy() for ino, f in self._files.items()}
        twin._pending = self._pending.copy()
        twin._newest = self._newest
        return twin


_ANSWERS: Final = {
    Op.HELLO: Op.WELCOME,
    Op.REGISTER: Op.REGISTERED,
    Op.UNREGISTER: Op.REPLY,
    Op.GET: Op.PAGE,
    Op.ALLOCATE: Op.REPLY,
    Op.PUNCH: Op.REPLY,
}
