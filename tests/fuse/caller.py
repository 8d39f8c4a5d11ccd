# SPDX-License-Identifier: GPL-2.0-or-later
"""Make system calls on a file: ``caller.py PATH DISPOSITION``, one call a line.

``fallocate MODE OFFSET LENGTH`` or ``truncate SIZE``, bytes.  DISPOSITION says what SIGUSR1 does:
``handle``, ``ignore``, ``block`` or ``default``.  Each call is announced with ``calling`` and ends
with ``returned ERRNO after N``, N being the signals that were handled until then.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.ftruncate.argtypes = (ctypes.c_int, ctypes.c_int64)


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    path, disposition = sys.argv[1:]
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    handled: list[int] = []
    if disposition == "handle":
        signal.signal(signal.SIGUSR1, lambda number, frame: handled.append(number))
        signal.siginterrupt(signal.SIGUSR1, False)  # SA_RESTART: fallocate is not restarted
    elif disposition == "ignore":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    elif disposition == "block":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    say("ready")
    for line in sys.stdin:
        name, *numbers = line.split()
        call = {"fallocate": _libc.fallocate, "truncate": _libc.ftruncate}[name]
        say("calling")
        failed = call(fd, *[int(number) for number in numbers])
        code = ctypes.get_errno() if failed else 0
        say(f"returned {code} after {len(handled)}")


if __name__ == "__main__":
    main()
