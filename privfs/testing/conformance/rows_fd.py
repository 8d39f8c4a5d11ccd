# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows: descriptor flags, reopening, seals, rights that travel, locks, waiting."""

from __future__ import annotations

import fcntl
import os
from typing import Any, Final

from privfs.testing.conformance import probes_fd as probe
from privfs.testing.conformance.probes_fd import O_DIRECT, O_NOATIME
from privfs.testing.conformance.row import SIZE, Outcome, Row, fuse, row

_FLAGS: Final = [
    row("F_GETFL", probe.flags, gm="RDWR|LARGEFILE", memfd="RDWR|LARGEFILE",
        source="__kvm_gmem_create: O_RDWR and O_LARGEFILE"),
    row("F_SETFL.append", probe.set_flags, os.O_APPEND, gm="0", memfd="0", source="setfl"),
    row("F_SETFL.nonblock", probe.set_flags, os.O_NONBLOCK, gm="0", memfd="0", source="setfl"),
    row("F_SETFL.noatime", probe.set_flags, O_NOATIME, gm="0", memfd="0", source="setfl"),
    row("F_SETFL.direct", probe.set_flags, O_DIRECT, gm="EINVAL", memfd="EINVAL",
        source="setfl: FMODE_CAN_ODIRECT", fuse=fuse("set-direct", "0")),
    row("F_SETFL.async", probe.set_flags, os.O_ASYNC, gm="0", memfd="0", source="setfl"),
]  # fmt: skip


def _reopen(name: str, how: int, memfd: Outcome, *, gm: Outcome = "ENXIO", v7: Outcome = "",
            mount: Outcome = "", **more: Any) -> Row:  # fmt: skip
    differs = fuse("reopens", mount or memfd) if gm == "ENXIO" else ()
    return row(f"reopen.{name}", probe.reopen, how, gm=gm, memfd=memfd, v7=v7, source="no_open",
               fuse=more.pop("fuse", ()) + differs, **more)  # fmt: skip


_REOPENED: Final = [
    _reopen("rdonly", os.O_RDONLY, "RDONLY|LARGEFILE"),
    _reopen("wronly", os.O_WRONLY, "WRONLY|LARGEFILE"),
    _reopen("rdwr", os.O_RDWR, "RDWR|LARGEFILE"),
    _reopen("append", os.O_RDWR | os.O_APPEND, "RDWR|APPEND|LARGEFILE"),
    _reopen("creat", os.O_RDWR | os.O_CREAT, "RDWR|LARGEFILE"),
    _reopen("nonblock", os.O_RDWR | os.O_NONBLOCK, "RDWR|NONBLOCK|LARGEFILE"),
    _reopen("no-access", 3, "NOTHING|LARGEFILE"),
    _reopen("direct", os.O_RDWR | O_DIRECT, "RDWR|DIRECT|LARGEFILE", v7="EINVAL",
            mount="EINVAL"),
    _reopen("trunc", os.O_RDWR | os.O_TRUNC, "RDWR|LARGEFILE", v7="EPERM",
            resizable="RDWR|LARGEFILE",
            fuse=fuse("reopens", "EINVAL", only=("guest_memfd",))
            + fuse("reopens", "EPERM", only=("v7", "shim"))),
    _reopen("path", os.O_PATH, "RDONLY|PATH", gm="RDONLY|PATH"),
    _reopen("directory", os.O_DIRECTORY, "ENOTDIR", gm="ENOTDIR"),
    _reopen("path-directory", os.O_PATH | os.O_DIRECTORY, "ENOTDIR", gm="ENOTDIR"),
    _reopen("nofollow", os.O_NOFOLLOW, "ELOOP", gm="ELOOP"),
    _reopen("exclusive", os.O_RDWR | os.O_CREAT | os.O_EXCL, "EEXIST", gm="EEXIST"),
    _reopen("tmpfile", os.O_RDWR | os.O_TMPFILE, "ENOTDIR", gm="ENOTDIR"),
    row("reopened.size", probe.reopen_and, os.O_RDONLY, "size", gm="ENXIO", memfd=f"size={SIZE}",
        source="no_open", fuse=fuse("reopens", f"size={SIZE}")),
    row("reopened.read", probe.reopen_and, os.O_RDONLY, "read", gm="ENXIO", memfd="8", v7="EPERM",
        source="no_open",
        fuse=fuse("reopens", "EINVAL", only=("guest_memfd", "shim", "resizable"))),
    row("reopened.rdonly-punch", probe.reopen_and, os.O_RDONLY, "punch", gm="ENXIO", memfd="EBADF",
        source="no_open; vfs_fallocate: FMODE_WRITE", fuse=fuse("reopens", "EBADF")),
    row("reopened.wronly-punch", probe.reopen_and, os.O_WRONLY, "punch", gm="ENXIO", memfd="0",
        source="no_open", fuse=fuse("reopens", "0")),
    row("reopened.wronly-read", probe.reopen_and, os.O_WRONLY, "read", gm="ENXIO", memfd="EBADF",
        source="no_open", fuse=fuse("reopens", "EBADF")),
    row("reopened.rdonly-write", probe.reopen_and, os.O_RDONLY, "write", gm="ENXIO", memfd="EBADF",
        source="no_open", fuse=fuse("reopens", "EBADF")),
    row("reopened.rdonly-truncate", probe.reopen_and, os.O_RDONLY, "truncate", gm="ENXIO",
        memfd="EINVAL", source="no_open; do_ftruncate: FMODE_WRITE",
        fuse=fuse("reopens", "EINVAL")),
    row("reopened.path-punch", probe.reopen_and, os.O_PATH, "punch", gm="EBADF", memfd="EBADF",
        source="fdget: FMODE_PATH"),
    row("reopened.path-truncate", probe.reopen_and, os.O_PATH, "truncate", gm="EBADF",
        memfd="EBADF", source="fdget: FMODE_PATH"),
]  # fmt: skip

