# SPDX-License-Identifier: GPL-2.0-or-later
"""The user's socket, served by a plain thread that acknowledges invalidations.

The lane makes no call into any mount and holds no lock while it waits, so that nothing which
waits for the owner can keep it from answering.  What an invalidation means for the process is the
business of its :class:`Mmu`; faults and other requests are made from any other thread.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from privfs.notifier.fds import FrameLost, close_later, receive_frame, send_frame
from privfs.notifier.user import (
    Closed,
    ExtentArrived,
    Granted,
    Happening,
    Opened,
    Registered,
    Replied,
    User,
    Zap,
)
from privfs.notifier.wire import FD, Fence, Record, To, WireError, pack, parse
from privfs.seals import ALL_PURPOSES

log = logging.getLogger(__name__)

#: Where a mount keeps its socket.
SOCKET: Final = ".privfs/socket"
#: Seconds that :meth:`Lane.close` waits for the owner's last answers.
_PATIENCE: Final = 10.0


class Mmu(Protocol):
    """What the process does about pages.  ``lock`` is KVM's ``mmu_lock``."""

    lock: threading.Lock

    def extent_arrived(self, extent: ExtentArrived, fd: int) -> None:
        """Take over the memfd of an extent (lock held; ``fd`` is the callee's to close)."""

    def zap(self, zap: Zap) -> object:
        """Make a range unreachable for all that starts from now on (lock held).

        Returns a ticket for :meth:`drain`.
        """

    def drain(self, tickets: list[object]) -> None:
        """Wait until nothing that started before the zaps is under way (no lock held).

        Unmaps what died with them.  On return the acknowledgements are sent.
        """

    def granted(self, granted: Granted) -> None:
        """Finish a fault (lock held)."""

    def denied(self, req: int, status: int) -> None:
        """Fail a fault (lock held)."""

    def lost(self, why: str) -> None:
        """Learn that no invalidation can come any more: stop using every page (no lock held)."""


class LinkError(OSError):
    """The owner refused a request, or is gone; ``errno`` says why."""


class NoMountAbove(LinkError):
    """A path does not lie in a privfs mount; the text says what to do next too."""


def find_socket(path: str | os.PathLike[str], name: str = SOCKET) -> str:
    """Return the socket ``name`` of the privfs mount that holds ``path``; NoMountAbove."""
    place = Path(path).resolve()
    for folder in (place, *place.parents):
        candidate = folder / name
        if candidate.is_socket():
            return str(candidate)
        if os.path.ismount(folder):
            break
    what = f"does not lie in a privfs mount: no {name} above it"
    raise NoMountAbove(
        errno.ENOTCONN,
        f"{path} {what if place.exists() else 'does not exist'}; "
        "privfs status shows the mounts, privfs mount DIR makes one",
    )


