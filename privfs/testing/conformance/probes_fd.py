# SPDX-License-Identifier: GPL-2.0-or-later
"""Probes of the descriptor: flags, reopening, seals, rights that travel, locks, waiting."""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterator

from privfs.testing.conformance.row import PAGE
from privfs.testing.conformance.subject import Subject
from privfs.testing.conformance.syscalls import Argument, Nr, buffer, call, errno_name

#: asm-generic/fcntl.h; Python's os.O_LARGEFILE is 0 on x86-64.
O_LARGEFILE, O_DIRECT, O_NOATIME = 0o100000, 0o40000, 0o1000000
_FLAGS = {
    0o2000: "APPEND", 0o4000: "NONBLOCK", 0o20000: "ASYNC",
    O_DIRECT: "DIRECT", O_LARGEFILE: "LARGEFILE", O_NOATIME: "NOATIME", 0o10000000: "PATH",
}  # fmt: skip


def _names(flags: int) -> str:
    access = ("RDONLY", "WRONLY", "RDWR", "NOTHING")[flags & 3]
    return "|".join([access, *(name for bit, name in _FLAGS.items() if flags & bit)])


def flags(f: Subject) -> str:
    """F_GETFL."""
    return _names(call(Nr.FCNTL, f.fd, fcntl.F_GETFL, 0))


def close_on_exec(f: Subject) -> int:
    """F_GETFD."""
    return call(Nr.FCNTL, f.fd, fcntl.F_GETFD, 0)


def set_flags(f: Subject, added: int) -> str:
    """F_SETFL, then a punch, which no flag may disturb."""
    call(Nr.FCNTL, f.fd, fcntl.F_SETFL, os.O_RDWR | added)
    return _punch(f.fd)


def _punch(fd: int) -> str:
    try:
        call(Nr.FALLOCATE, fd, 3, 0, PAGE)
    except OSError as error:
        return f"punch {errno_name(error.errno or 0)}"
    return "0"


def reopen(f: Subject, how: int) -> str:
    """open(2) of /proc/self/fd/N; what F_GETFL shows of the new description."""
    return _names(fcntl.fcntl(os.open(f.proc, how, 0o600), fcntl.F_GETFL))


def reopen_and(f: Subject, how: int, then: str) -> str:
    """Reopen, then use the new description."""
    fd = os.open(f.proc, how)
    if then == "size":
        return f"size={os.fstat(fd).st_size}"
    calls: dict[str, tuple[Nr, *tuple[Argument, ...]]] = {
        "read": (Nr.READ, buffer(8), 8),
        "write": (Nr.WRITE, b"x", 1),
        "punch": (Nr.FALLOCATE, 3, 0, PAGE),
        "truncate": (Nr.FTRUNCATE, 0),
    }
    number, *arguments = calls[then]
    return str(call(number, fd, *arguments))


# --- seals -------------------------------------------------------------------------------------


def get_seals(f: Subject) -> str:
    """F_GET_SEALS."""
    return f"{call(Nr.FCNTL, f.fd, 1034, 0):#x}"


def add_seals(f: Subject, seals: int) -> int:
    """F_ADD_SEALS."""
    return call(Nr.FCNTL, f.fd, 1033, seals)


# --- rights travel ------------------------------------------------------------------------------


def _rights(fd: int) -> str:
    """What a descriptor may: punch, and whether it reads."""
    try:
        call(Nr.READ, fd, buffer(8), 8)
        reading = "succeeds"
    except OSError as error:
        reading = errno_name(error.errno or 0)
    return f"punch {_punch(fd).removeprefix('punch ')}, read {reading}"


def duplicated(f: Subject) -> str:
    """Use what dup(2) gave."""
    return _rights(os.dup(f.fd))


