# SPDX-License-Identifier: GPL-2.0-or-later
"""A pyfuse3 adapter and nothing more: requests in, names and memory asked, replies out.

Names belong to :class:`~privfs.namespace.Namespace`, pages to :class:`~privfs.service.Service`;
both refuse by raising, and :func:`_translated` turns that into an errno.  All handlers run in one
trio task each on one thread; only those that change memory ever wait.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ParamSpec, TypeVar

import trio

from privfs.fuse import lowlevel
from privfs.fuse.live import LiveFiles
from privfs.fuse.lowlevel import pyfuse3
from privfs.fuse.scans import Scans
from privfs.inode import Attributes, Kind, NamespaceError
from privfs.namespace import Namespace
from privfs.notifier.fds import thread_group
from privfs.operation import Fallocate, Request, Resize
from privfs.personality import (
    FALLOC_FL_KEEP_SIZE,
    PAGE_SIZE,
    Refused,
    metadata_rule,
)
from privfs.service import Call, Service

from pyfuse3 import EntryAttributes, FUSEError, RequestContext, SetattrFields  # isort: skip

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: Names change only through the kernel, so it may remember them; sizes and blocks do not.
_ENTRY_SECONDS = 60.0
_KILL_POLL = 0.05


def _translated(
    handler: Callable[_P, Coroutine[Any, Any, _T]],
) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """Turn the refusals of the cores into what pyfuse3 answers."""

    @functools.wraps(handler)
    async def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return await handler(*args, **kwargs)
        except (Refused, NamespaceError) as refused:
            log.debug("%s: %s", handler.__name__, refused)  # the caller sees no more than an errno
            raise FUSEError(refused.errno) from refused

    return guarded


class Files(lowlevel.Operations):
    """The file system of one mount.  Handles of private files are their inode numbers."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, names: Namespace, service: Service, live: LiveFiles) -> None:
        super().__init__()
        self._names = names
        self._service = service
        self._live = live
        self._scans = Scans(names)
        self._throttle = lowlevel.ReadThrottle()
        self._personality = service.owner.personality

    # --- names --------------------------------------------------------------------------------

    @_translated
    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self._names.lookup(parent, name))

    @_translated
    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        ours = parent == self._names.reserved_ino and thread_group(ctx.pid) == os.getpid()
        made = self._names.mknod(parent, name, mode, ctx.uid, ctx.gid, _now(), trusted=ours)
        return self._attributes(self._born(made))

    @_translated
    async def mkdir(
        self, parent: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        return self._attributes(self._names.mkdir(parent, name, mode, ctx.uid, ctx.gid, _now()))

    @_translated
    async def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        made = self._names.symlink(parent, name, target, ctx.uid, ctx.gid, _now())
        return self._attributes(made)

    @_translated
    async def readlink(self, ino: int, ctx: RequestContext) -> bytes:
        return self._names.readlink(ino)

    @_translated
    async def link(
        self, ino: int, new_parent: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._attributes(self._names.link(ino, new_parent, new_name, _now()))

    @_translated
    async def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        self._bury(self._names.unlink(parent, name, _now()).dead)

    @_translated
    async def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        self._bury(self._names.rmdir(parent, name, _now()).dead)

    @_translated
    async def rename(
        self,
        parent_old: int,
        name_old: bytes,
        parent_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        removal = self._names.rename(parent_old, name_old, parent_new, name_new, flags, _now())
        if removal is not None:
            self._bury(removal.dead)

    @_translated
    async def opendir(self, ino: int, ctx: RequestContext) -> int:
        return self._scans.open(ino)

    @_translated
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        for entry in self._scans.read(fh, start_id):
            attributes = self._attributes(self._names.attributes(entry.ino))
            if not pyfuse3.readdir_reply(token, entry.name, attributes, entry.cookie):
                return
            if entry.name not in (b".", b".."):
                self._names.remember(entry.ino)

    @_translated
    async def releasedir(self, fh: int) -> None:
        self._bury(self._scans.close(fh))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for ino, lookups in inode_list:
            try:
                self._bury(self._names.forget(ino, lookups))
            except NamespaceError as refused:  # has no answer; the others count
                log.info("%s", refused)

    @_translated
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        budget = self._service.owner.budget
        free = max(budget.total - budget.used, 0)
        reply = pyfuse3.StatvfsData()
        reply.f_bsize = self._service.owner.personality.page_size
        reply.f_frsize = PAGE_SIZE
        reply.f_blocks, reply.f_bfree, reply.f_bavail = budget.total, free, free
        reply.f_files = self._names.inode_limit
        reply.f_ffree = reply.f_favail = self._names.inode_limit - self._names.inode_count
        reply.f_namemax = 255
        return reply

    # --- attributes ---------------------------------------------------------------------------

    @_translated
    async def getattr(self, ino: int, ctx: RequestContext) -> EntryAttributes:
        self._service.host_mapped.adopt(ino)
        return self._attributes(self._names.attributes(ino))

    @_translated
    async def setattr(
        self, ino: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:  # fmt: skip
        atime_ns = _time(attr.st_atime_ns) if fields.update_atime else None
        mtime_ns = _time(attr.st_mtime_ns) if fields.update_mtime else None
        if ino in self._service.owner.files:
            if fields.update_size:
                await self._call(ino, Resize(attr.st_size))
                self._names.modified(ino, _now())
            elif fields.update_mode:
                metadata_rule(self._personality, "chmod")
            elif fields.update_uid or fields.update_gid:
                metadata_rule(self._personality, "chown")
            elif fields.update_atime or fields.update_mtime:
                metadata_rule(self._personality, "utimens")
            else:
                metadata_rule(self._personality, "chown")  # chown(-1, -1): SETATTR of nothing
        elif fields.update_size:
            raise FUSEError(errno.EINVAL)
        changed = self._names.setattr(
            ino, _now(),
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=atime_ns,
            mtime_ns=mtime_ns,
        )  # fmt: skip
        return self._attributes(changed)

    # --- files --------------------------------------------------------------------------------

    @_translated
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[pyfuse3.FileInfo, EntryAttributes]:
        if flags & os.O_DIRECT:
            raise FUSEError(errno.EINVAL)
        made = self._born(self._names.create(parent, name, mode, ctx.uid, ctx.gid, _now()))
        self._names.open(made.ino)
        return lowlevel.private_file(made.ino), self._attributes(made)

    @_translated
    async def open(self, ino: int, flags: int, ctx: RequestContext) -> pyfuse3.FileInfo:
        if self._live.holds(ino):
            self._names.open(ino)
            return self._live.open(ino)
        file = self._service.owner.files.get(ino)
        if file is None:  # the kernel opens directories, sockets and FIFOs in other ways
            self._names.attributes(ino)
            raise FUSEError(errno.ENXIO)
        if flags & os.O_DIRECT:
            raise FUSEError(errno.EINVAL)
        if flags & os.O_TRUNC and file.size:
            await self._call(ino, Resize(0))  # no SETATTR follows (FUSE_ATOMIC_O_TRUNC)
        self._names.open(ino)
        return lowlevel.private_file(ino, self._service.host_mapped.backing_id(ino))

    @_translated
    async def release(self, fh: int) -> None:
        ino = self._live.release(fh)
        self._bury(self._names.release(ino))

    @_translated
    async def flush(self, fh: int) -> None:
        raise FUSEError(errno.ENOSYS)  # close(2) then never waits for us

    @_translated
    async def read(self, fh: int, off: int, size: int) -> bytes:
        text = self._live.read(fh, off, size)
        if text is not None:
            return text
        file = self._service.owner.files.get(fh)
        if file is None:
            raise FUSEError(errno.EBADF)
        if self._personality.eof_reads_empty and off >= file.size:
            return b""
        await self._throttle.wait()
        raise FUSEError(self._personality.read_errno)

    @_translated
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        raise FUSEError(self._personality.write_errno)

    @_translated
    async def fsync(self, fh: int, datasync: bool) -> None:
        metadata_rule(self._personality, "fsync")

    @_translated
    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        await self._call(fh, Fallocate(mode, offset, length))
        self._names.modified(fh, _now())

    @_translated
    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        metadata_rule(self._personality, "lseek")
        file = self._service.owner.files.get(fh)
        if file is None or not 0 <= offset < file.size:
            raise FUSEError(errno.ENXIO)
        page = offset // PAGE_SIZE
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise FUSEError(errno.EINVAL)
        if whence == os.SEEK_DATA:
            data = file.data_from(page)
            if data is None or data * PAGE_SIZE >= file.size:
                raise FUSEError(errno.ENXIO)
            return max(data * PAGE_SIZE, offset)
        return min(max(file.hole_from(page) * PAGE_SIZE, offset), file.size)

    # --- memory -------------------------------------------------------------------------------

    async def _call(self, ino: int, request: Request) -> None:
        """Make a system call of the owner and wait as the kernel's would.

        Allocations end with EINTR on any signal; what takes pages away ignores signals, except
        that a caller who is being killed leaves before anything is freed.
        """
        if ino not in self._service.owner.files:
            raise FUSEError(errno.EINVAL)
        tid = lowlevel.current_request().pid if self._service.owner.sessions else 0
        call = self._service.begin(ino, request, tid)
        if call.outcome is None:
            self._service.hurry(ino, call)
        if call.outcome is None:
            with lowlevel.interruptible() as scope:
                await self._service.settled(call)
            if scope.cancelled_caught:
                await self._interrupted(call)
        await self._service.wait(call)

    async def _interrupted(self, call: Call) -> None:
        if _allocates(call.request):
            self._service.interrupt(call)
        pid = lowlevel.current_request().pid
        while call.outcome is None:
            if lowlevel.caller_killed(pid):
                self._service.interrupt(call)
                return
            with trio.move_on_after(_KILL_POLL):
                await self._service.settled(call)

    def _born(self, made: Attributes) -> Attributes:
        if made.kind is Kind.FILE:
            self._service.owner.create(made.ino)
        return made

    def _bury(self, dead: Sequence[int]) -> None:
        for ino in dead:
            if ino in self._service.owner.files:
                self._service.release(ino)

    # --- replies ------------------------------------------------------------------------------

    def _entry(self, of: Attributes) -> EntryAttributes:
        return self._attributes(of)

    def _attributes(self, of: Attributes) -> EntryAttributes:
        reply = EntryAttributes()
        reply.st_ino = of.ino
        reply.generation = 0
        reply.entry_timeout = _ENTRY_SECONDS
        reply.attr_timeout = 0 if of.kind is Kind.FILE else _ENTRY_SECONDS
        reply.st_mode = of.st_mode
        reply.st_nlink = of.nlink
        reply.st_uid, reply.st_gid = of.uid, of.gid
        reply.st_rdev = 0
        reply.st_size = of.size
        reply.st_blksize = self._service.owner.personality.page_size
        reply.st_blocks = 0
        file = self._service.owner.files.get(of.ino)
        if file is not None:
            reply.st_size = file.size
            reply.st_blocks = file.allocated * (PAGE_SIZE // 512)
        reply.st_atime_ns = of.atime_ns
        reply.st_mtime_ns = of.mtime_ns
        reply.st_ctime_ns = of.ctime_ns
        return reply


def _allocates(request: Request) -> bool:
    return isinstance(request, Fallocate) and request.mode in (0, FALLOC_FL_KEEP_SIZE)


def _time(nanoseconds: int) -> int:
    """Return a time that ``struct stat`` can hold; a reply could not be made with another."""
    if not -(1 << 63) <= nanoseconds // 1_000_000_000 < 1 << 63:
        raise FUSEError(errno.EINVAL)
    return nanoseconds


def _now() -> int:
    return time.time_ns()
