# SPDX-License-Identifier: GPL-2.0-or-later
"""What is asked of users written in C (tests/twin/user.c)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from actors import Actor
from mounts import Mounted

PAGE = 4096
PAGES = 4096
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

User = Callable[..., Actor]


def private_file(mounted: Mounted, name: str = "ram", pages: int = PAGES) -> Path:
    path = mounted.path / name
    path.touch()
    os.truncate(path, pages * PAGE)
    return path


def allocate(path: Path, start: int, end: int) -> int:
    """Allocate pages as any caller does; the errno."""
    return _fallocate(path, 0, start, end)


def punch(path: Path, start: int, end: int) -> int:
    """Punch pages as any caller does; the errno."""
    return _fallocate(path, 0x03, start, end)


def _fallocate(path: Path, mode: int, start: int, end: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        failed = _libc.fallocate(fd, mode, start * PAGE, (end - start) * PAGE)
        return ctypes.get_errno() if failed else 0
    finally:
        os.close(fd)


def value(user: Actor, command: str) -> int:
    """Touch or read a page; the value of its word."""
    return int(user.ask(command, r"^value \d+ (\d+)$|^error.*").split()[2])


def stats(user: Actor) -> dict[str, int]:
    words = user.ask("stats", "^stats .*$").split()[1:]
    return {name: int(count) for name, count in zip(words[::2], words[1::2], strict=True)}


def healthy(user: Actor) -> dict[str, int]:
    """Assert that a user has seen nothing that the contract forbids."""
    found = stats(user)
    assert (found["stale"], found["lost"]) == (0, 0), user.text
    return found
