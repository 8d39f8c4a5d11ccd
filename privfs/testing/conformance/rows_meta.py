# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows: stat, sync, mode, owner, times, extended attributes, ioctls, names."""

from __future__ import annotations

from typing import Any, Final

from privfs.testing.conformance import probes_meta as probe
from privfs.testing.conformance.probes_meta import UTIME_NOW, UTIME_OMIT
from privfs.testing.conformance.row import SIZE, Differs, Outcome, Row, fuse, row

_ATTR: Final = "kvm_gmem_setattr: EINVAL for everything"
_STAT: Final = [
    row("fstat.type", probe.fstat, "type", gm="regular", memfd="regular", source="S_IFREG"),
    row("fstat.mode", probe.fstat, "mode", gm="0o600", memfd="0o777", v7="0o777",
        shim="0o600", source="alloc_anon_inode; memfd: shmem", fuse=fuse("named", "0o600")),
    row("fstat.nlink", probe.fstat, "st_nlink", gm="1", memfd="0", shim="1",
        source="__kvm_gmem_create", fuse=fuse("named", "1")),
    row("fstat.size", probe.fstat, "st_size", gm=str(SIZE), memfd=str(SIZE), source="i_size"),
    row("fstat.blksize", probe.fstat, "st_blksize", gm="4096", memfd="4096", source="i_blkbits"),
    row("statx.size", probe.statx, "size", gm=f"{SIZE:#x}", memfd=f"{SIZE:#x}", source="i_size"),
    row("statx.basic", probe.statx, "basic", gm="0x7ff", memfd="0x7ff", source="vfs_getattr"),
    row("statx.blksize", probe.statx, "blksize", gm="0x1000", memfd="0x1000", source="i_blkbits"),
    row("fstatfs.type", probe.fstatfs, "type", gm="0x9041934", memfd="0x1021994",
        shim="0x494e4143", source="GUEST_MEMFD_MAGIC; INACCESSIBLE_MAGIC",
        fuse=fuse("file-system", "0x65735546")),
    row("fstatfs.bsize", probe.fstatfs, "bsize", gm="4096", memfd="4096", source="simple_statfs"),
    row("fstatfs.flags", probe.fstatfs, "flags", gm="0x0", memfd="0x0", resizable="0xe",
        source="calculate_f_flags", fuse=fuse("file-system", "0xe")),
    row("fstatfs.blocks", probe.fstatfs, "blocks", gm="none", memfd="none", resizable="some",
        source="simple_statfs", fuse=fuse("st-blocks", "some")),
    row("statx.force-sync", probe.statx_asked, 0x2000, 0x7FF, 0x7FF, gm="0x7ff", memfd="0x7ff",
        source="vfs_getattr"),
    row("statx.no-sync", probe.statx_asked, 0x4000, 0x7FF, 0x7FF, gm="0x7ff", memfd="0x7ff",
        source="vfs_getattr"),
    row("statx.both-syncs", probe.statx_asked, 0x6000, 0x7FF, 0, gm="EINVAL", memfd="EINVAL",
        source="do_statx"),
    row("statx.reserved", probe.statx_asked, 0, 1 << 31, 0, gm="EINVAL", memfd="EINVAL",
        source="do_statx"),
    row("statx.birth", probe.statx_asked, 0, 0xFFF, 0x800, gm="0x0", memfd="0x800", v7="0x0",
        source="shmem_getattr, since Linux 6.0", since=(6, 0)),
    row("readlink", probe.link_text, gm="anon_inode", memfd="/memfd", shim="/memfd",
        source="d_path", fuse=fuse("named", "a path")),
    row("mtime.punch", probe.times, 3, gm="mtime ctime", memfd="mtime ctime",
        source="file_modified"),
    row("mtime.keep", probe.times, 1, gm="mtime ctime", memfd="mtime ctime",
        source="file_modified"),
]  # fmt: skip

