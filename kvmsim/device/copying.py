# SPDX-License-Identifier: GPL-2.0-or-later
"""copy_from_user() and copy_to_user() for callers that are processes: all of it, or EFAULT."""

from __future__ import annotations

import ctypes

from hwemu import processmemory
from kvmsim.device.caller import Efault


def fetch(pid: int, address: int, length: int) -> bytes:
    """``length`` bytes at ``address`` of a process; Efault."""
    if not length:
        return b""
    buffer = ctypes.create_string_buffer(length)
    try:
        done = processmemory.read(pid, address, ctypes.addressof(buffer), length)
    except OSError:
        done = 0
    if done != length:
        raise Efault(address, length)
    return buffer.raw


def store(pid: int, address: int, data: bytes) -> None:
    """Store ``data`` at ``address`` of a process; Efault, when some of it may be stored."""
    if not data:
        return
    source = ctypes.c_char_p(data)  # the bytes themselves, which the call only reads
    where = ctypes.cast(source, ctypes.c_void_p).value
    assert where is not None
    try:
        done = processmemory.write(pid, address, where, len(data))
    except OSError:
        done = 0
    if done != len(data):
        raise Efault(address, len(data))
