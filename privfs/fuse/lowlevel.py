# SPDX-License-Identifier: GPL-2.0-or-later
"""pyfuse3 with what private memory files need: FALLOCATE, LSEEK, INTERRUPT, passthrough.

Importing this module loads pyfuse3 behind :mod:`privfs.fuse._lowlevel`; nothing else may import
pyfuse3 earlier (``from privfs.fuse.lowlevel import pyfuse3`` is always in order). A file system
derives from :class:`Operations` and is served by::

    lowlevel.init(ops, mountpoint, options, mode=lowlevel.Mode.PASSTHROUGH)
    try:
        await lowlevel.main()          # until unmounted or lowlevel.terminate()
    finally:
        lowlevel.close()

:func:`init` mounts, answers the kernel's INIT and so knows what was granted; call it in the process
that serves, after any fork. The thread that runs :func:`main` must never touch the mount: close(2)
of a file on it already waits for itself.

Every handler is called through a wrapper: an exception other than FUSEError, or a result of the
wrong type, is logged and answered with EIO. Left to pyfuse3 it would end the mount.

Extended attributes never reach Python. getxattr, setxattr and removexattr answer ENOSYS, which the
kernel remembers (EOPNOTSUPP for the caller, and no GETXATTR of security.capability before each
fallocate and truncate); listxattr answers an empty list.
"""

from __future__ import annotations

import enum
import errno
import functools
import logging
import os
import struct
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

if "pyfuse3" in sys.modules:
    raise ImportError(
        "pyfuse3 was imported before privfs.fuse.lowlevel, so it is bound to libfuse directly: "
        "fallocate, interrupts and passthrough would not work. Import privfs.fuse.lowlevel first."
    )

try:
    from privfs.fuse import _lowlevel
except ImportError as exc:
    raise ImportError(
        "privfs.fuse._lowlevel is not built for this Python. "
        "Build it with: pip install --no-build-isolation -e ."
    ) from exc

_lowlevel.join_global_scope()

import pyfuse3 as pyfuse3  # noqa: E402 - only now its references bind to ours
import trio  # noqa: E402
from pyfuse3 import FUSEError, RequestContext  # noqa: E402

from privfs.fuse.fastwait import LOAD, FastTrio  # noqa: E402

_libfuse_version = _lowlevel.bind_libfuse(str(pyfuse3.__file__))

#: The version of the libfuse that pyfuse3 uses.
LIBFUSE_VERSION = _libfuse_version

Request = _lowlevel.Request

log = logging.getLogger(__name__)

#: noexec makes mmap(PROT_EXEC) EPERM and execve EACCES, as guest_memfd's inodes do.
DEFAULT_OPTIONS = frozenset({"default_permissions", "noexec", "nosuid", "nodev"})

_INIT_TIMEOUT_MS = 10_000
_SIGKILL_BIT = 1 << 8  # signal 9 in the masks of proc(5)


class Mode(enum.Enum):
    """What a mount asks for its private files; see :class:`Status` for what it got."""

    PASSTHROUGH = "passthrough"
    """The kernel refuses: mmap ENODEV, read and write EINVAL; the daemon is not woken."""
    PASSTHROUGH_DIRECT_IO = "passthrough+direct_io"
    """mmap ENODEV in the kernel; READ and WRITE reach the daemon, which chooses the errno."""
    DIRECT_IO = "direct_io"
    """READ and WRITE reach the daemon; MAP_SHARED ENODEV; MAP_PRIVATE maps, SIGBUS on touch."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a mount got.

    ``passthrough_errno`` says why passthrough is not active: EPERM without CAP_SYS_ADMIN in the
    initial user namespace, EOPNOTSUPP before Linux 6.9 or without CONFIG_FUSE_PASSTHROUGH, ENOSYS
    without POSIX message queues, ENOSPC past fs.mqueue.queues_max; 0 if active or not asked for.
    ``daemon_reads`` says whether READ and WRITE of private files reach the handlers.
    """

    mode: Literal["passthrough", "direct_io"]
    daemon_reads: bool
    passthrough_errno: int
    libfuse: str
    pyfuse3: str
    protocol: tuple[int, int]
    kernel_protocol: tuple[int, int]


