# SPDX-License-Identifier: GPL-2.0-or-later
"""Probes that meet the file through paths, mounts, handles and watchers."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct

from privfs.testing.conformance.rings import Unavailable
from privfs.testing.conformance.row import PAGE
from privfs.testing.conformance.subject import Subject, disk_directory
from privfs.testing.conformance.syscalls import Nr, buffer, call

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_HANDLE_FID = 0x200
_OPEN_TREE_CLONE = 1
_LANDLOCK_EXECUTE = 1
_LANDLOCK_PATH_BENEATH = 1
_FAN_MODIFY = 2
_FAN_NONBLOCK = 2


def _rooted() -> None:
    """Raise unless we are root, be it of a user namespace."""
    if os.geteuid():
        raise Unavailable("root")


def _path(f: Subject) -> bytes:
    return os.fsencode(f.proc)


def resolve(f: Subject, how: int, flags: int = os.O_PATH) -> str:
    """openat2(2) of the magic link with RESOLVE_* ``how``."""
    asked = ctypes.create_string_buffer(struct.pack("QQQ", flags, 0, how), 24)
    call(Nr.OPENAT2, _AT_FDCWD, _path(f), asked, 24)
    return "0"


def below(f: Subject, name: str) -> str:
    """openat2(2) of a name below the file."""
    asked = ctypes.create_string_buffer(struct.pack("QQQ", os.O_RDONLY, 0, 0), 24)
    call(Nr.OPENAT2, f.fd, name.encode(), asked, 24)
    return "0"


def tree(f: Subject, flags: int) -> str:
    """open_tree(2) of the file; with OPEN_TREE_CLONE the first half of a bind mount."""
    if flags & _OPEN_TREE_CLONE:
        _rooted()
    call(Nr.OPEN_TREE, f.fd, b"", _AT_EMPTY_PATH | flags)
    return "0"


def _handle(f: Subject, flags: int) -> ctypes.Array[ctypes.c_char]:
    known = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
    call(Nr.NAME_TO_HANDLE_AT, f.fd, b"", known, buffer(8), _AT_EMPTY_PATH | flags)
    return known


def handle_fid(f: Subject) -> str:
    """name_to_handle_at(2) for watchers alone."""
    _handle(f, _AT_HANDLE_FID)
    return "0"


def open_handle(f: Subject) -> str:
    """open_by_handle_at(2) of the file's own handle."""
    _rooted()
    call(Nr.OPEN_BY_HANDLE_AT, f.fd, _handle(f, 0), os.O_RDWR)
    return "0"


def landlock(f: Subject) -> int:
    """landlock_add_rule(2) for the file."""
    rights = ctypes.create_string_buffer(struct.pack("Q", _LANDLOCK_EXECUTE), 8)
    try:
        rules = call(Nr.LANDLOCK_CREATE_RULESET, rights, 8, 0)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise Unavailable("landlock") from error
        raise
    place = os.open(f.proc, os.O_PATH)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", _LANDLOCK_EXECUTE, place), 12)
    return call(Nr.LANDLOCK_ADD_RULE, rules, _LANDLOCK_PATH_BENEATH, rule, 0)


def fanotify(f: Subject, punches: bool) -> str:
    """fanotify_mark(2) of the file, and whether a punch is an event."""
    _rooted()
    try:
        watcher = call(Nr.FANOTIFY_INIT, _FAN_NONBLOCK, os.O_RDONLY)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise Unavailable("fanotify") from error
        raise
    call(Nr.FANOTIFY_MARK, watcher, 1, _FAN_MODIFY, _AT_FDCWD, _path(f))
    if not punches:
        return "0"
    call(Nr.FALLOCATE, f.fd, 3, 0, PAGE)
    try:
        os.read(watcher, 4096)
    except BlockingIOError:
        return "silent"
    return "MODIFY"


def link_beside(f: Subject) -> str:
    """linkat(2) AT_EMPTY_PATH to another name in its own directory, if it has one."""
    if f.path is None:
        name = os.fsencode(f"/proc/self/fd/{disk_directory()}/link")
        call(Nr.LINKAT, f.fd, b"", _AT_FDCWD, name, _AT_EMPTY_PATH)
        return "0"
    name = os.fsencode(f"{f.path}-link")
    call(Nr.LINKAT, f.fd, b"", _AT_FDCWD, name, _AT_EMPTY_PATH)
    os.unlink(name)
    return "0"


def socket_at(f: Subject, call_name: str) -> str:
    """bind(2) or connect(2) of a Unix socket at the magic link."""
    with socket.socket(socket.AF_UNIX) as end:
        getattr(end, call_name)(f.proc)
    return "0"


def unlink(f: Subject) -> int:
    """unlink(2) of the magic link."""
    return call(Nr.UNLINK, _path(f))


def chown_empty_path(f: Subject) -> int:
    """fchownat(2) AT_EMPTY_PATH of an O_PATH descriptor, to its owner."""
    found = os.fstat(f.fd)
    place = os.open(f.proc, os.O_PATH)
    return call(Nr.FCHOWNAT, place, b"", found.st_uid, found.st_gid, _AT_EMPTY_PATH)


def truncate_place(f: Subject, size: int) -> int:
    """truncate(2) by the magic link of an O_PATH descriptor."""
    place = os.open(f.proc, os.O_PATH)
    return call(Nr.TRUNCATE, f"/proc/self/fd/{place}".encode(), size)


def file_attributes(f: Subject) -> int:
    """file_getattr(2)."""
    return call(Nr.FILE_GETATTR, f.fd, b"", buffer(64), 24, _AT_EMPTY_PATH)
