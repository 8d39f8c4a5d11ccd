# SPDX-License-Identifier: GPL-2.0-or-later
"""Punch random ranges of a file: ``storm.py PATH FIRST END COUNT SEED``, pages [FIRST, END).

Prints ``punched N`` now and then, ``errno N`` for each punch that fails, and at the end
``done PUNCHES FAILURES``.  It goes on after an EIO and stops at any other error.  SIGUSR1 makes
it say ``signalled`` when no system call is under way.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import sys

PAGE = 4096
_PUNCH = 0x03
_EVERY = 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def main() -> int:
    path = sys.argv[1]
    first, end, count, seed = map(int, sys.argv[2:6])
    dice = random.Random(seed)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    failures = done = 0
    signal.signal(signal.SIGUSR1, lambda number, frame: print("signalled", flush=True))
    print("ready", flush=True)
    while done < count:
        start = dice.randrange(first, end)
        pages = min(dice.choice((1, 1, 2, 8, 32)), end - start)
        code = 0
        if _libc.fallocate(fd, _PUNCH, start * PAGE, pages * PAGE) != 0:
            code = ctypes.get_errno()
            failures += 1
            print(f"errno {code}", flush=True)
        done += 1
        if done % _EVERY == 0:
            print(f"punched {done}", flush=True)
        if code not in (0, errno.EIO):
            break
    print(f"done {done} {failures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