class Operations(pyfuse3.Operations):
    """Base class of a file system: pyfuse3's handlers and two more."""

    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        """Allocate, punch or zero bytes ``[offset, offset + length)`` of open file ``fh``.

        The kernel lets through only ``mode`` 0 and KEEP_SIZE, PUNCH_HOLE|KEEP_SIZE, ZERO_RANGE with
        or without KEEP_SIZE (fuse_file_fallocate), never a negative or overflowing range, but any
        size. The caller is :func:`current_request`. Errors by FUSEError; ENOSYS is answered as
        EOPNOTSUPP, since the kernel would never ask again on any file of the mount.
        """
        raise FUSEError(errno.EOPNOTSUPP)

    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        """Find data or a hole (``whence`` SEEK_DATA or SEEK_HOLE); return its offset in bytes.

        SEEK_SET and SEEK_CUR are answered by the kernel, SEEK_END by it after a getattr. Errors by
        FUSEError: ENXIO past the end. ENOSYS makes the kernel answer by itself from then on.
        """
        raise FUSEError(errno.EINVAL)


# ---- the request under way


def current_request() -> Request:
    """Return the request that the current task (or the handler that began it) works on.

    It names the caller: ``pid`` (a thread id), ``uid``, ``gid``; also where pyfuse3 passes no
    RequestContext. Raises LookupError outside a handler.
    """
    return _lowlevel.current.get()


@contextmanager
def interruptible() -> Iterator[trio.CancelScope]:
    """Cancel the block when FUSE_INTERRUPT comes for the current request.

    A caller in fallocate, setattr or read sends it on any signal, and on SIGSTOP. The handler
    decides what it means; EINTR is right only while nothing was changed::

        with lowlevel.interruptible() as scope:
            await acks
        if scope.cancelled_caught:
            raise FUSEError(errno.EINTR)

    An interrupt that came earlier cancels the block at its first checkpoint. Outside such a block
    interrupts are ignored, and the caller waits, even after SIGKILL, until it is answered. Outside
    a request (a handler called by a unit test) the scope is an ordinary one.
    """
    request = _lowlevel.current.get(None)
    scope = trio.CancelScope()
    if request is not None:
        if request.scopes is None:
            request.scopes = set()
        scopes: set[trio.CancelScope] = request.scopes  # type: ignore[assignment]
        scopes.add(scope)
        if request.interrupted:
            scope.cancel()
    try:
        with scope:
            yield scope
    finally:
        if request is not None:
            scopes.discard(scope)


