# SPDX-License-Identifier: GPL-2.0-or-later
"""Probes that move bytes: read, write, splice, copies, hints, io_uring and aio."""

from __future__ import annotations

import ctypes
import os
import struct

from privfs.testing.conformance import rings
from privfs.testing.conformance.row import PAGE
from privfs.testing.conformance.subject import Subject, other_file
from privfs.testing.conformance.syscalls import Nr, buffer, call, iovec

#: A pointer that no process may pass: access_ok() refuses it.
_KERNEL_ADDRESS = 0xFFFF_8000_0000_0000
#: A pointer that is well formed but unmapped.
_UNMAPPED = 0x10


def read(f: Subject, length: int) -> int:
    """read(2)."""
    return call(Nr.READ, f.fd, buffer(max(length, 1)), length)


def read_into(f: Subject, address: str) -> int:
    """read(2) into a bad pointer: what is looked at first, the file or the buffer?"""
    where = {"kernel": _KERNEL_ADDRESS, "unmapped": _UNMAPPED}[address]
    return call(Nr.READ, f.fd, where, PAGE)


def write(f: Subject, length: int) -> int:
    """write(2)."""
    return call(Nr.WRITE, f.fd, buffer(max(length, 1)), length)


def readv(f: Subject, vectors: int) -> int:
    """readv(2) with one vector or none."""
    return call(Nr.READV, f.fd, iovec(buffer(PAGE)), vectors)


def writev(f: Subject, vectors: int) -> int:
    """writev(2) with one vector or none."""
    return call(Nr.WRITEV, f.fd, iovec(buffer(PAGE)), vectors)


def pread(f: Subject, offset: int, length: int) -> int:
    """pread64(2)."""
    return call(Nr.PREAD64, f.fd, buffer(max(length, 1)), length, offset)


def pwrite(f: Subject, offset: int, length: int) -> int:
    """pwrite64(2)."""
    return call(Nr.PWRITE64, f.fd, buffer(max(length, 1)), length, offset)


def preadv(f: Subject, offset: int) -> int:
    """preadv(2)."""
    return call(Nr.PREADV, f.fd, iovec(buffer(PAGE)), 1, offset, 0)


def pwritev(f: Subject, offset: int) -> int:
    """pwritev(2)."""
    return call(Nr.PWRITEV, f.fd, iovec(buffer(PAGE)), 1, offset, 0)


def preadv2(f: Subject, offset: int, flags: int) -> int:
    """preadv2(2); offset -1 reads at the file position."""
    return call(Nr.PREADV2, f.fd, iovec(buffer(PAGE)), 1, offset, offset >> 63, flags)


def pwritev2(f: Subject, offset: int, flags: int) -> int:
    """pwritev2(2); offset -1 writes at the file position."""
    return call(Nr.PWRITEV2, f.fd, iovec(buffer(PAGE)), 1, offset, offset >> 63, flags)


def _at(offset: int | None) -> ctypes.Array[ctypes.c_char] | None:
    return None if offset is None else ctypes.create_string_buffer(struct.pack("q", offset), 8)


def splice_from(f: Subject, offset: int | None) -> int:
    """splice(2) from the file into a pipe."""
    _, theirs = os.pipe()
    return call(Nr.SPLICE, f.fd, _at(offset), theirs, None, PAGE, 0)


def splice_to(f: Subject, offset: int | None) -> int:
    """splice(2) from a pipe into the file."""
    ours, theirs = os.pipe()
    os.write(theirs, b"x" * PAGE)
    return call(Nr.SPLICE, ours, None, f.fd, _at(offset), PAGE, 0)


def tee(f: Subject) -> int:
    """tee(2), which wants pipes at both ends."""
    return call(Nr.TEE, f.fd, os.pipe()[1], PAGE, 0)


def sendfile_from(f: Subject, offset: int | None) -> int:
    """sendfile(2) from the file into a pipe."""
    return call(Nr.SENDFILE, os.pipe()[1], f.fd, _at(offset), PAGE)


def sendfile_nothing(f: Subject) -> int:
    """sendfile(2) of no bytes from the file into a memfd, which goes by a pipe of the kernel's."""
    return call(Nr.SENDFILE, other_file(), f.fd, None, 0)


def sendfile_to(f: Subject) -> int:
    """sendfile(2) from a memfd into the file."""
    return call(Nr.SENDFILE, f.fd, other_file(), None, PAGE)


def copy_from(f: Subject, length: int = PAGE, flags: int = 0) -> int:
    """copy_file_range(2) into an ordinary memfd."""
    return call(Nr.COPY_FILE_RANGE, f.fd, _at(0), other_file(), _at(0), length, flags)


