# SPDX-License-Identifier: GPL-2.0-or-later
"""Loads and stores that may sleep in a page fault, without the interpreter's lock.

A memoryview is read with the lock held.  Where memory lies behind a userfaultfd(2), a load can
sleep until another thread of this process has mapped the page, which would then wait for the lock
for ever.  Functions of C that ctypes calls run without it.
"""

from __future__ import annotations

import ctypes
from typing import Literal, overload

_libc = ctypes.CDLL(None)
_copy = _libc.memcpy
_copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_copy.restype = ctypes.c_void_p


class CarefulView:
    """As much of a memoryview of ``length`` items of ``size`` bytes as engines use.

    One thread may use it at a time.
    """

    def __init__(self, address: int, length: int, size: Literal[1, 8] = 8) -> None:
        self._address = address
        self._length = length
        self._size = size
        self._item = ctypes.c_uint64() if size == 8 else ctypes.c_uint8()
        self._where = ctypes.addressof(self._item)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> bytes: ...

    def __getitem__(self, at: int | slice) -> int | bytes:
        if isinstance(at, slice):
            start, length = self._range(at)
            buffer = ctypes.create_string_buffer(length)
            _copy(buffer, start, length)
            return buffer.raw
        _copy(self._where, self._address_of(at), self._size)
        return self._item.value

    @overload
    def __setitem__(self, at: int, value: int) -> None: ...

    @overload
    def __setitem__(self, at: slice, value: bytes) -> None: ...

    def __setitem__(self, at: int | slice, value: int | bytes) -> None:
        if isinstance(at, slice):
            start, length = self._range(at)
            assert isinstance(value, bytes)
            if len(value) != length:
                raise ValueError(f"{len(value)} bytes do not fit in a slice of {length}")
            _copy(start, value, length)
        else:
            assert isinstance(value, int)
            self._item.value = value
            _copy(self._address_of(at), self._where, self._size)

    def cast(self, format: Literal["B", "Q"]) -> CarefulView:
        """The same memory in other items."""
        size: Literal[1, 8] = 1 if format == "B" else 8
        return CarefulView(self._address, self._length * self._size // size, size)

    def release(self) -> None:
        """Nothing is held."""

    def _address_of(self, at: int) -> int:
        if not 0 <= at < self._length:
            raise IndexError(f"item {at} of {self._length}")
        return self._address + at * self._size

    def _range(self, at: slice) -> tuple[int, int]:
        start, stop, step = at.indices(self._length)
        if step != 1:
            raise ValueError(f"a slice with step {step}")
        return self._address + start * self._size, max(stop - start, 0) * self._size