_SYNC: Final = [
    row("fsync", probe.fsync, gm="EINVAL", memfd="0", resizable="0", source="vfs_fsync_range"),
    row("fdatasync", probe.fdatasync, gm="EINVAL", memfd="0", resizable="0",
        source="vfs_fsync_range"),
    row("syncfs", probe.syncfs, gm="0", memfd="0", source="syncfs"),
]  # fmt: skip


def _set(name: str, call: Any, *arguments: Any, gm: Outcome = "EINVAL", **more: Any) -> Row:
    return row(name, call, *arguments, gm=gm, memfd="0", shim="0", source=_ATTR, **more)


_ATTRIBUTES: Final = [
    _set("fchmod", probe.fchmod, 0o644),
    _set("fchmod.same", probe.fchmod, 0o600),
    _set("chmod.proc", probe.chmod, 0o640),
    _set("fchown.nobody", probe.fchown, "nobody"),
    _set("fchown.owner", probe.fchown, "owner"),
    _set("futimens.null", probe.utimens, None, None),
    _set("futimens.now", probe.utimens, UTIME_NOW, UTIME_NOW),
    _set("futimens.given", probe.utimens, 1, 2),
    _set("futimens.one", probe.utimens, UTIME_OMIT, UTIME_NOW),
    _set("futimens.omit", probe.utimens, UTIME_OMIT, UTIME_OMIT, gm="0"),
]


def _xattr(name: str, call: Any, *arguments: Any, memfd: Outcome, gm: Outcome = "EOPNOTSUPP",
           **more: Any) -> Row:  # fmt: skip
    return row(name, call, *arguments, gm=gm, memfd=memfd, source="__vfs_setxattr, vfs_getxattr",
               **more)  # fmt: skip


_V7_XATTR: Final = fuse("no-xattr", "EOPNOTSUPP", only=("v7",))
_XATTRS: Final = [
    _xattr("fsetxattr.user", probe.setxattr, "user.x", memfd="0", v7="EOPNOTSUPP"),
    _xattr("fsetxattr.trusted", probe.setxattr, "trusted.x", memfd="0",
           fuse=fuse("unprivileged", direct_io="EPERM") + _V7_XATTR),
    _xattr("fsetxattr.security", probe.setxattr, "security.x", memfd="0", fuse=_V7_XATTR),
    _xattr("fsetxattr.unknown", probe.setxattr, "nothing.x", memfd="EOPNOTSUPP"),
    _xattr("fsetxattr.no-name", probe.setxattr, "", gm="ERANGE", memfd="ERANGE"),
    _xattr("fsetxattr.long-name", probe.setxattr, "user." + "x" * 251, gm="ERANGE",
           memfd="ERANGE"),
    _xattr("fsetxattr.bad-flags", probe.setxattr, "user.x", 8, gm="EINVAL", memfd="EINVAL"),
    _xattr("fsetxattr.acl", probe.setxattr, "system.posix_acl_access", gm="EINVAL",
           memfd="EINVAL"),
    _xattr("fgetxattr.user", probe.getxattr, "user.x", memfd="ENODATA", v7="EOPNOTSUPP"),
    _xattr("fgetxattr.security", probe.getxattr, "security.x", memfd="ENODATA", fuse=_V7_XATTR),
    _xattr("fgetxattr.acl", probe.getxattr, "system.posix_acl_access", memfd="ENODATA",
           fuse=fuse("acl", passthrough="ENODATA")
           + fuse("acl", direct_io="EOPNOTSUPP", only=("v7",))),
    _xattr("fremovexattr.user", probe.removexattr, "user.x", memfd="ENODATA", v7="EOPNOTSUPP"),
    row("flistxattr", probe.listxattr, gm="0", memfd="0", source="vfs_listxattr"),
]  # fmt: skip

