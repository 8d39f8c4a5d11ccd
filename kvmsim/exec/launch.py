# SPDX-License-Identifier: GPL-2.0-or-later
"""Becomes the program: ``python -m kvmsim.exec.launch SOCKET NODE -- PROGRAM ARGUMENT…``.

Between fork and exec of a program there is no room for all this, so it is a program of its own: a
mount namespace in which /dev/kvm is NODE, the filter, its listener sent through SOCKET, exec.
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

from kvmsim.exec import filter as seccomp
from kvmsim.exec.refusals import Refused, no_filter, no_namespace
from kvmsim.exec.syscalls import (
    CLONE_NEWNS,
    CLONE_NEWUSER,
    SYS_SECCOMP,
    check,
    libc,
    mount,
    unshare,
)

_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
_NEW_LISTENER = 1 << 3  # SECCOMP_FILTER_FLAG_*
_WAIT_KILLABLE_RECV = 1 << 5  # Linux 5.19
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_NOSUID = 4096, 16384, 1 << 18, 2
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
DEVICE = "/dev/kvm"
#: Exit codes of a shell for a program that is not there, or cannot be executed; env(1)'s for us.
_NOT_FOUND, _NOT_EXECUTABLE, _REFUSED = 127, 126, 125


def main(number: int, node: str, program: list[str]) -> int:
    """Do it; return only if it fails."""
    try:
        path = shutil.which(program[0]) or program[0]
        _place(node)
        listener = _install()
        with socket.socket(fileno=number) as channel:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))
            channel.sendmsg([b"L"], [rights])
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


def _place(node: str) -> None:
    """Let /dev/kvm be ``node``, here and in what we start; Refused."""
    uid = os.geteuid()
    try:
        _unshare(uid, os.getegid())
        mount("none", "/", "", _MS_REC | _MS_PRIVATE)
        if not os.path.exists(DEVICE):
            _copy_dev(node)
        mount(node, DEVICE, "", _MS_BIND)
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


def _copy_dev(node: str) -> None:
    """A /dev like ours that has room for one more name."""
    place = os.path.join(os.path.dirname(node), "dev")
    os.mkdir(place)
    mount("kvmsim", place, "tmpfs", _MS_NOSUID, "mode=755,size=64k")
    for entry in os.scandir("/dev"):
        target = os.path.join(place, entry.name)
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), target)
            continue
        if entry.is_dir(follow_symlinks=False):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
        mount(entry.path, target, "", _MS_BIND | _MS_REC)
    os.close(os.open(os.path.join(place, "kvm"), os.O_CREAT | os.O_WRONLY, 0o600))
    mount(place, "/dev", "", _MS_BIND | _MS_REC)


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
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[4:]))