def caller_killed(pid: int) -> bool:
    """Whether thread ``pid`` has SIGKILL pending, is a zombie or is gone.

    A killed caller stays in state D until its request is answered. A signal whose default action
    is to terminate counts: the kernel then leaves SIGKILL pending for every thread of the group
    (complete_signal); SIGUSR1 with a handler, or SIGSTOP, does not. Reads /proc/<tid>/status
    (proc(5), SigPnd and ShdPnd); no request into the mount. ``pid`` 0, a caller outside our pid
    namespace, is never reported as killed.
    """
    if pid <= 0:
        return False
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            fields = dict(line.split(b":", 1) for line in status.read().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = int(fields[b"SigPnd"], 16) | int(fields[b"ShdPnd"], 16)
    return bool(pending & _SIGKILL_BIT) or fields[b"State"].strip()[:1] in b"ZX"


def private_file(fh: int, backing: int = 0) -> pyfuse3.FileInfo:
    """Return what ``open`` or ``create`` of a private memory file must return.

    It marks the current request, so its reply carries the mode that the mount got. All opens of one
    inode must be alike (the kernel answers EIO to a mixture); other files return an ordinary
    pyfuse3.FileInfo. Private files send no FLUSH (FOPEN_NOFLUSH). The handler refuses O_DIRECT with
    EINVAL before (passthrough would answer EIO) and treats O_TRUNC itself: no setattr follows.

    With ``backing``, an id of :func:`back`, mmap is that of the file behind it, and READ and WRITE
    reach the handlers.
    """
    current_request().mark_private(fh, backing)
    return pyfuse3.FileInfo(fh=fh, direct_io=True, keep_cache=False)


def back(fd: int) -> int:
    """Let an open file be what is mapped of private files; return the id of that.

    Raises OSError: EOPNOTSUPP where the mount has no passthrough. The descriptor may be closed.
    """
    return _lowlevel.backing_open(fd)


def unback(backing: int) -> None:
    """Let no open use an id of :func:`back` any more; what is open or mapped stays."""
    _lowlevel.backing_close(backing)


class ReadThrottle:
    """Let READs through one per ``interval`` seconds when they come back to back.

    With direct_io, ``mmap(MAP_PRIVATE|MAP_POPULATE)`` of a file whose READs fail repeats READ
    without end inside the kernel (populate_vma_page_range, filemap_fault), whatever the errno,
    until a fatal signal. A ``read`` handler that only refuses awaits :meth:`wait` first.
    Passthrough is immune.
    """

    def __init__(self, interval: float = 0.02) -> None:
        self._interval = interval
        self._next = float("-inf")

    async def wait(self) -> None:
        """Wait for this READ's turn. Raises FUSEError(EINTR) when the caller is interrupted."""
        now = trio.current_time()
        turn = max(now, self._next)
        self._next = turn + self._interval
        if turn == now:
            return
        with interruptible() as scope:
            await trio.sleep_until(turn)
        if scope.cancelled_caught:
            raise FUSEError(errno.EINTR)


# ---- handlers as pyfuse3 calls them

_ENTRY = (pyfuse3.EntryAttributes,)
_ANY = (object,)
#: What pyfuse3 does with each handler's result; a tuple of two is a pair.
_RESULTS: dict[str, tuple[type, ...]] = {
    "lookup": _ENTRY,
    "getattr": _ENTRY,
    "setattr": _ENTRY,
    "mknod": _ENTRY,
    "mkdir": _ENTRY,
    "symlink": _ENTRY,
    "link": _ENTRY,
    "readlink": (bytes,),
    "unlink": _ANY,
    "rmdir": _ANY,
    "rename": _ANY,
    "open": (pyfuse3.FileInfo,),
    "create": (pyfuse3.FileInfo, pyfuse3.EntryAttributes),
    "read": (bytes,),
    "write": (int,),
    "flush": _ANY,
    "release": _ANY,
    "fsync": _ANY,
    "opendir": (int,),
    "readdir": _ANY,
    "releasedir": _ANY,
    "fsyncdir": _ANY,
    "statfs": (pyfuse3.StatvfsData,),
    "access": _ANY,
    "poll": (int,),
    "fallocate": _ANY,
    "lseek": (int,),
}


async def _answer(name: str, handler: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Call a handler; whatever goes wrong becomes a FUSEError."""
    LOAD.handlers += 1
    try:
        result = await handler(*args)
        expected = _RESULTS[name]
        parts = result if len(expected) > 1 else (result,)
        if not all(isinstance(p, t) for p, t in zip(parts, expected, strict=True)):
            raise TypeError(f"{name} returned {result!r}, not {expected}")
    except FUSEError:
        raise
    except Exception:
        log.exception("handler %s failed: the caller gets EIO, the mount goes on", name)
        raise FUSEError(errno.EIO) from None
    finally:
        LOAD.handlers -= 1
    return result


class _Served(pyfuse3.Operations):
    """An Operations as pyfuse3 meets it: guarded, and with the two requests that are disguised."""

    def __init__(self, ops: Operations) -> None:
        self._ops = ops
        self.supports_dot_lookup = ops.supports_dot_lookup
        self.enable_writeback_cache = False  # excludes passthrough
        self.enable_acl = False  # needs extended attributes
        for name in _RESULTS:
            setattr(self, name, functools.partial(_answer, name, getattr(ops, name)))

    def init(self) -> None:
        self._ops.init()

    def stacktrace(self) -> None:
        self._ops.stacktrace()

    async def forget(self, inode_list: Any) -> None:
        try:
            await self._ops.forget(inode_list)
        except Exception:  # FORGET has no answer
            log.exception("handler forget failed: the mount goes on")

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        try:
            await _answer("fallocate", self._ops.fallocate, *current_request().args)
        except FUSEError as exc:
            if exc.errno == errno.ENOSYS:
                raise FUSEError(errno.EOPNOTSUPP) from exc
            raise

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        offset = await _answer("lseek", self._ops.lseek, *current_request().args)
        return struct.pack("=q", offset)  # struct fuse_lseek_out


# ---- the life of a mount

_status: Status | None = None


def init(
    ops: Operations,
    mountpoint: str,
    options: Collection[str] = DEFAULT_OPTIONS,
    *,
    mode: Mode = Mode.PASSTHROUGH,
    seekable: bool = True,
) -> Status:
    """Mount ``ops`` on ``mountpoint``, answer the kernel's INIT and say what was granted.

    ``options`` are libfuse's mount options. Where passthrough is not possible the mount falls back
    to direct_io; :class:`Status` says why. Without ``seekable`` lseek, pread and pwrite of private
    files are ESPIPE, as of files that have no llseek; passthrough cannot be told so
    (FOPEN_PASSTHROUGH_MASK, fs/fuse/passthrough.c) and leaves them seekable.

    Raises RuntimeError when pyfuse3 does not go through this module or the mount fails; then
    nothing stays mounted.
    """
    global _status
    _lowlevel.arm(mode is not Mode.DIRECT_IO, mode is Mode.PASSTHROUGH_DIRECT_IO, seekable)
    mounted = False
    try:
        pyfuse3.init(_Served(ops), mountpoint, set(options))
        mounted = True
        if not _lowlevel.attached():
            raise RuntimeError(
                f"pyfuse3 {pyfuse3.__version__} does not call libfuse {_libfuse_version} through "
                f"privfs.fuse._lowlevel: {pyfuse3.__file__} seems to be linked with -Bsymbolic or "
                "a static libfuse. Install pyfuse3 from its source against the shared libfuse3."
            )
        try:
            reason, protocol, kernel = _lowlevel.serve_init(_INIT_TIMEOUT_MS)
        except OSError as exc:
            raise RuntimeError(
                f"mounting {mountpoint}: the FUSE INIT exchange failed ({exc.strerror}); "
                f"libfuse {_libfuse_version}, pyfuse3 {pyfuse3.__version__}, "
                f"kernel {os.uname().release}. See dmesg."
            ) from exc
    except BaseException:
        _lowlevel.disarm()
        if mounted:
            pyfuse3.close()
        raise
    active = mode is not Mode.DIRECT_IO and not reason
    _status = Status(
        mode="passthrough" if active else "direct_io",
        daemon_reads=not active or mode is Mode.PASSTHROUGH_DIRECT_IO,
        passthrough_errno=reason,
        libfuse=_libfuse_version,
        pyfuse3=str(pyfuse3.__version__),
        protocol=protocol,
        kernel_protocol=kernel,
    )
    return _status


def status() -> Status:
    """Return what the mount got. Raises RuntimeError before :func:`init`."""
    if _status is None:
        raise RuntimeError("no mount: call lowlevel.init() first")
    return _status


async def main(max_tasks: int = 1000) -> None:
    """Serve requests, ``max_tasks`` at a time, until unmounted or :func:`terminate`."""
    await pyfuse3.main(min_tasks=1, max_tasks=max_tasks)


def terminate() -> None:
    """End :func:`main` once the requests under way are answered. Call on the thread of trio.

    No INTERRUPT can arrive any more, so the :func:`interruptible` blocks are cancelled as if each
    caller had sent one; other handlers are waited for. To leave without waiting, cancel the scope
    around :func:`main` instead: then :func:`close` gives their callers ECONNABORTED.
    """
    pyfuse3.terminate()
    _lowlevel.interrupt_all()


def close(unmount: bool = True) -> None:
    """Unmount (unless told not to) and forget the mount; requests under way get ECONNABORTED."""
    global _status
    _status = None
    _lowlevel.disarm()
    pyfuse3.close(unmount=unmount)


def glance(fds: tuple[int, ...], microseconds: int) -> int:
    """Wait until one of ``fds`` can be read: 0 if none, -1 if a system call came first."""
    return _lowlevel.glance(fds, microseconds)


def install_fastwait(spin_us: int = 50) -> None:
    """Take requests that arrive back to back without sleeping between them.

    Spins up to ``spin_us`` microseconds, only while requests keep arriving; other trio tasks wait
    at most about a millisecond. Call before :func:`main`.
    """
    vars(pyfuse3)["trio"] = FastTrio(spin_us)
