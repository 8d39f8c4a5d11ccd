# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's clocks as KVM uses them: nanoseconds, and the time stamp counter.

The engine lets RDTSC read the host's counter; so does this, by the same instruction.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import time
from collections.abc import Callable
from typing import Final

_RDTSC: Final = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
_CALIBRATION_NS: Final = 10_000_000


@functools.cache
def _rdtsc() -> Callable[[], int]:
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_RDTSC)
    code = ctypes.addressof(ctypes.c_char.from_buffer(page))
    function = ctypes.CFUNCTYPE(ctypes.c_uint64)(code)

    def read(keep: object = page) -> int:
        return int(function())

    return read


@functools.cache
def _measured_khz() -> int:
    """The counter's frequency, by the monotonic clock over ten milliseconds."""
    read = _rdtsc()
    began, first = time.monotonic_ns(), read()
    while (passed := time.monotonic_ns() - began) < _CALIBRATION_NS:
        pass
    return (read() - first) * 1_000_000 // passed


class Clock:
    """The clocks of one VM."""

    def __init__(self) -> None:
        self._kvmclock_base = time.monotonic_ns()

    @staticmethod
    def tsc() -> int:
        """The time stamp counter now."""
        return _rdtsc()()

    @property
    def tsc_khz(self) -> int:
        """Its frequency in kHz."""
        return _measured_khz()

    @staticmethod
    def realtime_ns() -> int:
        """CLOCK_REALTIME."""
        return time.time_ns()

    @property
    def kvmclock_ns(self) -> int:
        """What a kvmclock of the guest would read."""
        return time.monotonic_ns() - self._kvmclock_base

    def set_kvmclock(self, now_ns: int) -> None:
        """Have it go on from ``now_ns``."""
        self._kvmclock_base = time.monotonic_ns() - now_ns
