# SPDX-License-Identifier: GPL-2.0-or-later
"""File descriptors that cross a socket: frames with SCM_RIGHTS, identity, peers.

Nothing here calls into a FUSE mount: a descriptor received from a peer may belong to the very
mount that this process serves, where a request would wait for ourselves.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import queue
import select
import signal
import socket
import stat
import struct
import threading
from dataclasses import dataclass

from privfs.notifier.wire import MAX_FDS, MAX_FRAME

SO_PEERPIDFD = 77  # Linux 6.5
_O_PATH = os.O_PATH
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_BASIC = 0x7FF
_STATX_SIZE = 256
_CMSG_ROOM = socket.CMSG_SPACE(4 * MAX_FDS)

_libc = ctypes.CDLL(None, use_errno=True)


class FrameLost(Exception):
    """Descriptors were cut off a frame (MSG_CTRUNC): this process is out of descriptors."""


def send_frame(sock: socket.socket, frame: bytes, fds: list[int]) -> None:
    """Send one frame with its descriptors.  Raises BlockingIOError when there is no room."""
    if fds:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        sock.sendmsg([frame], [rights])
    else:
        sock.send(frame)


def receive_frame(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one frame and its descriptors, close-on-exec; ``b""`` is the end of the session.

    Raises FrameLost, having closed what did arrive, and BlockingIOError as the socket does.
    """
    data, ancillary, flags, _ = sock.recvmsg(MAX_FRAME, _CMSG_ROOM, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += array.array("i", payload[: len(payload) // 4 * 4])
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        close_later(fds)
        raise FrameLost("frame or its descriptors were cut: raise the limit on open files")
    return data, fds


@dataclass(frozen=True, slots=True)
class Identity:
    """What a received descriptor is, found out without a request to its filesystem."""

    dev: int
    ino: int
    mode: int
    flags: int  #: as fcntl(F_GETFL)

    @property
    def writable(self) -> bool:
        """True if the descriptor was opened for writing."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY


def identify(fd: int) -> Identity:
    """Identify a descriptor by statx(2) with AT_STATX_DONT_SYNC and by its fdinfo."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    if _libc.statx(fd, b"", flags, _STATX_BASIC, buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    mode = struct.unpack_from("<H", buffer, 0x1C)[0]
    ino = struct.unpack_from("<Q", buffer, 0x20)[0]
    major, minor = struct.unpack_from("<II", buffer, 0x88)
    with open(f"/proc/self/fdinfo/{fd}") as info:
        opened = next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))
    return Identity(os.makedev(major, minor), ino, mode, opened)


def check_private_file(identity: Identity, dev: int) -> int:
    """Return 0 if a descriptor may name a private file of mount ``dev``, else an errno."""
    if identity.dev != dev:
        return errno.EXDEV
    if stat.S_ISDIR(identity.mode):
        return errno.EISDIR
    if not stat.S_ISREG(identity.mode):
        return errno.EINVAL
    if identity.flags & _O_PATH:
        return errno.EBADF
    return 0


def is_userfault(fd: int) -> bool:
    """Return True if a descriptor is a userfaultfd(2), by its link in /proc, which asks nobody."""
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"


class _Closer:
    """Closes descriptors in an expendable thread: a close may send FLUSH to ourselves."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def __call__(self, fds: list[int]) -> None:
        if not fds:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="closer", daemon=True)
                self._thread.start()
        for fd in fds:
            self._queue.put(fd)

    def _run(self) -> None:
        while True:
            try:
                os.close(self._queue.get())
            except OSError:
                continue  # the error of a close concerns its writer, not us


close_later = _Closer()


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a socket; ``pidfd`` is ours to close."""

    pid: int
    uid: int
    pidfd: int

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """Identify the peer, race-free where SO_PEERPIDFD exists, else by its pid."""
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _ = struct.unpack("iII", raw)
        try:
            pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError:
            pidfd = os.pidfd_open(pid)
        os.set_inheritable(pidfd, False)
        return cls(pid, uid, pidfd)

    def may_kill(self) -> bool:
        """True if this process may send signals to the peer."""
        try:
            signal.pidfd_send_signal(self.pidfd, 0)
        except PermissionError:
            return False
        except ProcessLookupError:
            return True
        return True

    def kill(self) -> None:
        """Send SIGKILL; a peer that is gone already, or became another user's, is no error."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def exited(self) -> bool:
        """True if the peer is dead, whether or not anybody has been told."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def stopped(self) -> bool:
        """True while the peer is stopped by a signal or a debugger."""
        return process_state(self.pid) in ("T", "t")


def process_state(pid: int) -> str:
    """Return the state letter of /proc/PID/stat, ``""`` for a process that is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def thread_group(tid: int) -> int:
    """Return the process id (Tgid) of a thread, or ``tid`` itself when it is gone."""
    try:
        with open(f"/proc/{tid}/status") as file:
            for line in file:
                if line.startswith("Tgid:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return tid
