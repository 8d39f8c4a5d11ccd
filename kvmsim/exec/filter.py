# SPDX-License-Identifier: GPL-2.0-or-later
"""The seccomp filter: asked about are KVM's ioctls, forks, a little of madvise and mmap; no more.

A program of classic BPF over ``struct seccomp_data`` (linux/seccomp.h, seccomp(2)).
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from kvmsim.uapi import KVMIO

#: struct sock_filter: code, jt, jf, k.
_INSTRUCTION: Final = Struct("<HBBI")
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K

_NR: Final = 0  # offsets in struct seccomp_data
_ARCH: Final = 4
_ARGS: Final = 16

_ARCH_X86_64: Final = 0xC000003E  # AUDIT_ARCH_X86_64
IOCTL: Final = 16  # arch/x86/entry/syscalls/syscall_64.tbl
MADVISE: Final = 28
_DONTNEED: Final = 4  # MADV_DONTNEED
_DONTNEED_LOCKED: Final = 24  # Linux 5.18
COLLAPSE: Final = 25  # MADV_COLLAPSE, Linux 6.1
MMAP: Final = 9
CLONE: Final = 56
FORK: Final = 57
CLONE3: Final = 435
CLONE_VM: Final = 0x100
OURS: Final = 0x6B766D73_696D2121  #: argument 6 of a call of ours that is none of the program's
_MAP_TYPE, _MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_DENYWRITE = 0xF, 0x2, 0x20, 0x800
_SIXTH: Final = _ARGS + 40
_ALLOW: Final = 0x7FFF0000
_NOTIFY: Final = 0x7FC00000


def program() -> bytes:
    """Return the instructions: notified are some system calls of 64 bits with certain arguments.

    An ioctl(2) whose request has KVM's type byte, an madvise(2) that gives back memory or collapses
    it, an mmap(2) that is private and of a file, but for the loader's, which say MAP_DENYWRITE, and
    what may make a process with memory of its own: clone3(2), whose flags are out of sight, too.
    """
    listing = (
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 0, 25, _ARCH_X86_64),
        (_LOAD, 0, 0, _NR),
        (_EQUAL, 0, 3, IOCTL),
        (_LOAD, 0, 0, _ARGS + 8),  # the request's low half; the kernel ignores the rest
        (_AND, 0, 0, 0xFF00),
        (_EQUAL, 19, 20, KVMIO << 8),
        (_EQUAL, 0, 4, MADVISE),
        (_LOAD, 0, 0, _ARGS + 16),  # the advice: an int
        (_EQUAL, 16, 0, _DONTNEED),
        (_EQUAL, 15, 0, _DONTNEED_LOCKED),
        (_EQUAL, 14, 15, COLLAPSE),
        (_EQUAL, 0, 3, MMAP),
        (_LOAD, 0, 0, _ARGS + 24),  # the flags
        (_AND, 0, 0, _MAP_TYPE | _MAP_ANONYMOUS | _MAP_DENYWRITE),
        (_EQUAL, 10, 11, _MAP_PRIVATE),
        (_EQUAL, 5, 0, FORK),
        (_EQUAL, 4, 0, CLONE3),
        (_EQUAL, 0, 8, CLONE),
        (_LOAD, 0, 0, _ARGS),  # the flags
        (_AND, 0, 0, CLONE_VM),
        (_EQUAL, 0, 5, 0),
        (_LOAD, 0, 0, _SIXTH),
        (_EQUAL, 0, 2, OURS & 0xFFFF_FFFF),
        (_LOAD, 0, 0, _SIXTH + 4),
        (_EQUAL, 1, 0, OURS >> 32),
        (_RETURN, 0, 0, _NOTIFY),
        (_RETURN, 0, 0, _ALLOW),
    )
    return b"".join(_INSTRUCTION.pack(*line) for line in listing)