#: include/uapi/linux/fcntl.h; 0x40 and above no kernel knows.
_SEALS: Final = {"seal": 1, "shrink": 2, "grow": 4, "write": 8, "future-write": 16, "exec": 32}
_NO_SEALS: Final = fuse("seals", "EINVAL", only=("v7",))
_SEALED: Final = [
    row("F_GET_SEALS", probe.get_seals, gm="EINVAL", memfd="0x0", v7="0x1",
        source="memfd_file_seals_ptr", fuse=_NO_SEALS),
    *(
        row(f"F_ADD_SEALS.{name}", probe.add_seals, seal, gm="EINVAL", memfd="0",
            v7="EINVAL" if name == "exec" else "EPERM",
            source="memfd_add_seals; F_SEAL_EXEC is younger than v7",
            fuse=() if name == "exec" else _NO_SEALS)
        for name, seal in _SEALS.items()
    ),
    row("F_ADD_SEALS.none", probe.add_seals, 0, gm="EINVAL", memfd="0", v7="EPERM",
        source="memfd_add_seals", fuse=_NO_SEALS),
    row("F_ADD_SEALS.unknown", probe.add_seals, 1 << 8, gm="EINVAL", memfd="EINVAL",
        source="memfd_add_seals"),
]  # fmt: skip


def _travels(name: str, call: Any) -> Row:
    return row(f"rights.{name}", call, gm="punch 0, read EINVAL", memfd="punch 0, read succeeds",
               v7="punch 0, read EPERM", source="the file, not the descriptor")  # fmt: skip


_RIGHTS: Final = [
    _travels("dup", probe.duplicated),
    _travels("fork", probe.inherited),
    _travels("SCM_RIGHTS", probe.sent),
    _travels("pidfd_getfd", probe.fetched),
]