def copy_to(f: Subject) -> int:
    """copy_file_range(2) from an ordinary memfd."""
    return call(Nr.COPY_FILE_RANGE, other_file(), _at(0), f.fd, _at(0), PAGE, 0)


def copy_self(f: Subject, to: int, start: int = 0, length: int = PAGE) -> int:
    """copy_file_range(2) within the file."""
    return call(Nr.COPY_FILE_RANGE, f.fd, _at(start), f.fd, _at(to), length, 0)


def readahead(f: Subject) -> int:
    """readahead(2)."""
    return call(Nr.READAHEAD, f.fd, 0, PAGE)


def fadvise(f: Subject, advice: int, length: int = PAGE) -> int:
    """posix_fadvise(2)."""
    return call(Nr.FADVISE64, f.fd, 0, length, advice)


def sync_file_range(f: Subject, offset: int, length: int, flags: int) -> int:
    """sync_file_range(2)."""
    return call(Nr.SYNC_FILE_RANGE, f.fd, offset, length, flags)


def cachestat(f: Subject, flags: int) -> str:
    """cachestat(2); the outcome is 0 or an errno, the counts are the page cache's own."""
    span = ctypes.create_string_buffer(struct.pack("QQ", 0, 0), 16)
    call(Nr.CACHESTAT, f.fd, span, buffer(40), flags)
    return "0"


def cached(f: Subject) -> str:
    """The pages that cachestat(2) finds in the page cache."""
    span = ctypes.create_string_buffer(struct.pack("QQ", 0, 0), 16)
    counts = buffer(40)
    call(Nr.CACHESTAT, f.fd, span, counts, 0)
    return f"{struct.unpack_from('Q', counts)[0]} pages"


def vmsplice(f: Subject) -> int:
    """vmsplice(2), which wants a pipe."""
    return call(Nr.VMSPLICE, f.fd, iovec(buffer(PAGE)), 1, 0)


def tee_to(f: Subject) -> int:
    """tee(2) of a pipe into the file."""
    ours, theirs = os.pipe()
    os.write(theirs, b"x")
    return call(Nr.TEE, ours, f.fd, PAGE, 0)


def aio_submit(f: Subject, opcode: str) -> int:
    """io_submit(2) of one request: the number of requests taken, whatever becomes of it."""
    return rings.aio(rings.Aio[opcode], f.fd, PAGE, submit_only=True)


# --- rings -------------------------------------------------------------------------------------


def uring_read(f: Subject, offset: int) -> int:
    """IORING_OP_READ; offset -1 is the file position."""
    data = buffer(PAGE)
    return rings.uring(rings.Op.READ, f.fd, ctypes.addressof(data), PAGE, offset)


def uring_write(f: Subject, offset: int) -> int:
    """IORING_OP_WRITE."""
    data = buffer(PAGE)
    return rings.uring(rings.Op.WRITE, f.fd, ctypes.addressof(data), PAGE, offset)


def uring_fallocate(f: Subject, mode: int, offset: int, length: int) -> int:
    """IORING_OP_FALLOCATE: the mode travels in ``len``, the length in ``addr``."""
    return rings.uring(rings.Op.FALLOCATE, f.fd, length, mode, offset)


def uring_fsync(f: Subject, data_only: bool) -> int:
    """IORING_OP_FSYNC."""
    return rings.uring(rings.Op.FSYNC, f.fd, 0, 0, 0, flags=int(data_only))


def uring_ftruncate(f: Subject, size: int) -> int:
    """IORING_OP_FTRUNCATE (Linux 6.9)."""
    return rings.uring(rings.Op.FTRUNCATE, f.fd, 0, 0, size)


def uring_sync_file_range(f: Subject) -> int:
    """IORING_OP_SYNC_FILE_RANGE."""
    return rings.uring(rings.Op.SYNC_FILE_RANGE, f.fd, 0, PAGE, 0)


def uring_fadvise(f: Subject, advice: int) -> int:
    """IORING_OP_FADVISE."""
    return rings.uring(rings.Op.FADVISE, f.fd, 0, PAGE, 0, flags=advice)


def uring_splice_from(f: Subject) -> int:
    """IORING_OP_SPLICE from the file into a pipe."""
    return rings.uring_splice(f.fd, 0, os.pipe()[1], PAGE)


def aio(f: Subject, opcode: str) -> int:
    """io_submit(2) of one request and its result."""
    return rings.aio(rings.Aio[opcode], f.fd, PAGE)
