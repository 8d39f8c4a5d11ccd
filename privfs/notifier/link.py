# SPDX-License-Identifier: GPL-2.0-or-later
"""The owner's sockets: sessions come and go, records go out in order, deaths are watched (trio).

:class:`Hub` performs ``Send``, ``Drop``, ``Kill`` and ``Forget`` and hands everything that
arrives to a :class:`Sink`.  It decides nothing.  A reader waits for nothing but its socket; output
that finds no room waits in the peer's own queue, so a slow user delays nobody else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Final, Protocol

import trio

from privfs.notifier.fds import (
    FrameLost,
    Peer,
    close_later,
    is_userfault,
    receive_frame,
    send_frame,
)
from privfs.notifier.wire import FD, MAX_FDS, MAX_RECORDS, Record, To, WireError, pack, parse

log = logging.getLogger(__name__)

#: Records that may wait for one slow user before its session ends.
MAX_QUEUED: Final = 65_536
#: Records taken in a row before other tasks get their turn: some milliseconds.
_BURST: Final = 512
#: How long answers are waited for at once, and for how long not again where one failed to come.
_GLANCE_MICROSECONDS: Final = 200
_GLANCE_PAUSE: Final = 0.1
_GLANCE_LINES: Final = 16

Memfd = tuple[int, int, bool]


class Sink(Protocol):
    """Where a hub reports."""

    def connected(self, sid: int, peer: Peer) -> None:
        """Take note of a new session."""

    def received(self, sid: int, record: Record, fd: int | None) -> None:
        """Take one checked record; ``fd`` is lent for the time of the call."""

    def broken(self, sid: int, why: str) -> None:
        """Take note that the socket ended or the peer broke the protocol."""

    def exited(self, sid: int) -> None:
        """Take note that the process is proven dead."""


@dataclass(frozen=True, slots=True)
class HubStatistics:
    """Sessions alive, frames and records exchanged so far."""

    sessions: int
    frames_in: int
    frames_out: int
    records_out: int


class _Line:
    """One session's socket, queue, pidfd and, if it has one, copy of its userfaultfd."""

    __slots__ = (
        "blocked", "closing", "fence", "peer", "queue", "scope", "slow_until", "sock", "wake"
    )  # fmt: skip

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        self.sock: socket.socket | None = sock
        self.peer = peer
        self.fence = -1
        self.queue: deque[tuple[Record, Memfd | None]] = deque()
        self.blocked = False
        self.closing = False
        self.slow_until = 0.0
        self.wake = trio.Event()
        self.scope = trio.CancelScope()


