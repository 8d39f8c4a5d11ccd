# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory side at work: performs what the owner core decides (trio).

One :class:`Service` is the memory of one mount.  System calls come in through :meth:`call`, users
through its :class:`~privfs.notifier.link.Hub`; both wait only for what the core says they must.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from typing import Final

import trio

from privfs import extents
from privfs.backing import Backing, BackingError, Extent
from privfs.backing.moving import copy_extent
from privfs.backing.shmem import Shmem
from privfs.backing.undo import undo
from privfs.events import Events
from privfs.hostmapped import HostMapped
from privfs.incidents import Incidents
from privfs.ladder import Ladder, Latencies
from privfs.machine import Machine
from privfs.notifier import effects as core
from privfs.notifier.dying import harmless, runs_no_more
from privfs.notifier.effects import Rung
from privfs.notifier.fds import Peer, check_private_file, identify, thread_group
from privfs.notifier.link import Hub
from privfs.notifier.owner import Owner
from privfs.notifier.wire import Op, Record
from privfs.operation import Kind, Moved, OpId, Perform, Request, Step
from privfs.personality import Personality, Refused
from privfs.strays import Strays
from privfs.timers import Timers

log = logging.getLogger(__name__)

_COMPLAINT_SECONDS: Final = 10.0
_SWEEP_SECONDS: Final = 10.0


@dataclass(slots=True)
class Call:
    """A system call that has not been answered."""

    op: OpId
    request: Request
    tid: int = 0  #: the thread that made it
    ino: int = 0
    event: trio.Event | None = None
    outcome: core.Answer | None = None
    interrupted: bool = False
    copied: int = 0  #: pages, of an extent that moves
    moved: Moved | None = None
    trouble: str = ""  #: what kept it from moving


