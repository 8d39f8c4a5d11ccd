# SPDX-License-Identifier: GPL-2.0-or-later
"""A detached clone of a mount: what lies in it keeps the clone busy, never the mount.

open_tree(2) with OPEN_TREE_CLONE needs CAP_SYS_ADMIN over the mount namespace.  A user without it
has it in a user namespace of their own: a child makes one, with a mount namespace in which the
mount is seen as well (user_namespaces(7)), clones there and hands the clone over; it outlives the
child.  The child keeps its uid, so FUSE lets it in (fuse_allow_current_process).

Run as a program this file is that child; so it imports nothing of privfs.
"""

from __future__ import annotations

import array
import ctypes
import os
import socket
import subprocess
import sys
from typing import Final

_SYS_OPEN_TREE: Final = 428
_AT_FDCWD: Final = -100
_OPEN_TREE_CLONE: Final = 1
_CLONE_NEWNS: Final = 0x0002_0000
_CLONE_NEWUSER: Final = 0x1000_0000
#: Seconds that the child may take; it does next to nothing.
_PATIENCE: Final = 20.0

_libc = ctypes.CDLL(None, use_errno=True)


def clone(mountpoint: str) -> int:
    """Return an O_PATH descriptor of the root of a detached clone; raises OSError.

    Looks the mount point up: call it while the mount is served, from another thread.
    """
    try:
        return _open_tree(mountpoint)
    except PermissionError:
        return _cloned_by_child(mountpoint)


def _open_tree(mountpoint: str) -> int:
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    fd: int = _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(mountpoint), flags)
    if fd < 0:
        raise OSError(ctypes.get_errno(), f"open_tree: {os.strerror(ctypes.get_errno())}")
    return fd


def _cloned_by_child(mountpoint: str) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            ours.settimeout(_PATIENCE)
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", os.path.abspath(__file__), str(theirs.fileno()),
                 mountpoint],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            answer, fds, _, _ = socket.recv_fds(ours, 256, 1)
        finally:
            child.kill()
            child.wait()
    if not fds:
        code = int(answer or 0)
        raise OSError(code, f"unshare: {os.strerror(code)}" if code else "the child has died")
    os.set_inheritable(fds[0], False)
    return fds[0]


def _child(channel: socket.socket, mountpoint: str) -> None:
    """Send the clone, or the errno that came instead of it."""
    try:
        if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        fds = array.array("i", [_open_tree(mountpoint)])
    except OSError as error:
        channel.send(str(error.errno).encode())
    else:
        channel.sendmsg([b"0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _channel:
        _child(_channel, sys.argv[2])