class Hub:
    """All sessions of one mount.

    ``memfd_of(instance, ino, index, writable)`` returns a new descriptor of an extent, or None if
    that instance is dead.
    """

    def __init__(self, sink: Sink, memfd_of: Callable[[int, int, int, bool], int | None]) -> None:
        self._sink = sink
        self._memfd_of = memfd_of
        self._lines: dict[int, _Line] = {}
        self._sids = count(1)
        self._frames_in = self._frames_out = self._records_out = 0
        self._unflushed: set[int] = set()
        self._batch = trio.Event()
        #: Waits for one of some descriptors: (fds, us) → 0 in vain, below 0 if disturbed.
        self.glance: Callable[[tuple[int, ...], int], int] | None = None

    async def serve(self, listener: socket.socket) -> None:
        """Accept users until cancelled; ``listener`` is a non-blocking SEQPACKET socket."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._flush_in_batches)
            try:
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    try:
                        sock, _ = listener.accept()
                    except BlockingIOError:
                        continue
                    except OSError as error:
                        log.warning("cannot accept a user: %s", error)
                        await trio.sleep(0.1)  # out of descriptors: let some go
                        continue
                    self._begin(nursery, sock)
            finally:
                nursery.cancel_scope.cancel()
                for line in self._lines.values():
                    self._close(line)
                self._lines.clear()

    def _begin(self, nursery: trio.Nursery, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            peer = Peer.of(sock)
        except OSError as error:  # it has died already
            log.info("a user was gone before its first record: %s", error)
            sock.close()
            return
        sid = next(self._sids)
        self._lines[sid] = line = _Line(sock, peer)
        self._sink.connected(sid, peer)
        nursery.start_soon(self._session, sid, line)

    # --- effects ------------------------------------------------------------------------------

    def send(self, sid: int, record: Record, memfd: Memfd | None = None) -> None:
        """Queue a record; :meth:`flush` puts it on its way."""
        line = self._lines.get(sid)
        if line is not None and line.sock is not None:
            line.queue.append((record, memfd))

    def drop(self, sid: int) -> None:
        """Close the socket when its queue is out; the pidfd stays watched."""
        line = self._lines.get(sid)
        if line is not None and line.sock is not None:
            self._flush(sid, line)
            self._close_socket(line)

    def kill(self, sid: int) -> None:
        """SIGKILL the process."""
        line = self._lines.get(sid)
        if line is not None:
            line.peer.kill()

    def forget(self, sid: int) -> None:
        """Release everything that belongs to a session that is gone."""
        line = self._lines.pop(sid, None)
        if line is not None:
            self._flush(sid, line)
            self._close(line)
            line.scope.cancel()

    def flush(self, sids: set[int]) -> None:
        """Send what is queued for ``sids``, as far as there is room."""
        for sid in sids:
            line = self._lines.get(sid)
            if line is not None:
                self._flush(sid, line)

    def keep_fence(self, sid: int, fd: int) -> int:
        """Keep a copy of a session's userfaultfd, so that its fence stands; an errno if not.

        Nothing is ever asked of it: only that it stays open counts.
        """
        line = self._lines.get(sid)
        if line is None or line.fence >= 0 or not is_userfault(fd):
            return errno.EINVAL
        try:
            line.fence = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        except OSError as error:
            return error.errno or errno.EMFILE
        return 0

    def flush_later(self, sids: set[int]) -> None:
        """The same after whatever else is ready now, so that more fits into a frame."""
        self._unflushed |= sids
        self._batch.set()

    async def _flush_in_batches(self) -> None:
        while True:
            await self._batch.wait()
            self._batch = trio.Event()
            sids, self._unflushed = self._unflushed, set()
            self.flush(sids)

    def peer(self, sid: int) -> Peer | None:
        """Return the process of a session."""
        line = self._lines.get(sid)
        return line.peer if line else None

    def statistics(self) -> HubStatistics:
        """Return counts."""
        return HubStatistics(len(self._lines), self._frames_in, self._frames_out, self._records_out)

    def hear(self, sids: frozenset[int]) -> None:
        """Take what ``sids`` have said already; of one that says very much, a burst."""
        for sid in sids:
            taken = 0
            with contextlib.suppress(BlockingIOError):
                while taken < _BURST and (line := self._lines.get(sid)) is not None:
                    records = self._receive(sid, line)
                    if not records:
                        break
                    taken += records

    def hurry(self, sids: frozenset[int], ended: Callable[[], bool]) -> None:
        """Take answers that come within a moment, without a pass of trio's scheduler for each.

        Whoever lets us wait in vain is not waited for again soon, and a system call that comes
        meanwhile ends it: so nobody else pays more than a moment, and that seldom.
        """
        if self.glance is None or len(sids) > _GLANCE_LINES:
            return
        lines = [(sid, line) for sid in sids if (line := self._lines.get(sid)) is not None]
        while not ended():
            socks = [line.sock for _, line in lines if line.sock is not None]
            now = time.monotonic()
            if len(socks) != len(sids) or any(line.slow_until > now for _, line in lines):
                return
            found = self.glance(tuple([sock.fileno() for sock in socks]), _GLANCE_MICROSECONDS)
            if found == 0:
                for _, line in lines:
                    line.slow_until = now + _GLANCE_PAUSE
            if found <= 0:
                return
            for sid, line in lines:
                with contextlib.suppress(BlockingIOError):
                    self._receive(sid, line)

    # --- one session --------------------------------------------------------------------------

    async def _session(self, sid: int, line: _Line) -> None:
        with line.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, sid, line)
                nursery.start_soon(self._write, sid, line)
                await self._read(sid, line)

    async def _watch(self, sid: int, line: _Line) -> None:
        if self._lines.get(sid) is not line:
            return  # its first frame ended it: the pidfd is closed, its number perhaps another's
        try:
            await trio.lowlevel.wait_readable(line.peer.pidfd)
        except trio.ClosedResourceError:
            return
        self._sink.exited(sid)

    async def _write(self, sid: int, line: _Line) -> None:
        while True:
            await line.wake.wait()
            if line.sock is None:
                return
            try:
                await trio.lowlevel.wait_writable(line.sock)
            except trio.ClosedResourceError:
                return
            line.wake = trio.Event()
            line.blocked = False
            self._flush(sid, line)

    async def _read(self, sid: int, line: _Line) -> None:
        burst = 0
        while line.sock is not None:
            try:
                burst += self._receive(sid, line)
            except BlockingIOError:
                burst = 0
                try:
                    await trio.lowlevel.wait_readable(line.sock)
                except trio.ClosedResourceError:
                    return
            if burst >= _BURST:
                burst = 0
                await trio.lowlevel.checkpoint()

    def _receive(self, sid: int, line: _Line) -> int:
        """Take one frame, return the number of its records; BlockingIOError where none waits."""
        if line.sock is None:
            return 0
        fds: list[int] = []
        try:
            frame, fds = receive_frame(line.sock)
            if not frame:
                self._sink.broken(sid, "the socket was closed without BYE")
                return 0
            self._frames_in += 1
            return self._take(sid, line, frame, fds)
        except BlockingIOError:
            raise
        except (OSError, FrameLost, WireError) as error:
            self._sink.broken(sid, str(error))
            return 0
        finally:
            close_later(fds)

    def _take(self, sid: int, line: _Line, frame: bytes, fds: list[int]) -> int:
        """Hand the records of a frame on; return how many there were."""
        records = parse(frame, To.OWNER)
        wanted = sum(1 for record in records if record.flags & FD)
        if wanted != len(fds):
            raise WireError(f"frame with {len(fds)} descriptors for {wanted} records that take one")
        lent = iter(fds)
        for record in records:
            if line.sock is None:
                break  # an earlier record of this frame ended the session
            self._sink.received(sid, record, next(lent) if record.flags & FD else None)
        return len(records)

    def _flush(self, sid: int, line: _Line) -> None:
        """Send frames until the queue is out or the socket is full."""
        if line.blocked:
            if len(line.queue) > MAX_QUEUED:
                line.queue.clear()
                self._sink.broken(sid, f"more than {MAX_QUEUED} records unread")
            return
        while line.queue and line.sock is not None:
            fds: list[int] = []
            try:
                taken, records = self._frame(line, fds)
                if records:
                    send_frame(line.sock, pack(records), fds)
            except BlockingIOError:
                line.blocked = True
                line.wake.set()
                return
            except OSError as error:
                line.queue.clear()
                log.info("session %d: cannot send: %s", sid, error)
                with contextlib.suppress(OSError):
                    line.sock.shutdown(socket.SHUT_RDWR)  # the reader sees the end and reports it
                return
            finally:
                for fd in fds:
                    os.close(fd)
            for _ in range(taken):
                line.queue.popleft()
            self._frames_out += bool(records)
            self._records_out += len(records)

    def _frame(self, line: _Line, fds: list[int]) -> tuple[int, list[Record]]:
        """Fill ``fds``; return how much of the queue goes out, and as which records.

        An extent that died in the queue is left out: its user has left the file since, or has
        promised to be done with it.
        """
        records: list[Record] = []
        taken = 0
        for record, memfd in line.queue:
            if len(records) == MAX_RECORDS or (memfd is not None and len(fds) == MAX_FDS):
                break
            taken += 1
            if memfd is not None:
                fd = self._memfd_of(record.seq, *memfd)
                if fd is None:
                    continue
                fds.append(fd)
            records.append(record)
        return taken, records

    def _close(self, line: _Line) -> None:
        self._close_socket(line)
        trio.lowlevel.notify_closing(line.peer.pidfd)
        os.close(line.peer.pidfd)
        if line.fence >= 0:
            close_later([line.fence])  # the last close waits for its process's mmap_lock

    def _close_socket(self, line: _Line) -> None:
        if line.sock is not None:
            sock, line.sock = line.sock, None
            trio.lowlevel.notify_closing(sock)
            sock.close()
            line.queue.clear()
            line.wake.set()
