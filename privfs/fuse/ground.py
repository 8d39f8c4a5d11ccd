# SPDX-License-Identifier: GPL-2.0-or-later
"""The mount point around a mount: dead mounts before it, sockets in it, its end from outside.

A socket that is bound in a mount keeps it busy, and umount(8) would always fail.  So ours are
bound through a detached clone of the mount (:mod:`privfs.fuse.clone`): they are found by inode
(``unix_find_socket_byinode``) wherever the mount is seen, and keep only the clone busy.  The clone
also keeps the superblock alive, so it is the mount table that tells us of an unmount.  Where no
clone is to be had the mount is *pinned* by its own sockets, and says so.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import select
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from privfs.fuse.clone import clone

log = logging.getLogger(__name__)

TYPE: Final = "fuse.privfs"

_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


class MountError(OSError):
    """The mount could not be made; ``errno`` and text say why and what to do."""


def clear(mountpoint: str) -> None:
    """Make sure that ``mountpoint`` is a directory; clear a dead privfs mount off it."""
    try:
        if not os.path.isdir(mountpoint):
            os.stat(mountpoint)
            raise MountError(errno.ENOTDIR, f"{mountpoint} is not a directory: name one")
        os.statvfs(mountpoint)  # asks the mount; a dead one's attributes may still be cached
        living = newest(mountpoint)
        if living is None or living.type != TYPE:
            _may_mount_on(mountpoint)
            return
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise MountError(errno.ENOENT, f"{mountpoint} does not exist: mkdir it first") from None
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise
    else:
        raise MountError(
            errno.EBUSY,
            f"{mountpoint}: a privfs is mounted there already; "
            f"unmount it first: privfs umount {mountpoint}",
        )
    dead = newest(mountpoint)
    if dead is None or dead.type != TYPE:
        raise MountError(
            errno.ENOTCONN,
            f"{mountpoint}: a dead FUSE mount, but not of privfs; "
            f"clear it with: fusermount3 -u -z {mountpoint}",
        )
    log.warning("%s: a privfs that served it was killed; clearing its dead mount", mountpoint)
    unmount(mountpoint)


def _may_mount_on(mountpoint: str) -> None:
    """Refuse what fusermount3 would refuse (fusermount.c, check_perm), with what to do."""
    if os.geteuid() == 0:
        return
    found = os.stat(mountpoint)
    sticky = found.st_mode & stat.S_ISVTX and found.st_uid != os.getuid()
    if sticky or not os.access(mountpoint, os.W_OK):
        raise MountError(
            errno.EACCES,
            f"{mountpoint}: without root, only a directory of your own can be mounted on; "
            f"mkdir one, or as root: chown {os.getuid()} {mountpoint}",
        )


def unmount(mountpoint: str, *, lazy: bool = True) -> None:
    """Unmount; what is in use vanishes when ``lazy``, else raises MountError(EBUSY)."""
    tool = shutil.which("fusermount3") or shutil.which("fusermount")
    if tool is None:
        raise MountError(errno.ENOENT, "fusermount3 not found: apt install fuse3")
    how = ["-u", "-z"] if lazy else ["-u"]
    done = subprocess.run([tool, *how, "--", mountpoint], capture_output=True, check=False)
    if done.returncode:
        raise MountError(
            errno.EBUSY, f"cannot unmount {mountpoint}: {done.stderr.decode().strip()}"
        )


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of the mount table."""

    id: int
    dev: int
    place: str
    type: str
    source: str


def mounts() -> list[Mount]:
    """Return the mount table, oldest first (proc_pid_mountinfo(5))."""
    with open("/proc/self/mountinfo", "rb") as table:
        return _parse(table)


def _parse(table: Iterable[bytes]) -> list[Mount]:
    found = []
    for line in table:
        fields = line.split()
        kind, source = fields[fields.index(b"-") + 1 :][:2]
        major, minor = map(int, fields[2].split(b":"))
        found.append(
            Mount(
                int(fields[0]), os.makedev(major, minor),
                _plain(fields[4]), kind.decode(), _plain(source),
            )
        )  # fmt: skip
    return found


def _plain(field: bytes) -> str:
    """Undo the octal escapes of the mount table."""
    return os.fsdecode(_ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), field))


def newest(mountpoint: str) -> Mount | None:
    """Return the mount that is seen at ``mountpoint``, None if nothing is mounted there.

    Asks the mount itself only where ``mountpoint`` is not written as in the mount table.
    """
    return seen_at(os.path.abspath(mountpoint)) or seen_at(os.path.realpath(mountpoint))


def seen_at(place: str) -> Mount | None:
    """Return the mount at ``place``, an absolute path without symlinks; makes no request."""
    here = [mount for mount in mounts() if mount.place == place]
    return here[-1] if here else None


@dataclass(frozen=True, slots=True)
class Ground:
    """A living mount: its device and its id in the mount table.

    ``pinned``: our own sockets keep it busy, so that only a lazy unmount succeeds.
    """

    dev: int
    mount_id: int
    pinned: bool


def settle(mountpoint: str, sockets: dict[str, tuple[socket.socket, int]]) -> Ground:
    """Bind and listen on ``sockets`` (path inside the mount → socket, permissions).

    Makes requests into the mount: call it in a worker thread while the mount is served.
    """
    found = newest(mountpoint)
    if found is None:
        raise MountError(errno.ENOENT, f"{mountpoint}: was unmounted while it was being set up")
    dev = os.stat(mountpoint).st_dev
    with _way_in(mountpoint) as (root, pinned):
        for path, (sock, mode) in sockets.items():
            folder, name = os.path.split(path)
            fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
            os.fchmod(sock.fileno(), mode)  # unix_bind_bsd: i_mode of the socket & ~umask
            before = os.umask(0)
            try:
                sock.bind(f"/proc/self/fd/{fd}/{name}")
            finally:
                os.umask(before)
                os.close(fd)
            sock.listen(64)
    return Ground(dev, found.id, pinned)


@contextmanager
def _way_in(mountpoint: str) -> Iterator[tuple[int, bool]]:
    """Open the root of the mount through a detached clone, or directly where that is refused.

    Yields the descriptor, and whether what is made through it keeps the mount busy.
    """
    pinned = False
    try:
        fd = clone(mountpoint)
    except OSError as error:
        log.info(
            "%s: no detached clone: %s; umount will say 'busy', end the mount with privfs umount",
            mountpoint, error.strerror,
        )  # fmt: skip
        pinned = True
        fd = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd, pinned
    finally:
        os.close(fd)


class Watch:
    """Calls ``gone`` once, from a thread, when a mount has left the mount table."""

    def __init__(self, ground: Ground, gone: Callable[[], None]) -> None:
        self._ground = ground
        self._gone = gone
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="mount table", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)

    def _run(self) -> None:
        with open("/proc/self/mountinfo", "rb", buffering=0) as table:
            poll = select.poll()
            poll.register(table, select.POLLPRI | select.POLLERR)  # proc(5): the table changed
            poll.register(self._stop, select.POLLIN)
            # What is open already is read again: there may be no descriptor left for another one.
            while any(m.id == self._ground.mount_id for m in _parse(table.read().splitlines())):
                if any(fd == self._stop for fd, _ in poll.poll()):
                    return
                table.seek(0)
        self._gone()
