# SPDX-License-Identifier: GPL-2.0-or-later
"""One request through io_uring or aio, without a library.

Layouts are those of ``include/uapi/linux/io_uring.h`` and ``include/uapi/linux/aio_abi.h``.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import mmap
import os
import struct

from privfs.testing.conformance.syscalls import Nr, buffer, call


class Unavailable(Exception):
    """The kernel or its administrator does not offer what the probe needs."""


class Op(enum.IntEnum):
    """``enum io_uring_op``."""

    FSYNC = 3
    SYNC_FILE_RANGE = 8
    FALLOCATE = 17
    READ = 22
    WRITE = 23
    FADVISE = 24
    SPLICE = 30
    FTRUNCATE = 55


_OFF_SQ_RING = 0
_OFF_SQES = 0x1000_0000
_GETEVENTS = 1
_PARAMS_SIZE = 120
_SQ_OFFSETS, _CQ_OFFSETS = 40, 80
_CQE_SIZE = 16


def uring(op: Op, fd: int, addr: int, length: int, offset: int, flags: int = 0) -> int:
    """Submit one request, wait for it and return its result; raise OSError for a negative one."""
    sqe = struct.pack("=BBHiQQII", op, 0, 0, fd, offset & (1 << 64) - 1, addr, length, flags)
    return _submit(sqe)


def uring_splice(fd_in: int, offset_in: int, fd_out: int, length: int) -> int:
    """Submit IORING_OP_SPLICE into a pipe."""
    nowhere = (1 << 64) - 1
    sqe = struct.pack("=BBHiQQII", Op.SPLICE, 0, 0, fd_out, nowhere, offset_in, length, 0)
    return _submit(sqe + struct.pack("=QHHi", 0, 0, 0, fd_in))


def _submit(sqe: bytes) -> int:
    params = buffer(_PARAMS_SIZE)
    try:
        ring = call(Nr.IO_URING_SETUP, 1, params)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS):
            raise Unavailable("io_uring (sysctl kernel.io_uring_disabled)") from error
        raise
    sq = struct.unpack_from("IIIIIII", params, _SQ_OFFSETS)
    cq = struct.unpack_from("IIIIIII", params, _CQ_OFFSETS)
    entries = struct.unpack_from("II", params, 0)
    sq_size, cq_size = sq[6] + entries[0] * 4, cq[5] + entries[1] * _CQE_SIZE
    # One mapping holds both rings (IORING_FEAT_SINGLE_MMAP, Linux 5.4).
    rings = mmap.mmap(ring, max(sq_size, cq_size), offset=_OFF_SQ_RING)
    sqes = mmap.mmap(ring, 64 * entries[0], offset=_OFF_SQES)
    sqes[:64] = sqe.ljust(64, b"\0")
    struct.pack_into("I", rings, sq[6], 0)  # array[0] names sqe 0
    struct.pack_into("I", rings, sq[1], 1)  # tail
    call(Nr.IO_URING_ENTER, ring, 1, 1, _GETEVENTS, None, 0)
    _, result, _ = struct.unpack_from("QiI", rings, cq[5])
    rings.close()
    sqes.close()
    os.close(ring)
    return _checked(result, "io_uring")


class Aio(enum.IntEnum):
    """``IOCB_CMD_*``."""

    PREAD = 0
    PWRITE = 1
    FSYNC = 2
    FDSYNC = 3
    POLL = 5


def aio(op: Aio, fd: int, length: int, *, submit_only: bool = False) -> int:
    """Submit one iocb and return its result; raise OSError for a negative one.

    ``submit_only`` returns what io_submit(2) said itself.
    """
    context = ctypes.c_ulong(0)
    holder = ctypes.cast(ctypes.pointer(context), ctypes.POINTER(ctypes.c_char * 8)).contents
    try:
        call(Nr.IO_SETUP, 1, holder)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise Unavailable("aio (CONFIG_AIO)") from error
        raise
    data = buffer(length)
    transfer = op in (Aio.PREAD, Aio.PWRITE)
    where = ctypes.addressof(data) if transfer else (1 if op is Aio.POLL else 0)
    iocb = buffer(64)
    struct.pack_into(
        "=QIIHhIQQq", iocb, 0,
        0, 0, 0, op, 0, fd, where, length if transfer else 0, 0,
    )  # fmt: skip
    pointers = ctypes.create_string_buffer(struct.pack("P", ctypes.addressof(iocb)), 8)
    taken = call(Nr.IO_SUBMIT, context.value, 1, pointers)
    if submit_only:
        return taken
    event = buffer(32)
    call(Nr.IO_GETEVENTS, context.value, 1, 1, event, None)
    (result,) = struct.unpack_from("q", event, 16)
    call(Nr.IO_DESTROY, context.value)
    return _checked(result, "aio")


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result