FIONREAD, FIONBIO, FIOASYNC, FIOCLEX, FIONCLEX = 0x541B, 0x5421, 0x5452, 0x5451, 0x5450
FIBMAP, FIGETBSZ, FIFREEZE, FITHAW, FIEMAP = 1, 2, 0xC0045877, 0xC0045878, 0xC020660B
FICLONE, FICLONERANGE, FIDEDUPERANGE = 0x40049409, 0x4020940D, 0xC0189436
GETFLAGS, SETFLAGS, FSGETXATTR, GETVERSION = 0x80086601, 0x40086602, 0x801C581F, 0x80087601
RESVSP, UNRESVSP, ZERO_RANGE = 0x40305828, 0x4030582A, 0x40305839
GETFSLABEL, GETFSUUID, ENABLE_VERITY = 0x81009431, 0x80111500, 0x40806685
FIOQSIZE, BLKGETSIZE64, NS_GET_NSTYPE = 0x5460, 0x80081272, 0xB703
PAGEMAP_SCAN, MEASURE_VERITY, GET_ENCRYPTION_POLICY = 0xC0606610, 0xC0046686, 0x400C6615
TCGETS, KVM_GET_API_VERSION, UNKNOWN = 0x5401, 0xAE00, 0x4008FFFF

_VFS: Final = "do_vfs_ioctl"
#: struct space_resv: l_type and l_whence, then l_start and l_len.
_SPACE: Final = (0, 0, 4096)


def _ioctl(name: str, request: int, *words: int, gm: Outcome, memfd: Outcome, **more: Any) -> Row:
    return row(f"ioctl.{name}", probe.ioctl, request, *words, gm=gm, memfd=memfd, source=_VFS,
               **more)  # fmt: skip


def _int(name: str, request: int, value: int, gm: Outcome, memfd: Outcome, **more: Any) -> Row:
    return row(f"ioctl.{name}", probe.ioctl_int, request, value, gm=gm, memfd=memfd, source=_VFS,
               **more)  # fmt: skip


def _regular(answer: Outcome) -> tuple[Differs, ...]:
    """do_vfs_ioctl asks file_ioctl() for regular files only; anonymous inodes are none of them."""
    return fuse("regular-file", answer, only=("guest_memfd", "v7", "shim"))


