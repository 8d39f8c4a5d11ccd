# SPDX-License-Identifier: GPL-2.0-or-later
"""The checks and the moves that the tree of names is made of.

A check raises NamespaceError and changes nothing; a move changes names, parents and link counts
after every check has passed.
"""

from __future__ import annotations

import errno

from privfs.inode import Directory, Inode, NamespaceError

NAME_MAX = 255  # bytes, linux/limits.h
RESERVED_NAME = b".privfs"


def must_be_a_name(operation: str, name: bytes) -> None:
    """Raise ENAMETOOLONG or EINVAL for what no directory entry can be called."""
    if len(name) > NAME_MAX:
        why = f"the name has {len(name)} bytes, {NAME_MAX} are possible"
        raise NamespaceError(errno.ENAMETOOLONG, operation, name, why)
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise NamespaceError(errno.EINVAL, operation, name, "it cannot be a name")


def changed(directory: Directory, now_ns: int) -> None:
    """Note that the names of a directory have changed."""
    directory.mtime_ns = directory.ctime_ns = now_ns


def must_be_linked(operation: str, directory: Directory) -> None:
    """Raise ENOENT for a directory that has been removed (IS_DEADDIR in fs/namei.c)."""
    if directory.nlink == 0:
        why = "the directory has been removed"
        raise NamespaceError(errno.ENOENT, operation, directory.ino, why)


def must_not_be_reserved(operation: str, inode: Inode) -> None:
    """Raise EPERM for what belongs to the mount itself."""
    if inode.reserved:
        why = f"{RESERVED_NAME.decode()} and what lies in it belong to the mount"
        raise NamespaceError(errno.EPERM, operation, inode.ino, why)


def must_be_empty(operation: str, name: bytes, directory: Directory) -> None:
    """Raise ENOTEMPTY for a directory that holds names."""
    if len(directory.names):
        why = f"it holds {len(directory.names)} names; remove them first"
        raise NamespaceError(errno.ENOTEMPTY, operation, name, why)


def must_be_replaceable(name: bytes, source: Inode, target: Inode) -> None:
    """Raise unless *source* may take the place of *target*: may_delete(), shmem_rename2().

    Errors: ENOTDIR, EISDIR, ENOTEMPTY.
    """
    if not isinstance(target, Directory):
        if isinstance(source, Directory):
            raise NamespaceError(errno.ENOTDIR, "rename", name, "a directory cannot replace it")
    elif not isinstance(source, Directory):
        raise NamespaceError(errno.EISDIR, "rename", name, "only a directory can replace it")
    else:
        must_be_empty("rename", name, target)


def adopt(inode: Inode, old: Directory, new: Directory) -> None:
    """Note that a directory has moved: ".." counts as a link of what it leads to."""
    if isinstance(inode, Directory) and old is not new:
        inode.parent = new.ino
        old.nlink -= 1
        new.nlink += 1


def move(
    old: tuple[Directory, bytes],
    source: Inode,
    new: tuple[Directory, bytes],
    target: Inode | None,
    exchange: bool,
) -> None:
    """Change names, parents and link counts for a rename that has passed every check."""
    (old_directory, old_name), (new_directory, new_name) = old, new
    if target is None and old_directory is new_directory:
        old_directory.names.rename(old_name, new_name)
        return
    if target is None:
        old_directory.names.remove(old_name)
        new_directory.names.add(new_name, source.ino)
    elif exchange:
        old_directory.names.replace(old_name, target.ino)
        new_directory.names.replace(new_name, source.ino)
        adopt(target, new_directory, old_directory)
    else:
        old_directory.names.remove(old_name)
        new_directory.names.replace(new_name, source.ino)
        target.nlink -= 1
        if isinstance(target, Directory):
            target.nlink = 0
            new_directory.nlink -= 1
    adopt(source, old_directory, new_directory)
