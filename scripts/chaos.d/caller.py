# SPDX-License-Identifier: GPL-2.0-or-later
"""Make random system calls on a file: ``caller.py PATH FIRST END COUNT SEED KIND...``.

Pages [FIRST, END) are meant; KIND is ``punch``, ``allocate``, ``zero``, ``resize`` (to between
FIRST and END pages), or of all pages ``clear`` (punch), ``fill`` (allocate) or ``compact`` (ask the
mount to move them).  COUNT 0 makes each KIND once, in order; SIGTERM ends it after the call under
way.  Prints ``did N`` now and then,
``errno N KIND`` for what fails, and ``done CALLS FAILURES`` at the end.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import sys

from privfs.control import compact

PAGE = 4096
KEEP, PUNCH, ZERO = 0x01, 0x02, 0x10  # FALLOC_FL_*
MODES = {
    "punch": PUNCH | KEEP, "clear": PUNCH | KEEP,
    "allocate": KEEP, "fill": KEEP,
    "zero": ZERO | KEEP,
}  # fmt: skip
_EVERY = 10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.ftruncate.argtypes = (ctypes.c_int, ctypes.c_int64)


def call(fd: int, kind: str, start: int, end: int) -> int:
    """Make one system call; the errno."""
    if kind == "resize":
        failed = _libc.ftruncate(fd, end * PAGE)
    else:
        failed = _libc.fallocate(fd, MODES[kind], start * PAGE, (end - start) * PAGE)
    return ctypes.get_errno() if failed else 0


def move(path: str, start: int, end: int) -> int:
    """Let pages be moved as ``privfs compact`` does; the errno."""
    try:
        compact(path, start, end, lambda progress: None)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def main() -> int:
    path = sys.argv[1]
    first, end, count, seed = map(int, sys.argv[2:6])
    kinds = sys.argv[6:]
    dice = random.Random(seed)
    failures = 0
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    enough = False

    def stop(number: int, frame: object) -> None:
        nonlocal enough
        enough = True

    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    deeds = (dice.choice(kinds) for _ in range(count)) if count else iter(kinds)
    made = 0
    for i, kind in enumerate(deeds, 1):
        if enough:
            break
        whole = kind in ("clear", "fill", "compact")
        start = first if whole else dice.randrange(first, end)
        last = end if whole else min(end, start + dice.choice((1, 1, 2, 8, 32)))
        code = move(path, start, last) if kind == "compact" else call(fd, kind, start, last)
        made = i
        if code == errno.EINTR and enough and kind not in ("punch", "clear", "resize"):
            break  # our own SIGTERM, in an allocation that waited; what frees is never interrupted
        if code:
            failures += 1
            print(f"errno {code} {kind}", flush=True)
        if i % _EVERY == 0 or kind == "compact":
            print(f"did {i}", flush=True)
    print(f"done {made} {failures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
