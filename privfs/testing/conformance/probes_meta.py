# SPDX-License-Identifier: GPL-2.0-or-later
"""Probes of what is known about the file: stat, mode, owner, times, attributes, ioctls, sync."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import tempfile
import time

from privfs.testing.conformance.row import PAGE
from privfs.testing.conformance.subject import Subject, other_file
from privfs.testing.conformance.syscalls import Nr, buffer, call

_AT_EMPTY_PATH = 0x1000
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2


def fstat(f: Subject, field: str) -> str:
    """One field of fstat(2)."""
    found = os.fstat(f.fd)
    if field == "type":
        return "regular" if stat.S_ISREG(found.st_mode) else oct(stat.S_IFMT(found.st_mode))
    if field == "mode":
        return oct(stat.S_IMODE(found.st_mode))
    return str(getattr(found, field))


def statx(f: Subject, field: str) -> str:
    """One field of statx(2) with AT_EMPTY_PATH, STATX_BASIC_STATS|STATX_BTIME|STATX_DIOALIGN."""
    found = buffer(256)
    call(Nr.STATX, f.fd, b"", _AT_EMPTY_PATH, 0x2FFF, found)
    mask, blksize, attributes = struct.unpack_from("=IIQ", found, 0)
    values = {
        "blksize": blksize,
        "attributes": attributes & 0x7FFFF,
        "basic": mask & 0x7FF,
        "dioalign": bool(mask & 0x2000),
        "size": struct.unpack_from("=Q", found, 40)[0],
    }
    return f"{values[field]:#x}"


def fstatfs(f: Subject, field: str) -> str:
    """One field of fstatfs(2)."""
    found = buffer(120)
    call(Nr.FSTATFS, f.fd, found)
    kind, block_size, blocks = struct.unpack_from("=qqQ", found, 0)
    (flags,) = struct.unpack_from("=q", found, 80)
    values = {
        "type": f"{kind:#x}",
        "bsize": str(block_size),
        "blocks": "some" if blocks else "none",
        "flags": f"{flags & 0xE:#x}",
    }
    return values[field]


def statx_asked(f: Subject, flags: int, mask: int, wanted: int) -> str:
    """statx(2) with other flags and another mask: which of the ``wanted`` fields it fills."""
    found = buffer(256)
    call(Nr.STATX, f.fd, b"", _AT_EMPTY_PATH | flags, mask, found)
    return f"{struct.unpack_from('=I', found, 0)[0] & wanted:#x}"


def link_text(f: Subject) -> str:
    """What /proc/self/fd shows."""
    found = os.readlink(f.proc)
    return "a path" if found.startswith("/") and "(deleted)" not in found else found.split(":")[0]


def times(f: Subject, mode: int) -> str:
    """Whether fallocate(2) sets mtime and ctime."""
    before = os.fstat(f.fd)
    while time.time_ns() <= max(before.st_mtime_ns, before.st_ctime_ns) + 20_000_000:
        continue  # the kernel's coarse clock ticks at least every 10 ms
    call(Nr.FALLOCATE, f.fd, mode, 0, PAGE)
    after = os.fstat(f.fd)
    changed = [
        name
        for name in ("mtime", "ctime")
        if getattr(after, f"st_{name}_ns") != getattr(before, f"st_{name}_ns")
    ]
    return " ".join(changed) or "unchanged"


def fsync(f: Subject) -> int:
    """fsync(2)."""
    return call(Nr.FSYNC, f.fd)


def fdatasync(f: Subject) -> int:
    """fdatasync(2)."""
    return call(Nr.FDATASYNC, f.fd)


def syncfs(f: Subject) -> int:
    """syncfs(2)."""
    return call(Nr.SYNCFS, f.fd)


def fchmod(f: Subject, mode: int) -> int:
    """fchmod(2)."""
    return call(Nr.FCHMOD, f.fd, mode)


def chmod(f: Subject, mode: int) -> int:
    """chmod(2) of /proc/self/fd/N."""
    return call(Nr.CHMOD, os.fsencode(f.proc), mode)


def fchown(f: Subject, whom: str) -> int:
    """fchown(2) to nobody at all (-1, -1) or to the owner."""
    if whom == "nobody":
        return call(Nr.FCHOWN, f.fd, 0xFFFF_FFFF, 0xFFFF_FFFF)
    found = os.fstat(f.fd)
    return call(Nr.FCHOWN, f.fd, found.st_uid, found.st_gid)


def utimens(f: Subject, access: int | None, modification: int | None) -> int:
    """utimensat(2) on the descriptor; None for both is "now" without a structure."""
    if access is None or modification is None:
        return call(Nr.UTIMENSAT, f.fd, None, None, 0)
    packed = struct.pack("qqqq", 0, access, 0, modification)
    return call(Nr.UTIMENSAT, f.fd, None, ctypes.create_string_buffer(packed, 32), 0)


# --- extended attributes -----------------------------------------------------------------------


def setxattr(f: Subject, name: str, flags: int = 0) -> int:
    """fsetxattr(2)."""
    return call(Nr.FSETXATTR, f.fd, name.encode(), b"v", 1, flags)


def getxattr(f: Subject, name: str) -> int:
    """fgetxattr(2)."""
    return call(Nr.FGETXATTR, f.fd, name.encode(), buffer(64), 64)


def removexattr(f: Subject, name: str) -> int:
    """fremovexattr(2)."""
    return call(Nr.FREMOVEXATTR, f.fd, name.encode())


def listxattr(f: Subject) -> int:
    """flistxattr(2)."""
    return call(Nr.FLISTXATTR, f.fd, buffer(256), 256)


# --- ioctl -------------------------------------------------------------------------------------


def ioctl(f: Subject, request: int, *words: int) -> str:
    """ioctl(2) with a structure of 64-bit words; a word that comes back is not shown."""
    packed = struct.pack(f"={max(len(words), 16)}q", *words, *[0] * (16 - len(words)))
    call(Nr.IOCTL, f.fd, request, ctypes.create_string_buffer(packed, len(packed)))
    return "0"


def ioctl_int(f: Subject, request: int, value: int = 0) -> int:
    """ioctl(2) with an int that is shown as it comes back."""
    word = ctypes.create_string_buffer(struct.pack("i", value), 4)
    call(Nr.IOCTL, f.fd, request, word)
    return int(struct.unpack("i", word)[0])


def clone(f: Subject, request: int, direction: str) -> str:
    """FICLONE and its relatives between the file and another one, or itself."""
    ficlonerange, fidedupe = 0x4020940D, 0xC0189436
    other = f.fd if direction == "self" else other_file()
    source, target = (other, f.fd) if direction == "to" else (f.fd, other)
    if request == ficlonerange:
        packed = struct.pack("=qQQQ", source, 0, PAGE, PAGE if direction == "self" else 0)
        call(Nr.IOCTL, target, request, ctypes.create_string_buffer(packed, 32))
        return "0"
    if request == fidedupe:
        packed = struct.pack("=QQHHIqQQiI", 0, PAGE, 1, 0, 0, target, 0, 0, 0, 0)
        answer = ctypes.create_string_buffer(packed, len(packed))
        call(Nr.IOCTL, source, request, answer)
        status = struct.unpack_from("=i", answer, 24 + 24)[0]
        if status < 0:
            raise OSError(-status, os.strerror(-status))
        return str(status)
    call(Nr.IOCTL, target, request, source)
    return "0"


# --- names -------------------------------------------------------------------------------------


def link_elsewhere(f: Subject) -> str:
    """linkat(2) with AT_EMPTY_PATH into the directory for temporary files."""
    with tempfile.TemporaryDirectory() as place:
        call(Nr.LINKAT, f.fd, b"", -100, os.fsencode(f"{place}/link"), _AT_EMPTY_PATH)
    return "0"


def handle(f: Subject) -> str:
    """name_to_handle_at(2)."""
    known = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0), 8 + 128)
    call(Nr.NAME_TO_HANDLE_AT, f.fd, b"", known, buffer(8), _AT_EMPTY_PATH)
    return "0"


def execute(f: Subject) -> int:
    """execveat(2) of the file itself."""
    null = ctypes.create_string_buffer(8)
    return call(Nr.EXECVEAT, f.fd, b"", null, null, _AT_EMPTY_PATH)


def swap_on(f: Subject) -> int:
    """swapon(2) by the path of the open file."""
    return call(Nr.SWAPON, os.fsencode(f.proc), 0)
