# SPDX-License-Identifier: GPL-2.0-or-later
"""Becomes the program: ``python -m kvmsim.exec.launch SOCKET -- PROGRAM ARGUMENT…``.

Between fork and exec of a program there is no room for all this, so it is a program of its own: a
mount namespace in which /dev/kvm is an empty file, which no other namespace has; the filter; its
listener and that file's st_dev and st_ino (:data:`BEGIN`) sent through SOCKET; exec.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import shutil
import signal
import socket
import sys
from struct import Struct

from kvmsim.exec import filter as seccomp
from kvmsim.exec.refusals import Refused, no_filter, no_namespace
from kvmsim.exec.syscalls import (
    CLONE_NEWNS,
    CLONE_NEWUSER,
    SYS_SECCOMP,
    check,
    libc,
    mount,
    umount,
    unshare,
)

_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
_NEW_LISTENER = 1 << 3  # SECCOMP_FILTER_FLAG_*
_WAIT_KILLABLE_RECV = 1 << 5  # Linux 5.19
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_NOSUID = 4096, 16384, 1 << 18, 2
_MNT_DETACH = 2
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
DEVICE = "/dev/kvm"
#: Where a file system of ours is until what is in it has its place: we need none of it meanwhile.
_ASIDE = "/proc"
BEGIN = Struct("<QQ")
#: Exit codes of a shell for a program that is not there, or cannot be executed; env(1)'s for us.
_NOT_FOUND, _NOT_EXECUTABLE, _REFUSED = 127, 126, 125


def main(number: int, program: list[str]) -> int:
    """Do it; return only if it fails."""
    try:
        path = shutil.which(program[0]) or program[0]
        _place()
        node = os.stat(DEVICE)
        listener = _install()
        with socket.socket(fileno=number) as channel:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))
            channel.sendmsg([BEGIN.pack(node.st_dev, node.st_ino)], [rights])
            if not channel.recv(1):  # the other end has it, or gave up
                return _REFUSED
        os.close(listener)
        for one in _IGNORED_BY_PYTHON:
            signal.signal(one, signal.SIG_DFL)
        os.execv(path, program)
    except Refused as refused:
        print(f"kvmsim: {refused}", file=sys.stderr)
        return _REFUSED
    except OSError as error:
        print(f"kvmsim: {error.filename or program[0]}: {error.strerror or error}", file=sys.stderr)
        return _NOT_FOUND if error.errno == errno.ENOENT else _NOT_EXECUTABLE


def _place() -> None:
    """Let /dev/kvm be an empty file, here and in what we start; Refused."""
    uid = os.geteuid()
    try:
        _unshare(uid, os.getegid())
        mount("none", "/", "", _MS_REC | _MS_PRIVATE)
        mount("kvmsim", _ASIDE, "tmpfs", _MS_NOSUID, "mode=755,size=64k")
        node = os.path.join(_ASIDE, os.path.basename(DEVICE))
        os.close(os.open(node, os.O_CREAT | os.O_WRONLY))
        os.chmod(node, 0o666)
        if os.path.exists(DEVICE):
            mount(node, DEVICE, "", _MS_BIND)
        else:
            _copy_dev()
            mount(_ASIDE, os.path.dirname(DEVICE), "", _MS_BIND | _MS_REC)
        umount(_ASIDE, _MNT_DETACH)
    except OSError as error:
        raise no_namespace(error, uid) from error


def _unshare(uid: int, gid: int) -> None:
    """A mount namespace of our own, without root in a user namespace in which we are ourselves."""
    if uid == 0:
        unshare(CLONE_NEWNS)
    else:
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _copy_dev() -> None:
    """Put all that /dev has beside our node."""
    for entry in os.scandir(os.path.dirname(DEVICE)):
        target = os.path.join(_ASIDE, entry.name)
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), target)
            continue
        if entry.is_dir(follow_symlinks=False):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
        mount(entry.path, target, "", _MS_BIND | _MS_REC)


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _install() -> int:
    """Install the filter and return its listener; Refused."""
    code = seccomp.program()
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = _Program(len(code) // 8, ctypes.addressof(buffer))
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    flags = _NEW_LISTENER | _WAIT_KILLABLE_RECV
    done = libc.syscall(SYS_SECCOMP, _SET_MODE_FILTER, flags, ctypes.byref(fprog))
    try:
        return check(done, "seccomp")
    except OSError as error:
        raise no_filter(error) from error


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[3:]))