F_GETLK, F_SETLK, F_OFD_GETLK, F_OFD_SETLK, F_GETLEASE, F_NOTIFY = 5, 6, 36, 37, 1025, 1026
F_CREATED_QUERY, F_SETPIPE_SZ = 1028, 1031
F_GETPIPE_SZ, F_GET_RW_HINT, F_SET_RW_HINT, F_GET_FILE_RW_HINT = 1032, 1035, 1036, 1037
_LOCKS: Final = [
    row("F_SETLK.write", probe.record_lock, F_SETLK, fcntl.F_WRLCK, gm="0", memfd="0",
        source="fcntl_setlk"),
    row("F_SETLK.read", probe.record_lock, F_SETLK, fcntl.F_RDLCK, gm="0", memfd="0",
        source="fcntl_setlk"),
    row("F_GETLK", probe.record_lock, F_GETLK, fcntl.F_WRLCK, gm="0", memfd="0",
        source="fcntl_getlk"),
    row("F_OFD_SETLK", probe.record_lock, F_OFD_SETLK, fcntl.F_WRLCK, gm="0", memfd="0",
        source="fcntl_setlk"),
    row("F_OFD_GETLK", probe.record_lock, F_OFD_GETLK, fcntl.F_WRLCK, gm="0", memfd="0",
        source="fcntl_getlk"),
    row("F_SETLK.to-the-end", probe.record_lock, F_SETLK, fcntl.F_WRLCK, -1, 1, os.SEEK_END,
        gm="0", memfd="0", source="flock64_to_posix_lock: i_size"),
    row("F_SETLK.negative", probe.record_lock, F_SETLK, fcntl.F_WRLCK, -1, 1, gm="EINVAL",
        memfd="EINVAL", source="flock64_to_posix_lock"),
    row("F_SETLK.overflow", probe.record_lock, F_SETLK, fcntl.F_WRLCK, (1 << 63) - 1, 2,
        gm="EOVERFLOW", memfd="EOVERFLOW", source="flock64_to_posix_lock"),
    row("F_SETLK.unknown", probe.record_lock, F_SETLK, 77, gm="EINVAL", memfd="EINVAL",
        source="assign_type"),
    row("F_OFD_SETLK.conflict", probe.conflicting_locks, F_OFD_SETLK, gm="ENXIO",
        memfd="EAGAIN", resizable="EAGAIN", source="no_open; posix_lock_inode",
        fuse=fuse("reopens", "EAGAIN")),
    row("flock.exclusive", probe.flock, fcntl.LOCK_EX | fcntl.LOCK_NB, gm="0", memfd="0",
        source="flock"),
    row("flock.shared", probe.flock, fcntl.LOCK_SH | fcntl.LOCK_NB, gm="0", memfd="0",
        source="flock"),
    row("flock.unknown", probe.flock, 77, gm="EINVAL", memfd="EINVAL", source="flock"),
    row("F_SETLEASE.read", probe.lease, fcntl.F_RDLCK, gm="0", memfd="0",
        source="check_conflicting_open: nobody counts as a writer",
        fuse=fuse("writer-count", "EAGAIN")),
    row("F_SETLEASE.write", probe.lease, fcntl.F_WRLCK, gm="EAGAIN", memfd="EAGAIN",
        source="check_conflicting_open", fuse=fuse("writer-count", "0")),
    row("F_GETLEASE", probe.command, F_GETLEASE, 0, gm="2", memfd="2", source="fcntl_getlease"),
    row("F_NOTIFY", probe.command, F_NOTIFY, 1, gm="ENOTDIR", memfd="ENOTDIR",
        source="fcntl_dirnotify"),
    row("F_GETPIPE_SZ", probe.command, F_GETPIPE_SZ, 0, gm="EBADF", memfd="EBADF",
        source="pipe_fcntl"),
    row("F_SET_RW_HINT", probe.write_hint, F_SET_RW_HINT, gm="0", memfd="0",
        source="fcntl_set_rw_hint"),
    row("F_GET_RW_HINT", probe.write_hint, F_GET_RW_HINT, gm="0", memfd="0",
        source="fcntl_get_rw_hint"),
    row("F_SET_RW_HINT.extreme", probe.write_hint, F_SET_RW_HINT, 5, gm="0", memfd="0",
        source="rw_hint_valid"),
    row("F_SET_RW_HINT.unknown", probe.write_hint, F_SET_RW_HINT, 6, gm="EINVAL",
        memfd="EINVAL", source="rw_hint_valid"),
    row("F_GET_FILE_RW_HINT", probe.write_hint, F_GET_FILE_RW_HINT, gm="EINVAL", memfd="EINVAL",
        source="do_fcntl: gone since Linux 5.17", since=(5, 17)),
    row("F_SETSIG", probe.signal_of, gm="12", memfd="12", source="do_fcntl"),
    row("F_DUPFD_QUERY", probe.same_file, gm="1", memfd="1", v7=None, shim=None, resizable="1",
        source="f_dupfd_query", since=(6, 10)),
    row("F_CREATED_QUERY", probe.command, F_CREATED_QUERY, 0, gm="0", memfd="0", v7=None,
        shim=None, resizable="1", source="f_created_query: FMODE_CREATED", since=(6, 12),
        fuse=fuse("named", "1")),
    row("F_SETPIPE_SZ", probe.command, F_SETPIPE_SZ, 4096, gm="EBADF", memfd="EBADF",
        source="pipe_fcntl"),
    row("fcntl.unknown", probe.command, 9999, 0, gm="EINVAL", memfd="EINVAL", source="do_fcntl"),
    row("poll", probe.poll, gm="IN|OUT|RDNORM|WRNORM", memfd="IN|OUT|RDNORM|WRNORM",
        source="DEFAULT_POLLMASK"),
    row("epoll", probe.epoll, gm="EPERM", memfd="EPERM", source="file_can_poll",
        fuse=fuse("epoll", "0")),
    row("inotify", probe.inotify, gm="silent", memfd="silent", v7="MODIFY",
        shim="MODIFY", source="fsnotify_modify; off for pseudo files since Linux 6.14",
        since=(6, 14),
        fuse=fuse("named", "MODIFY", only=("guest_memfd",))),
    row("fchdir", probe.directory, "fchdir", gm="ENOTDIR", memfd="ENOTDIR", source="fchdir"),
    row("getdents", probe.directory, "getdents", gm="ENOTDIR", memfd="ENOTDIR",
        source="iterate_dir"),
]  # fmt: skip

ROWS: Final = [*_FLAGS, *_REOPENED, *_SEALED, *_RIGHTS, *_LOCKS]
