# SPDX-License-Identifier: GPL-2.0-or-later
"""Probes that map the file, and what can be done with a mapping where there is one."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct

from privfs.testing.conformance.row import PAGE, SIZE
from privfs.testing.conformance.subject import Subject
from privfs.testing.conformance.syscalls import IoVec, Nr, buffer, call

SHARED, PRIVATE, SHARED_VALIDATE = 1, 2, 3
GROWSDOWN, LOCKED, NORESERVE, POPULATE = 0x100, 0x2000, 0x4000, 0x8000
NONBLOCK, HUGETLB, SYNC = 0x10000, 0x40000, 0x80000
NONE, R, W, X = 0, 1, 2, 4


def _map(f: Subject, prot: int, flags: int, length: int = SIZE, offset: int = 0) -> int:
    return call(Nr.MMAP, 0, length, prot, flags, f.fd, offset) & (1 << 64) - 1


def maps(f: Subject, prot: int, flags: int, length: int = SIZE, offset: int = 0) -> str:
    """mmap(2); the outcome says "maps" where it is allowed."""
    _map(f, prot, flags, length, offset)
    return "maps"


def touch(f: Subject, prot: int, flags: int, length: int, at: int) -> str:
    """mmap(2), then a load from (or, with W, a store to) byte ``at`` of the mapping."""
    address = _map(f, prot, flags, length)
    f.note("maps")
    if prot & W:
        ctypes.memset(address + at, 0x5A, 1)
    return f"reads {ctypes.string_at(address + at, 1)[0]:#x}"


def advise(f: Subject, advice: int) -> int:
    """madvise(2) on a shared mapping of the whole file."""
    return call(Nr.MADVISE, _map(f, R | W, SHARED), SIZE, advice)


def store_and_advise(f: Subject, advice: int) -> str:
    """Store a byte, madvise(2), read it again: is the page still there?"""
    address = _map(f, R | W, SHARED)
    ctypes.memset(address, 0x5A, 1)
    call(Nr.MADVISE, address, PAGE, advice)
    return f"reads {ctypes.string_at(address, 1)[0]:#x}"


def store_and_punch(f: Subject) -> str:
    """Store into two pages, punch the first: it reads 0, its neighbour is kept."""
    address = _map(f, R | W, SHARED)
    ctypes.memset(address, 0x5A, 2 * PAGE)
    call(Nr.FALLOCATE, f.fd, 3, 0, PAGE)
    first, second = (ctypes.string_at(address + at, 1)[0] for at in (0, PAGE))
    return f"reads {first:#x} {second:#x}"


def store_and_allocate(f: Subject) -> str:
    """Store, then fallocate(KEEP_SIZE) over it: the data are kept."""
    address = _map(f, R | W, SHARED)
    ctypes.memset(address, 0x5A, PAGE)
    call(Nr.FALLOCATE, f.fd, 1, 0, SIZE)
    return f"reads {ctypes.string_at(address, 1)[0]:#x}"


def lock(f: Subject) -> int:
    """mlock(2) of a shared mapping."""
    return call(Nr.MLOCK, _map(f, R | W, SHARED), PAGE)


def sync(f: Subject) -> int:
    """msync(2) of a shared mapping with MS_SYNC."""
    return call(Nr.MSYNC, _map(f, R | W, SHARED), SIZE, 4)


def protect(f: Subject, prot: int) -> int:
    """mprotect(2) of a shared read-write mapping."""
    return call(Nr.MPROTECT, _map(f, R | W, SHARED), PAGE, prot)


def core(f: Subject) -> str:
    """mincore(2) of one untouched page of a shared mapping."""
    vector = buffer(1)
    call(Nr.MINCORE, _map(f, R | W, SHARED), PAGE, vector)
    return f"{vector.raw[0] & 1}"


def bind(f: Subject) -> int:
    """mbind(2) MPOL_DEFAULT of a shared mapping."""
    return call(Nr.MBIND, _map(f, R | W, SHARED), PAGE, 0, None, 0, 0)


def copy_in(f: Subject) -> int:
    """write(2) to a pipe from the mapping: copy_from_user()."""
    return call(Nr.WRITE, os.pipe()[1], _map(f, R | W, SHARED), 8)


def gup(f: Subject) -> int:
    """vmsplice(2) of the mapping into a pipe: get_user_pages()."""
    vector = IoVec(_map(f, R | W, SHARED), PAGE)
    return call(Nr.VMSPLICE, os.pipe()[1], vector, 1, 0)


def remote_read(f: Subject) -> int:
    """process_vm_readv(2) of the mapping by the process itself."""
    data = buffer(8)
    ours = IoVec(ctypes.addressof(data), 8)
    return call(Nr.PROCESS_VM_READV, os.getpid(), ours, 1, IoVec(_map(f, R | W, SHARED), 8), 1, 0)


def proc_mem(f: Subject) -> int:
    """read(2) of /proc/self/mem at the mapping."""
    address = _map(f, R | W, SHARED)
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return len(memory.read(8) or b"")


def register_userfaultfd(f: Subject, mode: int) -> str:
    """UFFDIO_REGISTER of a shared mapping; 1 missing, 2 write-protect, 4 minor."""
    address = _map(f, R | W, SHARED)
    fd = call(Nr.USERFAULTFD, os.O_CLOEXEC | 1)  # UFFD_USER_MODE_ONLY
    call(Nr.IOCTL, fd, 0xC018AA3F, _packed("QQQ", 0xAA, 0, 0))  # UFFDIO_API
    call(Nr.IOCTL, fd, 0xC020AA00, _packed("QQQQ", address, SIZE, mode, 0))
    return "0"


def remap_pages(f: Subject) -> int:
    """remap_file_pages(2), emulated by mmap since Linux 4.0."""
    return call(Nr.REMAP_FILE_PAGES, _map(f, R | W, SHARED), PAGE, 0, 1, 0)


def grow(f: Subject) -> str:
    """mremap(2) of a mapping to more than the file holds."""
    address = _map(f, R | W, SHARED)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    moved = libc.mremap(
        ctypes.c_void_p(address), ctypes.c_size_t(SIZE), ctypes.c_size_t(2 * SIZE), 1
    )
    if moved in (None, ctypes.c_void_p(-1).value):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return "0"


def keeps_file(f: Subject) -> str:
    """Close the descriptor: the mapping holds the file and its bytes."""
    address = _map(f, R | W, SHARED)
    ctypes.memset(address, 0x5A, 1)
    os.close(f.fd)
    return f"reads {ctypes.string_at(address, 1)[0]:#x}"


def python_mmap(f: Subject) -> str:
    """What an ordinary program gets: Python's mmap of the whole file."""
    try:
        mmap.mmap(f.fd, 0).close()
    except ValueError as error:  # "cannot mmap an empty file"
        raise OSError(errno.EINVAL, str(error)) from error
    return "maps"


def _packed(layout: str, *values: int) -> ctypes.Array[ctypes.c_char]:
    packed = struct.pack(layout, *values)
    return ctypes.create_string_buffer(packed, len(packed))
