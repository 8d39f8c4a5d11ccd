# SPDX-License-Identifier: GPL-2.0-or-later
"""How an ioctl request is made of a direction, a number and a size.

include/uapi/asm-generic/ioctl.h; the type byte is always KVM's.
"""

from __future__ import annotations

from typing import Final

KVMIO: Final = 0xAE
_IOC_WRITE: Final = 1
_IOC_READ: Final = 2


def _ioc(direction: int, nr: int, size: int) -> int:
    """One ioctl request number: direction:2, size:14, type:8, nr:8 from the top."""
    if not 0 <= nr <= 0xFF or not 0 <= size < 1 << 14:
        raise ValueError(f"ioctl nr {nr:#x} size {size} does not fit the request encoding")
    return direction << 30 | size << 16 | KVMIO << 8 | nr


def io(nr: int) -> int:
    """``_IO(KVMIO, nr)``: no argument, or an integer."""
    return _ioc(0, nr, 0)


def ior(nr: int, size: int) -> int:
    """``_IOR(KVMIO, nr, size)``: by name the kernel writes; KVM uses it for inputs as well."""
    return _ioc(_IOC_READ, nr, size)


def iow(nr: int, size: int) -> int:
    """``_IOW(KVMIO, nr, size)``: the kernel reads a struct of ``size`` bytes."""
    return _ioc(_IOC_WRITE, nr, size)


def iowr(nr: int, size: int) -> int:
    """``_IOWR(KVMIO, nr, size)``: the kernel reads and writes a struct of ``size`` bytes."""
    return _ioc(_IOC_READ | _IOC_WRITE, nr, size)