def inherited(f: Subject) -> str:
    """Use the descriptor in a child of fork(2)."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.write(theirs, _rights(f.fd).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(ours, 100).decode()


def sent(f: Subject) -> str:
    """Use what SCM_RIGHTS gave."""
    left, right = socket.socketpair()
    left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [f.fd]))])
    _, ancillary, _, _ = right.recvmsg(1, 64)
    (fd,) = struct.unpack("i", ancillary[0][2])
    return _rights(fd)


def fetched(f: Subject) -> str:
    """Use what pidfd_getfd(2) gave."""
    return _rights(call(Nr.PIDFD_GETFD, os.pidfd_open(os.getpid()), f.fd, 0))


# --- locks, leases, notification ------------------------------------------------------------------


def record_lock(
    f: Subject,
    command: int,
    kind: int,
    start: int = 0,
    length: int = PAGE,
    whence: int = os.SEEK_SET,
) -> int:
    """F_SETLK, F_GETLK or F_OFD_SETLK, of the first page unless told otherwise."""
    lock = struct.pack("hhlli4x", kind, whence, start, length, 0)
    return call(Nr.FCNTL, f.fd, command, ctypes.create_string_buffer(lock, len(lock)))


def conflicting_locks(f: Subject, command: int) -> int:
    """A write lock of all through the descriptor, then through another open of the file."""
    again = os.open(f.proc, os.O_RDWR)
    for fd in (f.fd, again):
        lock = struct.pack("hhlli4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        call(Nr.FCNTL, fd, command, ctypes.create_string_buffer(lock, len(lock)))
    return 0


def signal_of(f: Subject) -> int:
    """F_SETSIG, then F_GETSIG."""
    call(Nr.FCNTL, f.fd, 10, 12)
    return call(Nr.FCNTL, f.fd, 11, 0)


def same_file(f: Subject) -> int:
    """F_DUPFD_QUERY of a duplicate."""
    return call(Nr.FCNTL, f.fd, 1027, os.dup(f.fd))


def flock(f: Subject, operation: int) -> int:
    """flock(2)."""
    return call(Nr.FLOCK, f.fd, operation)


def lease(f: Subject, kind: int) -> int:
    """F_SETLEASE."""
    return call(Nr.FCNTL, f.fd, fcntl.F_SETLEASE, kind)


def command(f: Subject, number: int, argument: int) -> int:
    """Any other fcntl(2) with a number."""
    return call(Nr.FCNTL, f.fd, number, argument)


def write_hint(f: Subject, command: int, hint: int = 2) -> int:
    """F_SET_RW_HINT or F_GET_RW_HINT."""
    return call(Nr.FCNTL, f.fd, command, ctypes.create_string_buffer(struct.pack("Q", hint), 8))


def poll(f: Subject) -> str:
    """poll(2) for everything, without waiting."""
    poller = select.poll()
    poller.register(f.fd, 0x3FFF)
    names = {1: "IN", 2: "PRI", 4: "OUT", 8: "ERR", 16: "HUP", 64: "RDNORM", 256: "WRNORM"}
    ready = poller.poll(0)
    found = ready[0][1] if ready else 0
    return "|".join(name for bit, name in names.items() if found & bit) or "nothing"


def epoll(f: Subject) -> str:
    """epoll_ctl(2) EPOLL_CTL_ADD."""
    with select.epoll() as waiting:
        waiting.register(f.fd, select.EPOLLIN)
    return "0"


@contextlib.contextmanager
def _watch(f: Subject, mask: int) -> Iterator[int]:
    fd = call(Nr.INOTIFY_INIT1, os.O_NONBLOCK)
    call(Nr.INOTIFY_ADD_WATCH, fd, os.fsencode(f.proc), mask)
    yield fd
    os.close(fd)


def inotify(f: Subject) -> str:
    """inotify_add_watch(2), and whether a punch is an event."""
    with _watch(f, 0x2 | 0x4) as fd:  # IN_MODIFY | IN_ATTRIB
        call(Nr.FALLOCATE, f.fd, 3, 0, PAGE)
        try:
            (mask,) = struct.unpack_from("=I", os.read(fd, 4096), 4)
        except BlockingIOError:
            return "silent"
    return {2: "MODIFY", 4: "ATTRIB"}.get(mask, hex(mask))


def directory(f: Subject, what: str) -> int:
    """What only directories can do."""
    if what == "fchdir":
        return call(Nr.FCHDIR, f.fd)
    return call(Nr.GETDENTS, f.fd, buffer(512), 512)
