# SPDX-License-Identifier: GPL-2.0-or-later
"""Another process's memory, or one's own where an address may be bad: process_vm_readv(2).

What cannot be reached is an error and never a signal.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final


class _Ranges(ctypes.Structure):
    """Two struct iovec: here, there."""

    _fields_ = (
        ("here", ctypes.c_void_p),
        ("here_length", ctypes.c_size_t),
        ("there", ctypes.c_void_p),
        ("there_length", ctypes.c_size_t),
    )


_THERE: Final = _Ranges.there.offset

_libc = ctypes.CDLL(None, use_errno=True)
_readv = _libc.process_vm_readv
_writev = _libc.process_vm_writev
for _function in (_readv, _writev):
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong,
        ctypes.c_ulong,
    )  # fmt: skip


def read(pid: int, address: int, target: int, length: int) -> int:
    """Copy ``length`` bytes at ``address`` of process ``pid`` to ``target``, an address here.

    Return how many were copied: fewer where the rest cannot be reached. OSError with the call's
    errno if none can; EFAULT too for what is no address.
    """
    ranges = _ranges("process_vm_readv", address, target, length)
    where = ctypes.addressof(ranges)
    return _check("process_vm_readv", _readv(pid, where, 1, where + _THERE, 1, 0))


def write(pid: int, address: int, source: int, length: int) -> int:
    """Copy ``length`` bytes at ``source``, an address here, to ``address`` of process ``pid``.

    Returns and raises as :func:`read` does.
    """
    ranges = _ranges("process_vm_writev", address, source, length)
    where = ctypes.addressof(ranges)
    return _check("process_vm_writev", _writev(pid, where, 1, where + _THERE, 1, 0))


def _ranges(call: str, address: int, here: int, length: int) -> _Ranges:
    if not 0 <= address < 1 << 64:
        raise OSError(errno.EFAULT, f"{call}: {address:#x} is no address")
    return _Ranges(here, length, address, length)


def _check(call: str, done: int) -> int:
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
    return int(done)
