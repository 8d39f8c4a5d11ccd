# SPDX-License-Identifier: GPL-2.0-or-later
"""The tree of names of a mount, as on tmpfs: a value machine without input or output.

It knows names, kinds, permissions, times and the counts that keep an inode alive; the size and the
pages of a file belong to the file's memory. An operation is checked whole before anything changes;
a refusal is a NamespaceError with the errno that tmpfs gives, in the order in which the kernel
checks (do_renameat2, vfs_rename, may_delete, may_create, vfs_link in fs/namei.c; shmem_rename2,
shmem_rmdir in mm/shmem.c).

Who may do what is not asked here. The mount uses default_permissions, so the kernel checks mode,
owner and group against the attributes that we report (generic_permission, setattr_prepare); and
whatever the mount options, may_delete() lets only the owner of a file, the owner of its directory,
or CAP_FOWNER unlink or rename in a directory with the sticky bit (check_sticky). The kernel also
drops set-id bits where a chown or a chmod by a stranger asks for it, and sends us the mode that is
left.

The root holds one reserved directory, ``.privfs``. What lies in it is made with trusted=True by the
mount itself; ordinary users get EPERM for creating, linking, removing and renaming there.

An inode lives as long as it has a name, is known to the kernel (lookup count: every operation that
answers with an entry adds one, FORGET takes away) or is open. Operations that can end its life
return the inode numbers that are dead now, so that their memory can be destroyed. Inode numbers
are never used twice. Times come in as now_ns, nanoseconds since the epoch.
"""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass

from privfs.inode import Attributes, Directory, DirectoryEntry, Inode, Kind, NamespaceError
from privfs.inodes import MAX_INODES, MODE_BITS, Inodes
from privfs.naming import (
    RESERVED_NAME,
    changed,
    move,
    must_be_a_name,
    must_be_empty,
    must_be_linked,
    must_be_replaceable,
    must_not_be_reserved,
)

ROOT_INO = 1  # FUSE_ROOT_ID, linux/fuse.h
TARGET_MAX = 4095  # PATH_MAX less the final NUL
RENAME_NOREPLACE = 1  # linux/fs.h
RENAME_EXCHANGE = 2

_MKDIR_BITS = 0o1777  # vfs_mkdir drops set-id bits; a set-group-ID parent adds one again
_MKNOD_KINDS = {0: Kind.FILE, **{k.value: k for k in (Kind.FILE, Kind.SOCKET, Kind.FIFO)}}


@dataclass(frozen=True, slots=True)
class Removal:
    """A name is gone: what it stood for, the names left to that inode, and who is dead now."""

    ino: int
    nlink: int
    dead: tuple[int, ...]


