# SPDX-License-Identifier: GPL-2.0-or-later
"""The private memory of one VM: sessions with the owners of its files, extents in the arena.

A *file id* names a private file within a VM: the number of its mount's session in the upper bits,
its inode below, since two mounts may use the same inode numbers.  All methods that say "lock held"
run under the VM's ``mmu_lock``.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from hwemu.arena import ArenaError
from kvmsim.bindings import taken
from kvmsim.hostmem import HostMemory
from kvmsim.migration import UNMOVABLE, Migration, Migrations
from kvmsim.mmu import GuardRefusal
from kvmsim.ownerview import OwnerView
from kvmsim.region import PrivateFile
from kvmsim.uapi import PAGE_SIZE
from kvmsim.whichfile import WhichFile, which_file
from privfs.notifier.lane import Lane, LinkError, find_socket
from privfs.notifier.user import ExtentArrived, Granted, User, Zap
from privfs.notifier.wire import MAX_PAGES, Reason

#: Bytes of a confidential VM's file that may move: up to there extents are of 64 MiB, and the
#: hardware's tables, which follow by 4 KiB, let go of one within the owner's patience.
_FOLLOWED = 4 << 30
_INODE_BITS = 48
_INODE_MASK = (1 << _INODE_BITS) - 1
_INSTANCE_BITS = 64
_INSTANCE_MASK = (1 << _INSTANCE_BITS) - 1


class Guest(Protocol):
    """What a session tells the VM that it belongs to."""

    lock: threading.Lock

    def bound_pages(self, file: int, start: int, end: int) -> Iterable[tuple[int, int]]:
        """Return the parts of file pages ``[start, end)`` that slots are bound to (lock held)."""

    def zap_file(self, file: int, start: int, end: int, *, moving: bool = False) -> int:
        """Zap and return the flush epoch to wait for (lock held).

        ``moving``: the pages will come back at another place, or be zapped again.
        """

    def drain(self, epoch: int) -> None:
        """Wait until no vCPU can use a translation from before ``epoch`` (no lock held)."""

    def released(self, hpa: int, size: int) -> None:
        """Bytes of the arena go back to their owner: no vCPU can reach them (lock held).

        GuardRefusal where they are taken from no guest that lives: let it `die`, then say it again.
        """

    def die(self, why: GuardRefusal) -> None:
        """End the VM; when this returns none of its vCPUs runs (no lock held)."""

    def leaving(self, hpa: int, size: int) -> bool:
        """Bytes are about to be copied to another place, and no vCPU can reach them: whether
        something names their addresses until `migrated`, or `released`: they must not become
        another page's before (lock held).
        """

    def keeps(self, hpa: int, size: int) -> bool:
        """Whether it does so still (lock held)."""

    def page_granted(self, session: Session, granted: Granted) -> None:
        """Go on with the fault that asked (lock held)."""

    def page_denied(self, session: Session, req: int, status: int) -> None:
        """Fail the fault that asked (lock held)."""

    def migrated(self, migration: Migration) -> None:
        """Take note that pages lie somewhere else now; nothing maps them yet (lock held)."""

    def owner_lost(self, why: str) -> None:
        """Stop the VM: no invalidation can reach it any more (no lock held)."""

    def trespassed(self, why: str) -> None:
        """Stop the VM: a vCPU has met the fence, and sleeps there (no lock held)."""


@dataclass(slots=True)
class _Piece:
    """File pages ``[start, end)`` at host-physical address ``hpa``."""

    start: int
    end: int
    hpa: int


@dataclass(slots=True)
class _Extent:
    start: int
    end: int
    fd: int
    pieces: list[_Piece] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Ticket:
    """What must be over before an invalidation is acknowledged."""

    epoch: int
    dead: tuple[_Extent, ...]
    shut: tuple[tuple[int, int], ...]  #: (hpa, bytes) of what lives on
    lost: tuple[tuple[int, int], ...]  #: (hpa, bytes) of what was on its way to another place
    moving: bool


class Session:
    """One session with the owner of one mount, on behalf of one VM."""

    def __init__(
        self, guest: Guest, host: HostMemory, number: int, socket: str, label: str
    ) -> None:
        self.lock = guest.lock
        self.socket = socket
        self.files: dict[int, bool] = {}
        self._guest = guest
        self._host = host
        self._base = number << _INODE_BITS
        self._extents: dict[tuple[int, int], _Extent] = {}
        self._migrations = Migrations()
        self._vacated: list[tuple[int, int]] = []  #: (hpa, bytes) that nothing else may become yet
        self._closed = False
        self.lane = Lane(self, User())
        self.lane.start(socket, label, fence=host.fence.kind, userfault=host.fence.fd)
        self.view = OwnerView(socket)

    def file_id(self, ino: int) -> int:
        """Return the VM's name of a file of this session."""
        return self._base | ino

    def hpa(self, ino: int, instance: int, page: int) -> int | None:
        """Host-physical address of a file page in an extent that is here (lock held)."""
        extent = self._extents.get((ino, instance))
        if extent is not None:
            for piece in extent.pieces:
                if piece.start <= page < piece.end:
                    return piece.hpa + (page - piece.start) * PAGE_SIZE
        return None

    # --- what the lane asks -------------------------------------------------------------------

    def extent_arrived(self, extent: ExtentArrived, fd: int) -> None:
        """Place what slots need of an extent; keep its memfd for slots to come."""
        key = (extent.ino, extent.instance)
        if key in self._extents or extent.ino not in self.files or self._closed:
            os.close(fd)
            return
        self._extents[key] = held = _Extent(extent.start, extent.end, fd)
        try:
            self._place(extent.ino, held)
            self._retire_vacated()
        except ArenaError as error:  # the session ends with this: no fault could ever end
            raise OSError(errno.ENOMEM, f"cannot map an extent: {error}") from error

    def zap(self, zap: Zap) -> _Ticket:
        """Make a range unreachable for new translations."""
        dead = tuple(
            extent
            for instance in zap.dead
            if (extent := self._extents.pop((zap.ino, instance), None)) is not None
        )
        moving = zap.reason is Reason.MOVE
        lost: tuple[tuple[int, int], ...] = ()
        if not moving:
            lost = self._migrations.freed(self.file_id(zap.ino), zap.start, zap.end)
        else:
            for piece in (piece for extent in dead for piece in extent.pieces):
                self._migrations.left(self.file_id(zap.ino), piece.start, piece.end, piece.hpa)
        shut = tuple(self._placed(zap.ino, zap.start, zap.end))
        epoch = self._guest.zap_file(self.file_id(zap.ino), zap.start, zap.end, moving=moving)
        return _Ticket(epoch, dead, shut, lost, moving)

    def drain(self, tickets: list[object]) -> None:
        """Wait for old translations and accesses, then shut the fence and let go of the dead."""
        held = [ticket for ticket in tickets if isinstance(ticket, _Ticket)]
        self._guest.drain(max(ticket.epoch for ticket in held))
        for ticket in held:
            for hpa, length in ticket.shut:
                self._give_back(hpa, length)
                self._host.shut(hpa, length)
            for hpa, length in ticket.lost:
                self._give_back(hpa, length)
            for extent in ticket.dead:
                self._release(extent, moving=ticket.moving)
        with self.lock:
            self._retire_vacated()

    def granted(self, granted: Granted) -> None:
        """Pass a grant on."""
        self._guest.page_granted(self, granted)

    def denied(self, req: int, status: int) -> None:
        """Pass a refusal on."""
        self._guest.page_denied(self, req, status)

    def lost(self, why: str) -> None:
        """Pass the end of the owner on."""
        self._guest.owner_lost(why)

    # --- slots --------------------------------------------------------------------------------

    def place_all(self, ino: int) -> None:
        """Place what a new slot needs of the extents that are here already (lock held)."""
        for (owner_ino, _), extent in self._extents.items():
            if owner_ino == ino:
                self._place(ino, extent)

    def _place(self, ino: int, extent: _Extent) -> None:
        for start, end in self._guest.bound_pages(self.file_id(ino), extent.start, extent.end):
            if any(piece.start <= start < piece.end for piece in extent.pieces):
                continue
            offset, length = (start - extent.start) * PAGE_SIZE, (end - start) * PAGE_SIZE
            if extent.end - extent.start == MAX_PAGES:
                # All of the file in one memfd: the host may map it, and touch what is not granted.
                hpa = self._host.place(extent.fd, offset, length, writable=self.files[ino])
            else:
                hpa = self._host.place_private(
                    extent.fd, offset, length, self._guest.trespassed, writable=self.files[ino]
                )
            extent.pieces.append(_Piece(start, end, hpa))
            for migration in self._migrations.arrived(self.file_id(ino), start, end, hpa):
                self._guest.migrated(migration)

    def _placed(self, ino: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (hpa, bytes) of what is mapped of file pages ``[start, end)``."""
        for (owner_ino, _), extent in self._extents.items():
            for piece in extent.pieces if owner_ino == ino else ():
                first, last = max(start, piece.start), min(end, piece.end)
                if first < last:
                    yield piece.hpa + (first - piece.start) * PAGE_SIZE, (last - first) * PAGE_SIZE

    def pieces(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (file, first page, end, hpa) of what is mapped (lock held)."""
        for (ino, _), extent in self._extents.items():
            for piece in extent.pieces:
                yield self.file_id(ino), piece.start, piece.end, piece.hpa

    def _release(self, extent: _Extent, *, moving: bool = False) -> None:
        """Let go of an extent; of one that moves, addresses that are still named stay taken."""
        for piece in extent.pieces:
            size = (piece.end - piece.start) * PAGE_SIZE
            with self.lock:
                if moving and self._guest.leaving(piece.hpa, size):
                    self._host.vacate(piece.hpa, size)
                    self._vacated.append((piece.hpa, size))
                    continue
            self._give_back(piece.hpa, size)
            self._host.retire(piece.hpa, size)
        os.close(extent.fd)

    def _give_back(self, hpa: int, size: int) -> None:
        """Tell the VM that bytes go back to their owner, were it its death (no lock held)."""
        try:
            with self.lock:
                self._guest.released(hpa, size)
        except GuardRefusal as refused:
            self._guest.die(refused)
            with self.lock:
                self._guest.released(hpa, size)

    def _retire_vacated(self, *, closing: bool = False) -> None:
        """Give back the addresses that nothing names any more (lock held)."""
        kept = [] if closing else [one for one in self._vacated if self._guest.keeps(*one)]
        for hpa, size in set(self._vacated).difference(kept):
            self._guest.released(hpa, size)
            self._host.retire(hpa, size)
        self._vacated = kept

    def forget(self, ino: int) -> None:
        """Let go of a file that no slot is bound to (no lock held)."""
        with self.lock:
            known = self.files.pop(ino, None) is not None
            lost = self._migrations.forget(self.file_id(ino))
            gone = [key for key in self._extents if key[0] == ino]
            extents = [self._extents.pop(key) for key in gone]
        for hpa, length in lost:
            self._give_back(hpa, length)
        for extent in extents:
            self._release(extent)
        with self.lock:
            self._retire_vacated()
        if known and self.lane.alive:
            self.lane.unregister(ino)

    def close(self) -> None:
        """Let go of every extent and leave; no vCPU may run any more."""
        with self.lock:
            self._closed = True  # an answer to a vCPU's last fault may still come
            extents = list(self._extents.values())
            self._extents.clear()
        for extent in extents:
            self._release(extent)
        with self.lock:
            self._retire_vacated(closing=True)
        if self.lane.alive:
            for ino in list(self.files):
                self.lane.unregister(ino)
        self.files.clear()
        self.lane.close()
        self.view.close()


class PrivateMemory:
    """All private files of one VM; the ``Backing`` of its fault path."""

    def __init__(self, guest: Guest, host: HostMemory, label: str, *, movable: bool = True) -> None:
        self._guest = guest
        self._host = host
        self._label = label
        self.movable = movable  #: whether it can follow its pages, where `host` lets them move
        self._sessions: list[Session] = []
        self._mounts: dict[int, Session] = {}  #: by st_dev of their files
        self.exclusive = False  #: whether its files are no other VM's (of a confidential one)

    def open(self, path: str | os.PathLike[str]) -> PrivateFile:
        """Become a user of the private file at ``path``; again for another slot is free."""
        socket = find_socket(path)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return self._register(socket, fd)
        finally:
            os.close(fd)

    def open_fd(self, fd: int, status: WhichFile | None = None) -> PrivateFile:
        """Become a user of the private file behind ``fd``, which stays the caller's.

        Again for another slot asks nobody. ``status`` is what :func:`which_file` says of it.
        LinkError if it lies on no privfs mount, or the owner refuses it.
        """
        status = which_file(fd) if status is None else status
        session = self._mounts.get(status.st_dev)
        if session is not None and session.lane.alive and status.st_ino in session.files:
            return PrivateFile(session.file_id(status.st_ino), status.st_size // PAGE_SIZE)
        socket = find_socket(os.readlink(f"/proc/self/fd/{fd}"))
        if os.stat(os.path.dirname(socket)).st_dev != os.fstat(fd).st_dev:
            raise LinkError(errno.EXDEV, f"descriptor {fd} is no file of the mount at {socket}")
        return self._register(socket, fd)

    def _register(self, socket: str, fd: int) -> PrivateFile:
        session = next((s for s in self._sessions if s.socket == socket), None)
        if session is None:
            number = len(self._sessions) + 1
            session = Session(self._guest, self._host, number, socket, self._label)
            self._sessions.append(session)
        status = os.fstat(fd)
        if status.st_ino not in session.files:
            binding = (socket, status.st_ino)
            self._host.bindings.take(binding, self, exclusive=self.exclusive)
            try:
                purpose = self._host.purpose if self._may_move(status) else UNMOVABLE
                registered = session.lane.register(fd, purpose, exclusive=self.exclusive)
            except BaseException as error:
                self._host.bindings.drop(self, binding)
                if isinstance(error, LinkError) and error.errno == errno.EBUSY:
                    path = os.readlink(f"/proc/self/fd/{fd}")
                    raise taken(path, session.view, status.st_ino) from error
                raise
            session.files[registered.ino] = registered.writable
        self._mounts[status.st_dev] = session
        return PrivateFile(session.file_id(status.st_ino), status.st_size // PAGE_SIZE)

    def _may_move(self, status: os.stat_result) -> bool:
        return self.movable and (not self.exclusive or status.st_size <= _FOLLOWED)

    def forget(self, file: int) -> None:
        """Stop using a file that no slot is bound to, and no vCPU can reach (no lock held)."""
        session, ino = self.locate(file)
        session.forget(ino)
        self._host.bindings.drop(self, (session.socket, ino))

    def locate(self, file: int) -> tuple[Session, int]:
        """Return the session and the inode behind a file id."""
        return self._sessions[(file >> _INODE_BITS) - 1], file & _INODE_MASK

    def installable(self, file: int, page: int, start: int, end: int, seq: int) -> tuple[int, int]:
        """Return the part of a grant that no newer invalidation covers (lock held)."""
        session, ino = self.locate(file)
        return session.lane.user.installable(ino, page, start, end, seq)

    @staticmethod
    def extent_id(file: int, instance: int) -> int:
        """Name an extent instance of a file within this VM."""
        return file << _INSTANCE_BITS | instance

    def hpa(self, instance: int, page: int) -> int | None:
        """Return the host-physical address of a page in extent ``extent_id`` (lock held)."""
        session, ino = self.locate(instance >> _INSTANCE_BITS)
        return session.hpa(ino, instance & _INSTANCE_MASK, page)

    def pieces(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (file, first page, end, hpa) of what is mapped of all files (lock held)."""
        for session in self._sessions:
            yield from session.pieces()

    def punch(self, file: int, start: int, end: int) -> None:
        """Punch file pages through the owner; the zap comes back like anyone else's."""
        session, ino = self.locate(file)
        session.lane.punch(ino, start, end)

    def allocate(self, file: int, start: int, end: int) -> None:
        """Allocate file pages through the owner, as fallocate(KEEP_SIZE) does (no lock held).

        LinkError: ENOSPC, EINTR, … as fallocate(2); of the range nothing new is left then.
        """
        session, ino = self.locate(file)
        session.lane.allocate(ino, start, end)

    def runs(self, file: int, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """Ask the owner which file pages are allocated (no lock held)."""
        session, ino = self.locate(file)
        return session.view.runs(ino, start, end)

    def alone(self, file: int) -> bool:
        """Ask the owner whether this VM is the file's only user (no lock held)."""
        session, ino = self.locate(file)
        return len(session.view.users(ino)) == 1

    def placed(self, file: int) -> None:
        """Place extents for a slot that was just bound (lock held)."""
        session, ino = self.locate(file)
        session.place_all(ino)

    def close(self) -> None:
        """Leave every session."""
        for session in self._sessions:
            session.close()
        self._sessions.clear()
        self._host.bindings.drop(self)