class Service:
    """Files, users and memory of one mount.

    ``dev`` must be set to the mount's device number before users can register.
    """

    def __init__(
        self,
        personality: Personality,
        budget_pages: int,
        ladder: Ladder | None = None,
        on_expire: Callable[[int], None] = lambda ino: None,
        backing: Backing | None = None,
        *,
        quota_pages: int = 0,
    ) -> None:
        self.ladder = ladder or Ladder()
        self.owner = Owner(
            personality, budget_pages, kills=self.ladder.ack > 0, quota_pages=quota_pages
        )
        self.backing = backing or Backing()
        self.machine = Machine(lambda: sum(self._coming.values()))
        if not self.backing.store.pooled:
            self.owner.budget.room = self.machine.room
        self.hub = Hub(self, self._memfd)
        self.dev = 0
        self.kills = self.failures = self.moves = 0
        self.asking = 0  #: connections to the control socket
        self.latencies = Latencies()
        self.incidents = Incidents()
        self.events = Events(self.owner)
        self.strays = Strays(self.owner, self.backing)
        self.host_mapped = HostMapped(self.owner, self.backing)
        self._on_expire = on_expire
        self._ops = count(1)
        self._calls: dict[OpId, Call] = {}
        self._began: dict[tuple[int, OpId], float] = {}
        self._coming: dict[OpId, int] = {}  #: pages that worker threads are about to allocate
        self._quiet_until = float("-inf")
        self._timers = Timers(
            self.ladder.delay, lambda ino, op: bool(self.owner.waiting_for(ino, op))
        )
        self._nursery: trio.Nursery | None = None
        self._idle: trio.Event | None = None

    async def run(
        self,
        listener: socket.socket,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve users until cancelled, then let go of all memory."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._tick)
                nursery.start_soon(self._sweep)
                task_status.started()
                await self.hub.serve(listener)
        finally:
            self._nursery = None
            self.backing.close()

    # --- system calls -------------------------------------------------------------------------

    def begin(self, ino: int, request: Request, tid: int = 0) -> Call:
        """Begin a system call on a file, made by thread ``tid``.

        Which process that is costs a look into /proc: it is taken only when a user is condemned.
        """
        call = Call(next(self._ops), request, tid, ino)
        self._calls[call.op] = call
        self.host_mapped.adopt(ino)
        caller = thread_group(tid) if tid and self.owner.condemning else 0
        self._apply(self.owner.request(ino, call.op, request, caller))
        return call

    def hurry(self, ino: int, call: Call) -> None:
        """Wait a moment for users that answer at once; only where no other call waits."""
        if len(self._calls) == 1:
            self.hub.hurry(self.owner.waiting_for(ino, call.op), lambda: call.outcome is not None)

    async def settled(self, call: Call) -> None:
        """Wait for the end of a call, whatever it is."""
        if call.outcome is None:
            if call.event is None:
                call.event = trio.Event()
            await call.event.wait()

    async def wait(self, call: Call) -> None:
        """Wait for the end of a call; raise Refused where it failed."""
        await self.settled(call)
        assert call.outcome is not None
        if call.outcome.errno:
            raise Refused(call.outcome.errno, call.outcome.why or str(call.request))

    def interrupt(self, call: Call) -> None:
        """Answer EINTR if that is still safe: while queued, between chunks, before freeing.

        For signals to a caller that allocates, and for any caller that is being killed.
        """
        call.interrupted = True
        self._apply(self.owner.cancel(call.op, errno.EINTR))

    def release(self, ino: int) -> None:
        """The last name and the last descriptor of a file are gone."""
        self._apply(self.owner.release(ino))

    async def shutdown(self) -> None:
        """Revoke all files from all users, by the ladder, then say goodbye to them."""
        self._apply(self.owner.shutdown())
        while any(self.owner.users.values()):
            self._idle = trio.Event()
            with trio.move_on_after(self.ladder.ack + self.ladder.kill + 1) as scope:
                await self._idle.wait()
            if scope.cancelled_caught:
                log.error("leaving although some users were not proven gone")
                break
        for sid in list(self.owner.sessions):
            self.hub.send(sid, Record(Op.BYE))
            self.hub.flush({sid})

    # --- what the hub reports -----------------------------------------------------------------

    def connected(self, sid: int, peer: Peer) -> None:
        """Begin a session."""
        self.owner.connect(sid, peer.pid)

    def received(self, sid: int, record: Record, fd: int | None) -> None:
        """Pass a record to the core together with what only the shell can find out."""
        found: tuple[int, bool] | int | None = None
        if record.op == Op.REGISTER and fd is not None:
            found = self._identify(fd)
        elif record.op == Op.HELLO:
            peer = self.hub.peer(sid)
            if self.ladder.ack > 0 and peer is not None and not peer.may_kill():
                found = errno.EPERM  # we could never prove its death
            elif fd is not None:
                found = self.hub.keep_fence(sid, fd) or None
        if self.events.wanted:
            self.events.received(sid, record)
        if sid in self.owner.sessions:
            self._apply(self.owner.received(sid, record, found))

    def broken(self, sid: int, why: str) -> None:
        """The session is silent from now on."""
        self._apply(self.owner.broken(sid, why))

    def exited(self, sid: int) -> None:
        """The process is proven dead."""
        self._apply(self.owner.gone(sid))

    def _identify(self, fd: int) -> tuple[int, bool] | int:
        try:
            identity = identify(fd)
        except OSError as error:
            return error.errno or errno.EBADF
        return check_private_file(identity, self.dev) or (identity.ino, identity.writable)

    def _memfd(self, instance: int, ino: int, index: int, writable: bool) -> int | None:
        file = self.owner.files.get(ino)
        if file is None or file.instances.get(index) != instance:
            return None
        extent = self._extent(ino, index)
        if extent is None:
            return None
        path = f"/proc/self/fd/{extent.fd}"
        try:
            fd = os.dup(extent.fd) if writable else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._complain(f"an extent cannot be handed out: {error.strerror}", logging.WARNING)
            return None  # its user will ask for it again
        if self._extent(ino, index) is extent:
            return fd
        os.close(fd)  # a worker thread was ending it: perhaps another's number by then
        return None

    def _extent(self, ino: int, index: int) -> Extent | None:
        try:
            return self.backing.extent(ino, index)
        except BackingError:
            return None

    def waited(self, ino: int, op: OpId) -> float:
        """Return how long an invalidation has been waiting for its users, in seconds."""
        began = self._began.get((ino, op))
        return 0.0 if began is None else time.monotonic() - began

    # --- freed memory -------------------------------------------------------------------------

    def look_over(self, ino: int) -> None:
        """Look for touches of freed memory of a file, tell of them and do what must be done."""
        if not self.host_mapped.adopt(ino) and self.backing.extents(ino):
            self._apply(list(self.strays.sweep(ino)))

    async def _sweep(self) -> None:
        """Look over what users have: what is never allocated again would never be looked at."""
        while True:
            await trio.sleep(_SWEEP_SECONDS)
            for ino in [ino for ino, users in self.owner.users.items() if users]:
                if ino in self.owner.files:
                    self.look_over(ino)
                await trio.lowlevel.checkpoint()

    # --- effects ------------------------------------------------------------------------------

    def _apply(self, effects: Iterable[core.Effect]) -> None:
        """Perform effects in order.  Work that completes at once feeds its own effects back."""
        todo = deque(effects)
        touched: set[int] = set()
        while todo:
            effect = todo.popleft()
            if self.events.wanted:
                self.events.effect(effect)
            match effect:
                case core.Send(sid, record, extent):
                    self.hub.send(sid, record, extent)
                    touched.add(sid)
                case core.Work():
                    todo.extend(self._work(effect))
                case core.Migrated(ino, moved):
                    self._migrated(ino, moved)
                case core.Answer(op):
                    self._answer(op, effect)
                case core.Arm(ino, op, rung):
                    if rung is Rung.LOG:
                        self._began[ino, op] = time.monotonic()
                    self._timers.arm(ino, op, rung)
                case core.Drop(sid, why):
                    log.info("session %d ends: %s", sid, why)
                    self.hub.drop(sid)
                case core.Kill(sid):
                    self.kills += 1
                    self.hub.kill(sid)
                case core.Forget(sid):
                    self.hub.forget(sid)
                case core.Expire(ino):
                    self.backing.destroy(ino)
                    self.strays.forget(ino)
                    self.host_mapped.forget(ino)
                    self._on_expire(ino)
                case core.Stray(ino, start, end, what, holders):
                    self.incidents.add(
                        f"freed memory was touched: inode {ino} pages [{start:#x}, {end:#x}): "
                        f"{what}; held by {', '.join(holders) or 'nobody alive'}"
                    )
                case core.Note(text, True):
                    self.incidents.add(text)
                case core.Note(text):
                    log.info("%s", text)
        if touched and len(self._calls) > 1:  # more may come: a frame holds many records
            self.hub.flush_later(touched)
        elif touched:
            self.hub.flush(touched)
        if self._idle is not None and not any(self.owner.users.values()):
            self._idle.set()

    def _migrated(self, ino: int, moved: Moved) -> None:
        self.moves += 1
        self.strays.buried(ino, moved.old)
        call = self._calls.get(moved.op)
        if call is not None:
            call.moved = moved
        log.info("inode %d: extent %d has moved, %d pages", ino, moved.extent, moved.pages)

    def _answer(self, op: OpId, answer: core.Answer) -> None:
        call = self._calls.pop(op, None)
        if answer.errno == errno.EIO:
            self.failures += 1
            if call is not None:  # what led to it has been a warning already
                self.incidents.add(self._failure(call, answer.why), logging.INFO)
        elif answer.errno == errno.ENOSPC:
            self._complain(answer.why, logging.INFO)
        if call is not None:
            call.outcome = answer
            if call.event is not None:
                call.event.set()

    def _failure(self, call: Call, why: str) -> str:
        pid = thread_group(call.tid)
        names = [s.name for s in self.owner.sessions.values() if s.pid == pid]
        who = names[0] if names else f"process {pid}" if pid else "a caller of our own"
        return f"EIO to {who}: {call.request} on inode {call.ino}: {why}"

    def _work(self, work: core.Work) -> list[core.Effect]:
        """Perform a step now, or in a thread when it is long; return what follows now."""
        perform = work.perform
        told: list[core.Effect] = []
        if perform.step is Step.ALLOCATE:
            refused, told = self.strays.before(work)
            if refused:
                return [*told, *self.owner.performed(work.ino, perform.op, errno.EIO)]
        began = self._began.pop((work.ino, perform.op), None)
        if began is not None and perform.step is not Step.ALLOCATE:
            self.latencies.add(time.monotonic() - began)
        file = self.owner.files[work.ino]
        held = file.pages.range_cardinality(perform.start, perform.end)
        pages = perform.end - perform.start - held if perform.step is Step.ALLOCATE else held
        prompt = pages * extents.PAGE_SIZE <= self.backing.store.prompt
        if not prompt and self._nursery is not None:
            self._coming[perform.op] = 0 if perform.step is Step.FREE else pages
            self._nursery.start_soon(self._work_in_thread, work)
            return told
        call = self._calls.get(perform.op) if perform.kind is Kind.MIGRATE else None
        return [*told, *self._performed(work, *self._perform(work, call))]

    async def _work_in_thread(self, work: core.Work) -> None:
        op = work.perform.op
        with trio.CancelScope(shield=True):  # a freeing step, once begun, is always finished
            done = await trio.to_thread.run_sync(self._perform, work, self._calls.get(op))
        del self._coming[op]
        self._apply(self._performed(work, *done))

    def _performed(self, work: core.Work, failed: int, upto: int | None) -> list[core.Effect]:
        """Report a step; an allocation that ran out of something leaves nothing of itself."""
        ino, perform = work
        if perform.step is Step.ALLOCATE:
            self.backing.unclaim(perform.op)
            if failed and failed != errno.EINTR and upto is not None:
                upto = undo(self.backing, self.owner.files[ino], ino, perform, upto)
        return self.owner.performed(ino, perform.op, failed, upto)

    def _perform(self, work: core.Work, call: Call | None) -> tuple[int, int | None]:
        ino, (op, step, kind, start, end, dead) = work
        try:
            if kind is Kind.MIGRATE:
                return self._move(ino, work.perform, call)
            if step is Step.FREE:
                for index, _ in dead:
                    self.backing.kill(ino, index)
                if kind is not Kind.DESTROY:
                    self.backing.punch(ino, start, end)
                return 0, None
            return self._allocate(ino, op, start, end, call)
        except BackingError as error:
            self._complain(str(error), logging.WARNING)
            return error.errno, max(error.completed, start)
        except OSError as error:
            log.error("inode %d, pages [%#x, %#x): %s failed: %s", ino, start, end, step, error)
            return errno.EIO, None

    def _move(self, ino: int, perform: Perform, call: Call | None) -> tuple[int, int | None]:
        """Copy an extent, or let its copy be found and end it."""
        file = self.owner.files[ino]
        index = file.personality.layout.extent_of(perform.start)
        if perform.step is Step.FREE:
            self.backing.swap(ino, index)
            return 0, None

        def go_on(pages: int) -> bool:
            if perform.op in self._coming:
                self._coming[perform.op] -= pages
            if call is None:
                return True
            call.copied += pages
            return not call.interrupted

        try:
            copy_extent(self.backing, ino, index, file.pages, go_on)
        except BackingError as error:
            if call is not None:
                call.trouble = str(error)
            if error.errno == errno.EINTR:
                return errno.EINTR, None
            raise
        return 0, None

    def _allocate(
        self, ino: int, op: OpId, start: int, end: int, call: Call | None
    ) -> tuple[int, int | None]:
        """Allocate the chunks that lack pages; between two of them a signal is looked for.

        At least one chunk is made each time, so that a caller that repeats gets to the end.
        """
        self.backing.claim(op, ino, start, end)
        pages = self.owner.files[ino].pages  # only grows here while we are under way
        made = False
        for first, last in extents.chunks(start, end, self.backing.store.layout.pages):
            missing = last - first - pages.range_cardinality(first, last)
            if not missing:
                continue
            if call is not None and call.interrupted and made:
                return errno.EINTR, first
            self.backing.allocate(ino, first, last)
            made = True
            if op in self._coming:
                self._coming[op] -= missing
        return 0, None

    def _complain(self, text: str, level: int) -> None:
        """Log what ran out, seldom as a warning: whoever allocates can make it run out at will."""
        now = time.monotonic()
        if level >= logging.WARNING and now < self._quiet_until:
            level = logging.INFO
        elif level >= logging.WARNING:
            self._quiet_until = now + _COMPLAINT_SECONDS
        log.log(level, "%s", text)

    # --- time ---------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            ino, op, rung = await self._timers.next()
            waiting = self.owner.waiting_for(ino, op)
            self.hub.hear(waiting)  # who has answered must not be blamed for what we had not read
            waiting = self.owner.waiting_for(ino, op)
            if self._beyond_return(waiting):
                waiting = self.owner.waiting_for(ino, op)
            if not waiting:
                self._began.pop((ino, op), None)
                continue
            if rung is Rung.CONDEMN:
                calls = self._calls.values()
                self.owner.identify({c.op: thread_group(c.tid) for c in calls if c.tid})
            elif rung is Rung.GIVE_UP:
                self._fence_off(waiting)
            self._apply(self.owner.timer(ino, op, self._stopped(waiting)))

    def _fence_off(self, sids: frozenset[int]) -> None:
        """Do without the exit of the killed who run no more, where a fence stops the kernel."""
        if not isinstance(self.backing.store, Shmem):
            return  # userfaultfd knows other pages too, but no user fences them
        for sid in sids:
            peer = self.hub.peer(sid)
            if peer is not None and runs_no_more(peer.pid):
                self._apply(self.owner.fenced(sid))

    def _beyond_return(self, sids: frozenset[int]) -> bool:
        """Count as dead who has exited, and who cannot before we answer somebody; True if any."""
        peers = {sid: peer for sid in sids if (peer := self.hub.peer(sid)) is not None}
        found = [sid for sid, peer in peers.items() if peer.exited() or harmless(peer.pid)]
        for sid in found:
            self.exited(sid)
        return bool(found)

    def _stopped(self, sids: frozenset[int]) -> frozenset[int]:
        return frozenset(
            sid for sid in sids if (peer := self.hub.peer(sid)) is not None and peer.stopped()
        )