class Namespace(Inodes):
    """All names of one mount. Methods take and give inode numbers and names as bytes."""

    def __init__(
        self, now_ns: int, uid: int = 0, gid: int = 0, mode: int = 0o755, limit: int = MAX_INODES
    ) -> None:
        super().__init__(limit)
        times = (now_ns, now_ns, now_ns)
        root = Directory(ROOT_INO, Kind.DIRECTORY, mode & MODE_BITS, uid, gid, 2, *times)
        root.parent = ROOT_INO
        root.lookups = 1  # the kernel knows the root from the start
        self._add(root)
        made = self.mkdir(ROOT_INO, RESERVED_NAME, 0o755, uid, gid, now_ns, trusted=True)
        self._inode("mkdir", made.ino).reserved = True
        self.reserved_ino = made.ino
        self.forget(made.ino, 1)

    # ---- looking

    def lookup(self, parent: int, name: bytes) -> Attributes:
        """Find a name ("." and ".." too) and count one lookup of what it stands for.

        Errors: ENOENT, ENOTDIR, ENAMETOOLONG.
        """
        directory = self._directory("lookup", parent)
        if name in (b".", b".."):
            ino = parent if name == b"." else directory.parent
            return self._known(self._inode("lookup", ino))
        return self._known(self._child("lookup", directory, name))

    def readlink(self, ino: int) -> bytes:
        """Return the target of a symlink. Errors: EINVAL for anything else."""
        inode = self._inode("readlink", ino)
        if inode.kind is not Kind.SYMLINK:
            raise NamespaceError(errno.EINVAL, "readlink", ino, "it is not a symbolic link")
        return inode.target

    def readdir(self, ino: int, after: int = 0, count: int = 1 << 30) -> list[DirectoryEntry]:
        """Return up to *count* entries behind the cookie *after*, "." and ".." first.

        Counts no lookup; remember() does. A scan that stops at the last_cookie() of its beginning
        ends even if names arrive as fast as it reads. Errors: ENOTDIR, ENOENT if removed.
        """
        directory = self._directory("readdir", ino)
        must_be_linked("readdir", directory)
        found = [
            DirectoryEntry(name, number, Kind.DIRECTORY, cookie)
            for cookie, name, number in ((1, b".", ino), (2, b"..", directory.parent))
            if cookie > after
        ][:count]
        for cookie, name, number in directory.names.after(after, count - len(found)):
            found.append(DirectoryEntry(name, number, self._inode("readdir", number).kind, cookie))
        return found

    def last_cookie(self, ino: int) -> int:
        """Return the cookie of the newest entry that a directory has had. Errors: ENOTDIR."""
        return self._directory("readdir", ino).names.last_cookie

    # ---- making

    def create(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        now_ns: int,
        *,
        trusted: bool = False,
    ) -> Attributes:
        """Make a file. Errors: EEXIST, ENOENT (directory removed), ENOSPC, EPERM (reserved)."""
        return self._make("create", parent, name, Kind.FILE, mode, uid, gid, now_ns, trusted)

    def mkdir(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        now_ns: int,
        *,
        trusted: bool = False,
    ) -> Attributes:
        """Make a directory; it inherits the set-group-ID bit. Errors: as create."""
        mode &= _MKDIR_BITS
        return self._make("mkdir", parent, name, Kind.DIRECTORY, mode, uid, gid, now_ns, trusted)

    def mknod(
        self,
        parent: int,
        name: bytes,
        st_mode: int,
        uid: int,
        gid: int,
        now_ns: int,
        *,
        trusted: bool = False,
    ) -> Attributes:
        """Make a FIFO, a socket or a file, by the S_IFMT part of st_mode (none: a file).

        Errors: EPERM for a device or a directory, EINVAL for no known kind, else as create.
        """
        kind = _MKNOD_KINDS.get(stat.S_IFMT(st_mode))
        if kind is None:
            known = (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR)
            code = errno.EPERM if stat.S_IFMT(st_mode) in known else errno.EINVAL
            why = f"mode {st_mode:#o} is not that of a file, FIFO or socket; no device lives here"
            raise NamespaceError(code, "mknod", name, why)
        return self._make("mknod", parent, name, kind, st_mode, uid, gid, now_ns, trusted)

    def symlink(
        self,
        parent: int,
        name: bytes,
        target: bytes,
        uid: int,
        gid: int,
        now_ns: int,
        *,
        trusted: bool = False,
    ) -> Attributes:
        """Make a symlink. Errors: ENOENT (empty target), ENAMETOOLONG, else as create."""
        if not target or len(target) > TARGET_MAX:
            code = errno.ENAMETOOLONG if target else errno.ENOENT
            why = f"its target has {len(target)} bytes; 1 to {TARGET_MAX} are possible"
            raise NamespaceError(code, "symlink", name, why)
        return self._make(
            "symlink", parent, name, Kind.SYMLINK, 0o777, uid, gid, now_ns, trusted, target
        )

    def link(self, ino: int, parent: int, name: bytes, now_ns: int) -> Attributes:
        """Give an inode one more name. Errors: EPERM (directory, reserved), else as create."""
        inode = self._inode("link", ino)
        directory = self._room_for("link", parent, name, trusted=False)
        if isinstance(inode, Directory):
            raise NamespaceError(errno.EPERM, "link", ino, "a directory has one name only")
        must_not_be_reserved("link", inode)
        if inode.nlink == 0:
            raise NamespaceError(errno.ENOENT, "link", ino, "its last name is gone for good")
        inode.nlink += 1
        inode.ctime_ns = now_ns
        directory.names.add(name, ino)
        changed(directory, now_ns)
        return self._known(inode)

    # ---- removing and renaming

    def unlink(self, parent: int, name: bytes, now_ns: int, *, trusted: bool = False) -> Removal:
        """Remove a name that is no directory. Errors: ENOENT, EISDIR, EPERM (reserved)."""
        directory = self._directory("unlink", parent)
        inode = self._child("unlink", directory, name)
        if not trusted:
            must_not_be_reserved("unlink", inode)
        if isinstance(inode, Directory):
            raise NamespaceError(errno.EISDIR, "unlink", name, "it is a directory; use rmdir")
        directory.names.remove(name)
        changed(directory, now_ns)
        inode.nlink -= 1
        inode.ctime_ns = now_ns
        return Removal(inode.ino, inode.nlink, self._bury(inode))

    def rmdir(self, parent: int, name: bytes, now_ns: int, *, trusted: bool = False) -> Removal:
        """Remove an empty directory. Errors: ENOENT, ENOTDIR, ENOTEMPTY, EPERM (reserved)."""
        directory = self._directory("rmdir", parent)
        inode = self._child("rmdir", directory, name)
        if not trusted or inode.ino == self.reserved_ino:
            must_not_be_reserved("rmdir", inode)
        if not isinstance(inode, Directory):
            raise NamespaceError(errno.ENOTDIR, "rmdir", name, "it is no directory; use unlink")
        must_be_empty("rmdir", name, inode)
        directory.names.remove(name)
        directory.nlink -= 1
        changed(directory, now_ns)
        inode.nlink = 0
        inode.ctime_ns = now_ns
        return Removal(inode.ino, 0, self._bury(inode))

    def rename(
        self,
        old_parent: int,
        old_name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int,
        now_ns: int,
    ) -> Removal | None:
        """Move a name, with RENAME_NOREPLACE or RENAME_EXCHANGE; tell what was replaced, if any.

        Errors: EINVAL (other flags, a directory into itself), ENOENT, EEXIST, ENOTDIR, EISDIR,
        ENOTEMPTY, ENAMETOOLONG, EPERM (reserved, even for the mount itself).
        """
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            why = f"flags {flags:#x}; use RENAME_NOREPLACE or RENAME_EXCHANGE, one of them"
            raise NamespaceError(errno.EINVAL, "rename", old_name, why)
        old_directory = self._directory("rename", old_parent)
        new_directory = self._directory("rename", new_parent)
        source = self._child("rename", old_directory, old_name)
        target = self._found("rename", new_directory, new_name)
        exchange = flags == RENAME_EXCHANGE
        if target is not None and flags == RENAME_NOREPLACE:
            raise NamespaceError(errno.EEXIST, "rename", new_name, "it exists; NOREPLACE was asked")
        if target is None and exchange:
            raise NamespaceError(errno.ENOENT, "rename", new_name, "nothing to exchange with")
        if self._is_above(source, new_directory):
            raise NamespaceError(errno.EINVAL, "rename", old_name, "it would move into itself")
        if target is not None and self._is_above(target, old_directory):
            code = errno.EINVAL if exchange else errno.ENOTEMPTY
            raise NamespaceError(code, "rename", new_name, "it holds what is to be renamed")
        if target is source:
            return None  # two names of one inode: both stay, rename(2)
        for inode in filter(None, (source, new_directory, target)):
            must_not_be_reserved("rename", inode)
        if target is not None and not exchange:
            must_be_replaceable(new_name, source, target)

        old, new = (old_directory, old_name), (new_directory, new_name)
        move(old, source, new, target, exchange)
        for inode in filter(None, (source, target)):
            inode.ctime_ns = now_ns
        changed(old_directory, now_ns)
        changed(new_directory, now_ns)
        if target is None or exchange:
            return None
        return Removal(target.ino, target.nlink, self._bury(target))

    # ---- steps of the above

    def _found(self, operation: str, directory: Directory, name: bytes) -> Inode | None:
        """Return what a name stands for, if anything. Errors: ENOENT, ENAMETOOLONG, EINVAL."""
        must_be_linked(operation, directory)
        must_be_a_name(operation, name)
        ino = directory.names.get(name)
        return None if ino is None else self._inode(operation, ino)

    def _child(self, operation: str, directory: Directory, name: bytes) -> Inode:
        """Return what a name stands for. Errors: as _found, and ENOENT for an unknown name."""
        inode = self._found(operation, directory, name)
        if inode is None:
            why = f"no such name in directory {directory.ino}"
            raise NamespaceError(errno.ENOENT, operation, name, why)
        return inode

    def _room_for(self, operation: str, parent: int, name: bytes, trusted: bool) -> Directory:
        """Return the directory that can take a new name. Errors: EEXIST, EPERM, as _found."""
        directory = self._directory(operation, parent)
        if self._found(operation, directory, name) is not None:
            raise NamespaceError(errno.EEXIST, operation, name, "the name is taken")
        if not trusted:
            must_not_be_reserved(operation, directory)
        return directory

    def _make(
        self,
        operation: str,
        parent: int,
        name: bytes,
        kind: Kind,
        mode: int,
        uid: int,
        gid: int,
        now_ns: int,
        trusted: bool,
        target: bytes = b"",
    ) -> Attributes:
        """Make an inode with one name; see inode_init_owner() in fs/inode.c."""
        directory = self._room_for(operation, parent, name, trusted)
        ino = self._next_ino(operation, name)
        mode &= MODE_BITS
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
            mode |= stat.S_ISGID if kind is Kind.DIRECTORY else 0
        times = (now_ns, now_ns, now_ns)
        inode: Inode
        if kind is Kind.DIRECTORY:
            inode = Directory(ino, kind, mode, uid, gid, 2, *times, parent=parent)
            directory.nlink += 1
        else:
            inode = Inode(ino, kind, mode, uid, gid, 1, *times, target=target)
        inode.reserved = directory.reserved
        self._add(inode)
        directory.names.add(name, ino)
        changed(directory, now_ns)
        return self._known(inode)

    def _is_above(self, inode: Inode, directory: Directory) -> bool:
        """Whether an inode is a directory or one of those above it."""
        while directory is not inode:
            if directory.ino == ROOT_INO:
                return False
            directory = self._directory("rename", directory.parent)
        return True
