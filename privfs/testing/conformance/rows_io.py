# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows: reading, writing, splicing, copying, hints, io_uring, aio.

A file without read_iter and write_iter lacks FMODE_CAN_READ and FMODE_CAN_WRITE: EINVAL from
``vfs_read()``; one without llseek lacks FMODE_PREAD and FMODE_PWRITE: ESPIPE from
``ksys_pread64()`` (``fs/read_write.c``).  v7 answered EPERM in ``shmem_file_read_iter()``.
"""

from __future__ import annotations

import os
from typing import Any, Final

from privfs.testing.conformance import probes_io as probe
from privfs.testing.conformance.row import (
    PAGE,
    SIZE,
    Differs,
    Outcome,
    Probe,
    Row,
    fuse,
    row,
)

_RW: Final = "vfs_read, vfs_write: FMODE_CAN_READ, FMODE_CAN_WRITE"
_POSITIONED: Final = "ksys_pread64: FMODE_PREAD"
_UNSEEKABLE: Final = ("guest_memfd", "shim")


def _moved(name: str, call: Probe, *arguments: Any, memfd: Outcome, gm: Outcome = "EINVAL",
           v7: Outcome = "EPERM", **more: Any) -> Row:  # fmt: skip
    more.setdefault("source", _RW)
    return row(name, call, *arguments, gm=gm, memfd=memfd, v7=v7, **more)


def _positioned(name: str, call: Probe, *arguments: Any, memfd: Outcome, v7: Outcome = "EPERM",
                answer: Outcome = "EINVAL", differs: tuple[Differs, ...] = ()) -> Row:  # fmt: skip
    """A call at an offset: what is seekable reaches the refusal of reading, ``answer``."""
    return row(name, call, *arguments, gm="ESPIPE", memfd=memfd, v7=v7, resizable=answer,
               source=_POSITIONED,
               fuse=fuse("seekable", passthrough=answer, only=_UNSEEKABLE) + differs)  # fmt: skip


_PLAIN: Final = [
    _moved("read", probe.read, PAGE, memfd=str(PAGE)),
    _moved("read.zero-bytes", probe.read, 0, memfd="0", fuse=fuse("zero-bytes", "0")),
    _moved("read.kernel-pointer", probe.read_into, "kernel", memfd="EFAULT", v7="EFAULT",
           fuse=fuse("read-iter", "EFAULT")),
    _moved("read.bad-pointer", probe.read_into, "unmapped", memfd="EFAULT",
           fuse=fuse("pins-first", "EFAULT", only=("v7",))
           + fuse("pins-first", direct_io="EFAULT")),
    _moved("write", probe.write, PAGE, memfd=str(PAGE)),
    _moved("write.zero-bytes", probe.write, 0, memfd="0", v7="0", fuse=fuse("zero-bytes", "0")),
    _moved("readv", probe.readv, 1, memfd=str(PAGE)),
    _moved("readv.no-vectors", probe.readv, 0, memfd="0", v7="0",
           fuse=fuse("zero-bytes", "0")),
    _moved("writev", probe.writev, 1, memfd=str(PAGE)),
    _moved("writev.no-vectors", probe.writev, 0, memfd="0", v7="0",
           fuse=fuse("zero-bytes", "0")),
    _positioned("pread", probe.pread, 0, PAGE, memfd=str(PAGE)),
    _positioned("pread.past-eof", probe.pread, 2 * SIZE, PAGE, memfd="0", v7="0"),
    row("pread.negative", probe.pread, -PAGE, PAGE, gm="EINVAL", memfd="EINVAL",
        source=_POSITIONED),
    _positioned("pread.zero-bytes", probe.pread, 0, 0, memfd="0", answer="0",
                differs=fuse("zero-bytes", "0", only=("v7",))),
    _positioned("pwrite", probe.pwrite, 0, PAGE, memfd=str(PAGE)),
    _positioned("pwrite.past-eof", probe.pwrite, 2 * SIZE, PAGE, memfd=str(PAGE)),
    _positioned("pwrite.zero-bytes", probe.pwrite, 0, 0, memfd="0", v7="0", answer="0"),
    _positioned("preadv", probe.preadv, 0, memfd=str(PAGE)),
    _positioned("pwritev", probe.pwritev, 0, memfd=str(PAGE)),
    _positioned("preadv2", probe.preadv2, 0, 0, memfd=str(PAGE)),
    _moved("preadv2.position", probe.preadv2, -1, 0, memfd=str(PAGE)),
    _positioned("preadv2.nowait", probe.preadv2, 0, 8, memfd="EOPNOTSUPP",
                v7="EOPNOTSUPP", answer="EOPNOTSUPP"),
    _positioned("preadv2.high-priority", probe.preadv2, 0, 1, memfd=str(PAGE)),
    _positioned("preadv2.unknown-flag", probe.preadv2, 0, 1 << 20, memfd="EOPNOTSUPP",
                v7="EOPNOTSUPP", answer="EOPNOTSUPP"),
    _positioned("pwritev2.append", probe.pwritev2, 0, 0x10, memfd=str(PAGE)),
    _positioned("pwritev2.sync", probe.pwritev2, 0, 4, memfd=str(PAGE)),
    _moved("pwritev2.position", probe.pwritev2, -1, 0, memfd=str(PAGE)),
]  # fmt: skip


def _flagged(name: str, flag: int, since: tuple[int, int]) -> list[Row]:
    """Reads and writes with a flag of ``kiocb_set_rw_flags()`` that the file may not know."""
    known = name == "noappend"
    allowed = str(PAGE) if known else "EOPNOTSUPP"
    mount = "EINVAL" if known else "EOPNOTSUPP"
    v7 = None if since > (5, 19) else "EOPNOTSUPP"
    differs = () if known else fuse("rw-flags", mount, only=_UNSEEKABLE)
    rows = []
    for direction, call in (("preadv2", probe.preadv2), ("pwritev2", probe.pwritev2)):
        rows.append(row(
            f"{direction}.position-{name}", call, -1, flag, gm="EINVAL", memfd=allowed, v7=v7,
            resizable=mount, source=_RW, fuse=differs, since=since,
        ))  # fmt: skip
        if (direction, name) != ("preadv2", "nowait"):
            rows.append(row(
                f"{direction}.{name}", call, 0, flag, gm="ESPIPE", memfd=allowed, v7=v7,
                resizable=mount, source=_POSITIONED, since=since,
                fuse=fuse("seekable", passthrough=mount, only=_UNSEEKABLE),
            ))  # fmt: skip
    return rows


_FLAGGED: Final = [
    *_flagged("nowait", 0x8, (4, 14)),
    *_flagged("noappend", 0x20, (6, 9)),
    *_flagged("atomic", 0x40, (6, 11)),
    *_flagged("dontcache", 0x80, (6, 14)),
]

_SPLICED: Final = [
    _moved("splice.from", probe.splice_from, None, memfd=str(PAGE)),
    _moved("splice.from-offset", probe.splice_from, 0, memfd=str(PAGE)),
    _moved(
        "splice.from-past-eof",
        probe.splice_from,
        2 * SIZE,
        memfd="0",
        v7="0",
        fuse=fuse("page-cache-splice", direct_io="0", only=("resizable",)),
    ),
    _moved("splice.to", probe.splice_to, None, memfd=str(PAGE)),
    _moved("splice.to-offset", probe.splice_to, 0, memfd=str(PAGE)),
    _moved("tee", probe.tee, memfd="EINVAL", v7="EINVAL", source="do_tee: pipes only"),
    _moved("sendfile.from", probe.sendfile_from, None, memfd=str(PAGE)),
    _positioned("sendfile.from-offset", probe.sendfile_from, 0, memfd=str(PAGE)),
    row("sendfile.from-zero-bytes", probe.sendfile_nothing, gm="EINVAL", memfd="0",
        resizable="0", source="splice_direct_to_actor: FMODE_LSEEK",
        fuse=fuse("seekable", passthrough="0", only=_UNSEEKABLE)),
    row("sendfile.from-negative", probe.sendfile_from, -1, gm="ESPIPE", memfd="EINVAL",
        resizable="EINVAL", source=_POSITIONED,
        fuse=fuse("seekable", passthrough="EINVAL", only=_UNSEEKABLE)),
    _moved("sendfile.to", probe.sendfile_to, memfd=str(PAGE)),
    row("vmsplice.to", probe.vmsplice, gm="EBADF", memfd="EBADF", source="vmsplice: pipes only"),
    row("tee.to", probe.tee_to, gm="EINVAL", memfd="EINVAL", source="do_tee: pipes only"),
]  # fmt: skip
_XDEV: Final = "generic_copy_file_checks, vfs_copy_file_range"
_COPIED: Final = [
    row("copy_file_range.from", probe.copy_from, gm="EXDEV", memfd=str(PAGE), v7="EPERM",
        source=_XDEV, fuse=fuse("other-mount", "EXDEV", only=("v7",))),
    row("copy_file_range.from-zero-bytes", probe.copy_from, 0, gm="EXDEV", memfd="0",
        source=_XDEV, fuse=fuse("other-mount", "EXDEV", only=("v7",))),
    row("copy_file_range.flags", probe.copy_from, PAGE, 2, gm="EINVAL", memfd="EINVAL",
        source=_XDEV),
    row("copy_file_range.to", probe.copy_to, gm="EXDEV", memfd=str(PAGE), v7="EPERM",
        source=_XDEV, fuse=fuse("other-mount", "EXDEV", only=("v7",))),
    row("copy_file_range.self", probe.copy_self, 4 * PAGE, gm="EINVAL", memfd=str(PAGE),
        v7="EPERM", source=_XDEV),
    row("copy_file_range.self-past-eof", probe.copy_self, 0, 2 * SIZE, gm="0", memfd="0",
        source="generic_copy_file_checks: nothing left to copy"),
    row("copy_file_range.self-zero-bytes", probe.copy_self, PAGE, 0, 0, gm="0", memfd="0",
        source=_XDEV),
    row("copy_file_range.self-negative", probe.copy_self, 0, -1, gm="EOVERFLOW",
        memfd="EOVERFLOW", source=_XDEV),
    row("copy_file_range.self-overlapping", probe.copy_self, 16, gm="EINVAL", memfd="EINVAL",
        source=_XDEV),
]  # fmt: skip

_ADVICE: Final = {
    "normal": os.POSIX_FADV_NORMAL, "random": os.POSIX_FADV_RANDOM,
    "sequential": os.POSIX_FADV_SEQUENTIAL, "willneed": os.POSIX_FADV_WILLNEED,
    "dontneed": os.POSIX_FADV_DONTNEED, "noreuse": os.POSIX_FADV_NOREUSE,
}  # fmt: skip
_HINTS: Final = [
    row("readahead", probe.readahead, gm="EINVAL", memfd="0",
        source="ksys_readahead: a_ops and S_ISREG", fuse=fuse("readahead", "0")),
    *(
        row(f"fadvise.{name}", probe.fadvise, advice, gm="0", memfd="0",
            source="generic_fadvise")
        for name, advice in _ADVICE.items()
    ),
    row("fadvise.unknown", probe.fadvise, 99, gm="EINVAL", memfd="EINVAL",
        source="generic_fadvise"),
    row("fadvise.negative-length", probe.fadvise, 0, -1, gm="EINVAL", memfd="EINVAL",
        source="generic_fadvise"),
    row("sync_file_range", probe.sync_file_range, 0, PAGE, 7, gm="0", memfd="0",
        source="sync_file_range"),
    row("sync_file_range.bad-flags", probe.sync_file_range, 0, PAGE, 0x80, gm="EINVAL",
        memfd="EINVAL", source="sync_file_range"),
    row("sync_file_range.past-eof", probe.sync_file_range, 2 * SIZE, PAGE, 2, gm="0", memfd="0",
        source="sync_file_range"),
    row("sync_file_range.overflow", probe.sync_file_range, (1 << 63) - 1, 2, 2, gm="EINVAL",
        memfd="EINVAL", source="sync_file_range"),
    row("sync_file_range.negative", probe.sync_file_range, -1, PAGE, 0, gm="EINVAL",
        memfd="EINVAL", source="sync_file_range"),
    row("cachestat", probe.cachestat, 0, gm="0", memfd="0", v7=None, shim="0",
        source="cachestat", since=(6, 5)),
    row("cachestat.resident", probe.cached, gm="16 pages", memfd="16 pages", v7=None, shim=None,
        resizable="0 pages", source="cachestat: folios of the mapping", since=(6, 8),
        fuse=fuse("daemon-pages", "0 pages")),
    row("cachestat.bad-flags", probe.cachestat, 1, gm="EINVAL", memfd="EINVAL", v7=None,
        shim="EINVAL", source="cachestat", since=(6, 5)),
]  # fmt: skip

_URING: Final = "io_uring: as the system call"
_RINGS: Final = [
    _moved("io_uring.read", probe.uring_read, 0, memfd=str(PAGE), source=_URING),
    _moved("io_uring.read-position", probe.uring_read, -1, memfd=str(PAGE), source=_URING),
    _moved("io_uring.write", probe.uring_write, 0, memfd=str(PAGE), source=_URING),
    _moved("io_uring.splice", probe.uring_splice_from, memfd=str(PAGE), source=_URING),
    row("io_uring.fallocate-allocate", probe.uring_fallocate, 0, 0, PAGE, gm="EOPNOTSUPP",
        memfd="0", shim="0", source=_URING),
    row("io_uring.fallocate-keep", probe.uring_fallocate, 1, 0, PAGE, gm="0", memfd="0",
        source=_URING),
    row("io_uring.fallocate-punch", probe.uring_fallocate, 3, 0, PAGE, gm="0", memfd="0",
        source=_URING),
    row("io_uring.fallocate-punch-unaligned", probe.uring_fallocate, 3, 1, PAGE, gm="EINVAL",
        memfd="0", v7="EINVAL", source=_URING),
    row("io_uring.fsync", probe.uring_fsync, False, gm="EINVAL", memfd="0", resizable="0",
        source=_URING),
    row("io_uring.fdatasync", probe.uring_fsync, True, gm="EINVAL", memfd="0", resizable="0",
        source=_URING),
    row("io_uring.ftruncate", probe.uring_ftruncate, 2 * SIZE, gm="EINVAL", memfd="0",
        v7="EPERM", shim="EPERM", resizable="0", source=_URING, since=(6, 9)),
    row("io_uring.sync_file_range", probe.uring_sync_file_range, gm="0", memfd="0",
        source=_URING),
    row("io_uring.fadvise", probe.uring_fadvise, os.POSIX_FADV_WILLNEED, gm="0", memfd="0",
        source=_URING),
    _moved("aio.pread", probe.aio, "PREAD", memfd=str(PAGE), source="aio_read"),
    _moved("aio.pwrite", probe.aio, "PWRITE", memfd=str(PAGE), source="aio_write"),
    row("aio.pread-submit", probe.aio_submit, "PREAD", gm="EINVAL", memfd="1", resizable="1",
        source="aio_read: ->read_iter", fuse=fuse("read-iter", "1", only=_UNSEEKABLE)),
    row("aio.pwrite-submit", probe.aio_submit, "PWRITE", gm="EINVAL", memfd="1", resizable="1",
        source="aio_write: ->write_iter", fuse=fuse("read-iter", "1", only=_UNSEEKABLE)),
    row("aio.poll", probe.aio, "POLL", gm="1", memfd="1", source="aio_poll"),
    row("aio.fsync", probe.aio, "FSYNC", gm="EINVAL", memfd="0", resizable="0",
        source="aio_fsync"),
    row("aio.fdsync", probe.aio, "FDSYNC", gm="EINVAL", memfd="0", resizable="0",
        source="aio_fsync"),
]  # fmt: skip

ROWS: Final = [*_PLAIN, *_FLAGGED, *_SPLICED, *_COPIED, *_HINTS, *_RINGS]