_IOCTLS: Final = [
    _int("FIONREAD", FIONREAD, 0, "ENOTTY", str(SIZE), resizable=str(SIZE),
         fuse=_regular(str(SIZE))),
    _int("FIONBIO", FIONBIO, 1, "1", "1"),
    _int("FIOASYNC", FIOASYNC, 0, "0", "0"),
    _int("FIOASYNC-on", FIOASYNC, 1, "ENOTTY", "ENOTTY"),
    _int("FIGETBSZ", FIGETBSZ, 0, "4096", "4096"),
    _ioctl("FIOQSIZE", FIOQSIZE, 0, gm="ENOTTY", memfd="0", resizable="0", fuse=_regular("0")),
    _ioctl("BLKGETSIZE64", BLKGETSIZE64, 0, gm="ENOTTY", memfd="ENOTTY"),
    _ioctl("NS_GET_NSTYPE", NS_GET_NSTYPE, 0, gm="ENOTTY", memfd="ENOTTY"),
    _ioctl("PAGEMAP_SCAN", PAGEMAP_SCAN, 0, gm="ENOTTY", memfd="ENOTTY"),
    _ioctl("FS_IOC_MEASURE_VERITY", MEASURE_VERITY, 0, gm="ENOTTY", memfd="ENOTTY"),
    _ioctl("FS_IOC_GET_ENCRYPTION_POLICY", GET_ENCRYPTION_POLICY, 0, gm="ENOTTY",
           memfd="ENOTTY"),
    _ioctl("FIOCLEX", FIOCLEX, gm="0", memfd="0"),
    _ioctl("FIONCLEX", FIONCLEX, gm="0", memfd="0"),
    _int("FIBMAP", FIBMAP, 0, "ENOTTY", "EINVAL", resizable="0",
         fuse=fuse("unprivileged", direct_io="EPERM") + _regular("0")),
    _ioctl("FIEMAP", FIEMAP, 0, SIZE, gm="EOPNOTSUPP", memfd="EOPNOTSUPP"),
    _ioctl("FIFREEZE", FIFREEZE, gm="EOPNOTSUPP", memfd="EOPNOTSUPP"),
    _ioctl("FITHAW", FITHAW, gm="EINVAL", memfd="EINVAL"),
    _ioctl("FS_IOC_GETFLAGS", GETFLAGS, gm="ENOTTY", memfd="0", v7="ENOTTY"),
    _ioctl("FS_IOC_SETFLAGS", SETFLAGS, 0, gm="ENOTTY", memfd="0", v7="ENOTTY"),
    _ioctl("FS_IOC_FSGETXATTR", FSGETXATTR, gm="ENOTTY", memfd="0", v7="ENOTTY"),
    _ioctl("FS_IOC_GETVERSION", GETVERSION, gm="ENOTTY", memfd="ENOTTY"),
    _ioctl("FS_IOC_RESVSP", RESVSP, *_SPACE, gm="ENOTTY", memfd="0", resizable="0",
           fuse=_regular("0")),
    _ioctl("FS_IOC_UNRESVSP", UNRESVSP, *_SPACE, gm="ENOTTY", memfd="0", resizable="0",
           fuse=_regular("0")),
    _ioctl("FS_IOC_ZERO_RANGE", ZERO_RANGE, *_SPACE, gm="ENOTTY", memfd="EOPNOTSUPP", resizable="0",
           fuse=_regular("EOPNOTSUPP")),
    _ioctl("FS_IOC_GETFSLABEL", GETFSLABEL, gm="ENOTTY", memfd="ENOTTY"),
    _ioctl("FS_IOC_GETFSUUID", GETFSUUID, gm="ENOTTY", memfd="0", v7="ENOTTY",
           since=(6, 9)),
    _ioctl("FS_IOC_ENABLE_VERITY", ENABLE_VERITY, gm="ENOTTY", memfd="ENOTTY"),
    _ioctl("TCGETS", TCGETS, gm="ENOTTY", memfd="ENOTTY"),
    _ioctl("KVM_GET_API_VERSION", KVM_GET_API_VERSION, gm="ENOTTY", memfd="ENOTTY"),
    _ioctl("unknown", UNKNOWN, gm="ENOTTY", memfd="ENOTTY"),
    *(
        row(f"ioctl.{name}.{direction}", probe.clone, request, direction, gm=gm, memfd="EOPNOTSUPP",
            source="vfs_clone_file_range", fuse=fuse("other-mount", elsewhere, only=("v7",)))
        for name, request in (("FICLONE", FICLONE), ("FICLONERANGE", FICLONERANGE))
        for direction, gm, elsewhere in (
            ("from", "EXDEV", "EXDEV"), ("to", "EXDEV", "EXDEV"), ("self", "EOPNOTSUPP", "")
        )
    ),
    row("ioctl.FIDEDUPERANGE.from", probe.clone, FIDEDUPERANGE, "from", gm="EOPNOTSUPP",
        memfd="EOPNOTSUPP", source="vfs_dedupe_file_range"),
    row("ioctl.FIDEDUPERANGE.self", probe.clone, FIDEDUPERANGE, "self", gm="EOPNOTSUPP",
        memfd="EOPNOTSUPP", source="vfs_dedupe_file_range"),
]  # fmt: skip

_NAMES: Final = [
    row("linkat.empty-path", probe.link_elsewhere, gm="EXDEV", memfd="EXDEV", source="do_linkat"),
    row("name_to_handle_at", probe.handle, gm="EOPNOTSUPP", memfd="0", v7="0",
        source="exportfs_can_encode_fh", fuse=fuse("file-system", "0")),
    row("execveat", probe.execute, gm="EACCES", memfd="ENOEXEC", source="noexec: do_open_execat",
        fuse=fuse("noexec", "EACCES", only=("v7",))),
    row("swapon", probe.swap_on, gm="ENXIO", memfd="EINVAL", source="swapon opens the path",
        fuse=fuse("unprivileged", direct_io="EPERM")
        + fuse("swap-header", "EPERM", only=("v7",)) + fuse("reopens", "EINVAL")),
]  # fmt: skip

ROWS: Final = [*_STAT, *_SYNC, *_ATTRIBUTES, *_XATTRS, *_IOCTLS, *_NAMES]
