# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows: the file among paths, mounts, handles and watchers.

Anonymous files lie on mounts that are in nobody's tree (MNT_INTERNAL, SB_NOUSER) and have a magic
link as their only path; a file of a mount has a place like any other.
"""

from __future__ import annotations

from typing import Final

from privfs.testing.conformance import probes_places as probe
from privfs.testing.conformance.row import SIZE, Row, fuse, row

NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, BENEATH, IN_ROOT, CACHED = 1, 2, 4, 8, 0x10, 0x20

_RESOLVED: Final = [
    row(f"openat2.{name}", probe.resolve, how, gm=answer, memfd=answer,
        source="RESOLVE_*: nd_jump_link, handle_dots, set_root (fs/namei.c)")
    for name, how, answer in (
        ("no-xdev", NO_XDEV, "EXDEV"), ("no-magiclinks", NO_MAGICLINKS, "ELOOP"),
        ("no-symlinks", NO_SYMLINKS, "ELOOP"), ("beneath", BENEATH, "EXDEV"),
        ("in-root", IN_ROOT, "ENOENT"), ("no-restriction", 0, "0"),
    )
]  # fmt: skip

_PATHS: Final = [
    row("openat2.below", probe.below, "x", gm="ENOTDIR", memfd="ENOTDIR", source="link_path_walk"),
    row("openat2.nothing-below", probe.below, "", gm="ENOENT", memfd="ENOENT", source="getname"),
    row("unlink.magic-link", probe.unlink, gm="EPERM", memfd="EPERM", source="proc has no unlink"),
    row("bind.magic-link", probe.socket_at, "bind", gm="EADDRINUSE", memfd="EADDRINUSE",
        source="unix_bind_bsd"),
    row("connect.magic-link", probe.socket_at, "connect", gm="ECONNREFUSED",
        memfd="ECONNREFUSED", source="unix_find_bsd: S_ISSOCK"),
    row("truncate.path-same", probe.truncate_place, SIZE, gm="EINVAL", memfd="0", v7="EPERM",
        shim="EPERM", resizable="0", source="vfs_truncate, then ->setattr"),
    row("fchownat.path", probe.chown_empty_path, gm="EINVAL", memfd="0", shim="0",
        source="do_fchownat, then ->setattr"),
    row("linkat.beside", probe.link_beside, gm="EXDEV", memfd="EXDEV", resizable="0",
        source="do_linkat: one mount", fuse=fuse("named", "0")),
]  # fmt: skip

_MOUNTS: Final = [
    row("open_tree", probe.tree, 0, gm="0", memfd="0", source="open_tree: as O_PATH"),
    row("open_tree.clone", probe.tree, 1, gm="EINVAL", memfd="EINVAL", resizable="0",
        source="__do_loopback: check_mnt", fuse=fuse("named", "0")),
    row("landlock.rule", probe.landlock, gm="EBADFD", memfd="EBADFD", resizable="0",
        source="get_path_from_fd: MNT_INTERNAL, SB_NOUSER", fuse=fuse("named", "0")),
]  # fmt: skip

_HANDLES: Final = [
    row("name_to_handle_at.fid", probe.handle_fid, gm="0", memfd="0", v7=None, shim=None,
        resizable="0", source="exportfs_encode_fid: any file has an inode number", since=(6, 6)),
    row("open_by_handle_at", probe.open_handle, gm="EOPNOTSUPP", memfd="0", resizable="0",
        source="exportfs_can_decode_fh",
        fuse=fuse("unprivileged", direct_io="EPERM") + fuse("file-system", passthrough="0")),
    row("file_getattr", probe.file_attributes, gm="EOPNOTSUPP", memfd="0", v7=None, shim=None,
        resizable="EOPNOTSUPP", source="vfs_fileattr_get: no ->fileattr_get", since=(6, 17)),
]  # fmt: skip

_WATCHED: Final = [
    row("fanotify.mark", probe.fanotify, False, gm="0", memfd="0", source="fanotify_mark",
        fuse=fuse("unprivileged", direct_io="EPERM")),
    row("fanotify.punch", probe.fanotify, True, gm="silent", memfd="silent", v7="MODIFY",
        shim="MODIFY", source="fsnotify_modify; off for pseudo files since Linux 6.14",
        since=(6, 14),
        fuse=fuse("unprivileged", direct_io="EPERM")
        + fuse("named", passthrough="MODIFY", only=("guest_memfd",))),
]  # fmt: skip

ROWS: Final[list[Row]] = [*_RESOLVED, *_PATHS, *_MOUNTS, *_HANDLES, *_WATCHED]