class Lane:
    """One session with the owner of a mount.

    Create it, then :meth:`start`; requests may be made from any thread but the lane's own.
    """

    def __init__(self, mmu: Mmu, user: User | None = None) -> None:
        self.user = user or User()
        self.session = 0
        self._mmu = mmu
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._thread: threading.Thread | None = None
        self._answers: dict[int, Happening] = {}
        self._answered = threading.Condition(mmu.lock)
        self._gone = ""
        self._leaving = False

    @property
    def alive(self) -> bool:
        """True while the owner answers."""
        return not self._gone

    def start(
        self,
        path: str,
        label: str = "",
        replaces: int = 0,
        fence: Fence = Fence.NONE,
        userfault: int = -1,
    ) -> None:
        """Connect to the socket at ``path`` and say HELLO; raises LinkError when refused.

        ``replaces`` is the ``session`` of a lane that broke, everything of which is unmapped.
        ``fence`` covers all that will be mapped; ``userfault`` is its descriptor if it is a
        userfaultfd, of which the owner gets a copy.
        """
        try:
            connect(self._sock, path)
            self._thread = threading.Thread(target=self._run, name=f"lane {label}", daemon=True)
            self._thread.start()
            fds = [userfault] if fence is Fence.UFFD else []
            opened = self._ask(lambda: self.user.hello(label, replaces, fence), fds)
            assert isinstance(opened, Opened)
            if opened.status:
                why = os.strerror(opened.status)
                raise LinkError(opened.status, f"{path}: the session was refused: {why}")
        except BaseException:
            self.close()
            raise
        self.session = opened.session

    # --- requests -----------------------------------------------------------------------------

    def register(
        self, fd: int, purpose: int = ALL_PURPOSES, *, exclusive: bool = False
    ) -> Registered:
        """Become a user of the private file behind ``fd``, which stays the caller's to close.

        ``purpose`` is what the file is to be for; EINVAL if its first user wanted another.
        ``exclusive``: no other session has the file meanwhile; EBUSY if one has it now, or has it
        exclusively.
        """
        answer = self._ask(lambda: self.user.register(purpose, exclusive=exclusive), [fd])
        assert isinstance(answer, Registered)
        if answer.status:
            raise LinkError(
                answer.status, "the owner refused the file: " + os.strerror(answer.status)
            )
        return answer

    def unregister(self, ino: int) -> None:
        """Stop using a file; everything of it must be unmapped already."""
        self._ask(lambda: self.user.unregister(ino))

    def allocate(self, ino: int, start: int, end: int) -> None:
        """Allocate file pages ``[start, end)``."""
        self._call(lambda: self.user.allocate(ino, start, end), "allocate", start, end)

    def punch(self, ino: int, start: int, end: int) -> None:
        """Punch file pages ``[start, end)``; the zap comes to this process like any other."""
        self._call(lambda: self.user.punch(ino, start, end), "punch", start, end)

    def get(
        self, ino: int, page: int, start: int, end: int, *, write: bool, again: bool = False
    ) -> Record:
        """Begin a fault with ``mmu.lock`` held; :meth:`send` the record without it.

        ``mmu.granted`` or ``mmu.denied`` ends the request that the record numbers.
        """
        self._check()
        return self.user.get(ino, page, start, end, write=write, again=again)

    def send(self, record: Record) -> None:
        """Send a record made by :meth:`get`; no lock may be held."""
        self._send([record], [])

    def close(self) -> None:
        """Say BYE and end the thread; every file must be unregistered."""
        if self._thread is None:
            self._sock.close()
            return
        self._leaving = True
        if not self._gone:
            try:
                self._send([self.user.bye()], [])
                self._sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                log.debug("the owner was gone before BYE: %s", error)
        self._thread.join(_PATIENCE)
        self._sock.close()

    def _call(self, make: Callable[[], Record], what: str, start: int, end: int) -> None:
        answer = self._ask(make)
        assert isinstance(answer, Replied)
        if answer.status:
            why = f"{what} pages [{start:#x}, {end:#x}): {os.strerror(answer.status)}"
            raise LinkError(answer.status, why)

    def _ask(self, make: Callable[[], Record], fds: list[int] | None = None) -> Happening:
        """Send a request and wait for its answer."""
        with self._mmu.lock:
            self._check()
            record = make()
        self._send([record], fds or [])
        with self._mmu.lock:
            while record.req not in self._answers:
                self._check()
                self._answered.wait()
            return self._answers.pop(record.req)

    def _check(self) -> None:
        if self._gone:
            raise LinkError(errno.ENOTCONN, f"no owner: {self._gone}")

    def _send(self, records: list[Record], fds: list[int]) -> None:
        try:
            send_frame(self._sock, pack(records), fds)
        except OSError as error:
            why = f"no owner: {error.strerror}"
            raise LinkError(error.errno or errno.ENOTCONN, why) from error

    # --- the lane -----------------------------------------------------------------------------

    def _run(self) -> None:
        why = "the owner closed the session"
        try:
            while self._turn():
                pass
        except (OSError, FrameLost, WireError) as error:
            why = str(error)
        except Exception as error:  # nothing would be zapped any more: say so, rather than vanish
            log.exception("session %d: the lane failed", self.session)
            why = f"internal error: {error}"
        with self._mmu.lock:
            self._gone = why
            self._answered.notify_all()
        if not self._leaving:
            self._mmu.lost(why)

    def _turn(self) -> bool:
        """Take one frame: all zaps first, then one wait, then one frame of acknowledgements."""
        frame, fds = receive_frame(self._sock)
        if not frame:
            return False
        zaps: list[Zap] = []
        tickets: list[object] = []
        open_end = True
        lent = deque(fds)
        try:
            with self._mmu.lock:
                for record in parse(frame, To.USER):
                    fd = lent.popleft() if record.flags & FD and lent else None
                    open_end = self._take(record, fd, zaps, tickets) and open_end
                if self._answers:
                    self._answered.notify_all()
        finally:
            close_later(list(lent))  # what nobody took
        if zaps:
            self._mmu.drain(tickets)
            self._send([self.user.ack(zap.seq) for zap in zaps], [])
        return open_end

    def _take(self, record: Record, fd: int | None, zaps: list[Zap], tickets: list[object]) -> bool:
        happening = self.user.received(record)
        match happening:
            case Zap():
                zaps.append(happening)
                tickets.append(self._mmu.zap(happening))
            case ExtentArrived():
                if fd is None:
                    raise WireError("EXTENT came without its descriptor")
                self._mmu.extent_arrived(happening, fd)
            case Granted():
                self._mmu.granted(happening)
            case Closed():
                return False
            case Opened() | Registered() | Replied():
                self._answers[happening.req] = happening
            case _:
                self._mmu.denied(happening.req, happening.status)
        return True


def connect(sock: socket.socket, path: str) -> None:
    """Connect, also where ``path`` is longer than the 107 bytes of ``sun_path``."""
    try:
        folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        finally:
            os.close(folder)
    except OSError as error:
        raise LinkError(
            error.errno or errno.ENOTCONN, f"cannot reach the owner at {path}: {error.strerror}"
        ) from error
