# SPDX-License-Identifier: GPL-2.0-or-later
"""Copy within this process as system calls do: what cannot be reached is an error, not a signal.

process_vm_readv(2) pins the pages that it copies from, which memfd_secret(2) forbids (EFAULT).
A pipe is filled by copy_from_user() and emptied by copy_to_user(), which fault pages in as a load
or a store does.
"""

from __future__ import annotations

import ctypes
import os

_CHUNK = 32 << 10  # half of what an empty pipe takes at least, pipe(7)

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("read", "write"):
    _call = getattr(_libc, _name)
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)


def copy(target: int, source: int, length: int) -> int:
    """Copy ``length`` bytes between addresses of this process; return how many were copied.

    Fewer than asked for where a page is not there or may not be stored to. Raises OSError when no
    pipe can be had.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        done = 0
        while done < length:
            taken = _libc.write(writer, source + done, min(_CHUNK, length - done))
            given = _libc.read(reader, target + done, taken) if taken > 0 else 0
            done += max(given, 0)
            if taken <= 0 or given < taken:
                break
        return done
    finally:
        os.close(reader)
        os.close(writer)
