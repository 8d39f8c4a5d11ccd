# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM that must not notice what happens to others."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torture
from mounts import Mounted

from kvmsim.hostmem import HostMemory

PAGE = 4096
LOW = 2 << 20  # guest RAM begins above the shared low memory
RAM = 16 << 20
FREE = LOW + (8 << 20)  # gpa behind the guest kernel

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def private_file(mounted: Mounted, name: str, size: int = RAM) -> Path:
    path = mounted.path / name
    path.touch()
    os.truncate(path, size)
    return path


class Bystander:
    """A VM that goes on, with its memory and its punches."""

    def __init__(self, host: HostMemory, image: bytes, mounted: Mounted) -> None:
        self.path = private_file(mounted, "bystander")
        self.mounted = mounted
        self.guest = torture.boot(host, image, self.path, label="bystander")
        self.value = 1

    def check(self) -> None:
        command = self.guest.console.command
        command(f"poke {FREE:#x} {self.value}")
        assert f"value={self.value:#x}" in command(f"peek {FREE:#x}")
        assert fallocate(self.path, 3, FREE - LOW, PAGE) == 0
        assert "value=0x0" in command(f"peek {FREE:#x}")
        self.value += 1
        assert self.mounted.ask("audit")["findings"] == []

    def close(self) -> None:
        self.guest.close()


def fallocate(path: Path, mode: int, offset: int, length: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return ctypes.get_errno() if _libc.fallocate(fd, mode, offset, length) else 0
    finally:
        os.close(fd)
