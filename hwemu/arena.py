# SPDX-License-Identifier: GPL-2.0-or-later
"""The arena: one NORESERVE reservation that is the host-physical memory of this process.

Every engine maps it once and for ever. A range of a memory file becomes guest-visible by mapping
it over a part of the reservation (`Arena.place`), and stops being reachable by mapping fresh
anonymous memory over it (`Arena.retire`): the file can then be truncated without SIGBUS, and a
stale access meets zeros instead of somebody's memory.

The reservation is MADV_DONTFORK and MADV_DONTDUMP. Its address space is handed out next-fit, so
that an address is not used again soon after it was retired. As a large page of a file is aligned
in physical memory, so is a placement: it lies as far behind a multiple of 2 MiB as its offset in
the file, and second-stage leaves of that size are possible.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import mmap
import os
from dataclasses import dataclass

from hwemu import processmemory, usercopy
from hwemu.careful import CarefulView

PAGE_SIZE = 4096
TWO_MIB = 2 << 20
GIB = 1 << 30
HPA_LIMIT = 1 << 40

_PROT_READ, _PROT_WRITE = mmap.PROT_READ, mmap.PROT_WRITE
_MAP_SHARED, _MAP_PRIVATE = mmap.MAP_SHARED, mmap.MAP_PRIVATE
_MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x10, mmap.MAP_ANONYMOUS, 0x4000
_MADV_DONTFORK, _MADV_DONTDUMP = 10, 16
_MAP_FAILED = ctypes.c_void_p(-1).value


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


_libc = _load_libc()


class ArenaError(Exception):
    """Base of what this module raises: the message names operation, range and remedy."""


class ArenaRangeError(ArenaError, ValueError):
    """A range is misaligned, empty, outside the arena or not placed; nothing was changed."""


class ArenaFullError(ArenaError, MemoryError):
    """No free stretch of host-physical address space is long enough."""


class ArenaFault(ArenaError):
    """A device access met memory that is not there: ``hpa``, ``length`` and the kernel's errno."""

    def __init__(self, operation: str, hpa: int, length: int, code: int, why: str) -> None:
        name = errno.errorcode.get(code, str(code))
        super().__init__(f"arena {operation} of [{hpa:#x}, {hpa + length:#x}): {why} ({name})")
        self.hpa = hpa
        self.length = length
        self.errno = code


@dataclass(frozen=True, slots=True)
class ArenaStatistics:
    """Bytes placed, bytes free, placed ranges, and calls so far."""

    size: int
    placed_bytes: int
    placements: int
    places: int
    retires: int


def new_table_pool(size: int) -> mmap.mmap:
    """A page-aligned private pool of ``size`` bytes for `hwemu.stage2.Stage2`, untouched memory.

    Never inherited by a fork and not dumped. Close it only after every engine that maps it.
    """
    if size <= 0 or size % PAGE_SIZE:
        raise ArenaRangeError(f"table pool of {size} bytes: need whole 4096-byte pages")
    pool = mmap.mmap(-1, size, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE)
    pool.madvise(_MADV_DONTFORK)
    pool.madvise(_MADV_DONTDUMP)
    return pool


class Arena:
    """``size`` bytes of host-physical space from ``hpa_base``, reserved, nothing behind it yet."""

    def __init__(self, size: int = 512 * GIB, hpa_base: int = 1 << 39) -> None:
        if size <= 0 or size % PAGE_SIZE or hpa_base % PAGE_SIZE or hpa_base < 0:
            raise ArenaRangeError(f"arena of {size} bytes at {hpa_base:#x}: must be page-aligned")
        if hpa_base + size > HPA_LIMIT:
            raise ArenaRangeError(
                f"arena [{hpa_base:#x}, {hpa_base + size:#x}): the engine's host-physical space "
                "ends at 2**40"
            )
        self.size = size
        self.hpa_base = hpa_base
        #: Bytes from the beginning that are used before the others: those that tables cover.
        self.covered = size
        #: Whether a touch of placed memory may sleep until another thread has seen to it.
        self.careful = False
        self._address = self._reserve(size, hpa_base)
        # free stretches, sorted by start; next-fit cursor
        self._free: list[tuple[int, int]] = [(hpa_base, hpa_base + size)]
        self._cursor = hpa_base
        # placed ranges, sorted by start, never overlapping
        self._placed: list[tuple[int, int]] = []
        self._places = 0
        self._retires = 0
        self._pid = os.getpid()

    # -- mapping --------------------------------------------------------------------------------

    @property
    def address(self) -> int:
        """Where the reservation begins in this process; engines map it at ``hpa_base``."""
        self._require_open("address")
        return self._address

    def _require_open(self, operation: str) -> None:
        if self._address == 0:
            raise ArenaError(f"arena {operation}: the arena is closed")

    def _reserve(self, size: int, hpa_base: int) -> int:
        """Address space of which every address equals its hpa modulo 1 GiB.

        So the kernel's large pages (THP, hugetlb) can be where the second stage has large leaves.
        """
        raw = self._map_anonymous(0, size + GIB)
        address = raw + (hpa_base - raw) % GIB
        end = raw + size + GIB
        for start, length in ((raw, address - raw), (address + size, end - address - size)):
            if length:
                _libc.munmap(start, length)
        return address

    @staticmethod
    def _map_anonymous(address: int, length: int) -> int:
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED if address else 0)
        got = _libc.mmap(address or None, length, _PROT_READ | _PROT_WRITE, flags, -1, 0)
        if got == _MAP_FAILED:
            code = ctypes.get_errno()
            raise ArenaError(f"arena mmap of {length} anonymous bytes: {os.strerror(code)}")
        Arena._advise(got, length)
        return int(got)

    @staticmethod
    def _advise(address: int, length: int) -> None:
        for advice in (_MADV_DONTFORK, _MADV_DONTDUMP):
            if _libc.madvise(address, length, advice):
                code = ctypes.get_errno()
                raise ArenaError(f"arena madvise({advice}): {os.strerror(code)}")

    def _allocate(self, length: int, unit: int, offset: int) -> int:
        """Take ``length`` bytes whose hpa is ``offset`` modulo ``unit``."""
        hpa = self._fit(length, unit, offset, self.hpa_base + self.covered)
        if hpa is None and self.covered < self.size:
            hpa = self._fit(length, unit, offset, self.hpa_base + self.size)
        if hpa is None:
            raise ArenaFullError(
                f"arena place of {length} bytes: no free stretch that long in {self.size} bytes; "
                "retire ranges first"
            )
        return hpa

    def _fit(self, length: int, unit: int, offset: int, end: int) -> int | None:
        """The same below ``end``; None if there is no room."""
        start = bisect.bisect_left(self._free, (self._cursor, 0))
        # the cursor may be in the middle of a stretch that joined behind it: first what follows it
        for step in range(-1 if start else 0, len(self._free)):
            index = (start + step) % len(self._free)
            lower, upper = self._free[index]
            first = max(lower, self._cursor) if step < 0 else lower
            hpa = first + (offset - first) % unit
            if hpa + length <= min(upper, end):
                rest = ((lower, hpa), (hpa + length, upper))
                self._free[index : index + 1] = [part for part in rest if part[0] < part[1]]
                self._cursor = hpa + length
                return hpa
        return None

    def _release(self, lower: int, upper: int) -> None:
        index = bisect.bisect_left(self._free, (lower, 0))
        if index < len(self._free) and self._free[index][0] == upper:
            upper = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == lower:
            index -= 1
            lower = self._free.pop(index)[0]
        self._free.insert(index, (lower, upper))

    def place(self, fd: int, offset: int, length: int, *, writable: bool = True) -> int:
        """Map ``length`` bytes of ``fd`` from ``offset`` into the arena, shared; return the hpa.

        The hpa equals ``offset`` modulo 2 MiB, or modulo the file's own page size if that is
        larger, unless the range is too short for a large leaf. A range placed with
        ``writable=False`` must have read-only second-stage leaves: an engine that stores to it
        would end the process. Raises `ArenaRangeError`, `ArenaFullError`, or `ArenaError` with the
        kernel's reason.
        """
        self._require_open("place")
        if length <= 0 or length % PAGE_SIZE or offset < 0 or offset % PAGE_SIZE:
            raise ArenaRangeError(
                f"arena place of fd {fd} [{offset}, {offset + length}): offset and length must be "
                "multiples of 4096, length above 0"
            )
        where = f"arena place of fd {fd} [{offset}, {offset + length})"
        try:
            unit = os.fstat(fd).st_blksize  # hugetlb must be mapped at multiples of its page size
        except OSError as error:
            raise ArenaError(f"{where}: {error.strerror}") from None
        unit = max(unit, TWO_MIB if length >= TWO_MIB else PAGE_SIZE)
        hpa = self._allocate(length, unit, offset)
        address = self._address + hpa - self.hpa_base
        prot = _PROT_READ | (_PROT_WRITE if writable else 0)
        flags = _MAP_SHARED | _MAP_FIXED | _MAP_NORESERVE  # the owner has allocated what is granted
        got = _libc.mmap(address, length, prot, flags, fd, offset)
        if got == _MAP_FAILED:
            code = ctypes.get_errno()
            # MAP_FIXED may have removed the reservation before it failed
            self._map_anonymous(address, length)
            self._release(hpa, hpa + length)
            mend = "; raise RLIMIT_MEMLOCK (ulimit -l)" if code == errno.EAGAIN else ""  # secretmem
            raise ArenaError(f"{where}: {os.strerror(code)}{mend}")
        self._advise(address, length)
        bisect.insort(self._placed, (hpa, hpa + length))
        self._places += 1
        return hpa

    def vacate(self, hpa: int, length: int) -> None:
        """Map fresh anonymous memory over a placed range, which stays placed until `retire`.

        As with `retire`, no leaf leads there: it is for addresses that something else still names.
        """
        self._placement("vacate", hpa, length)
        self._map_anonymous(self._address + hpa - self.hpa_base, length)

    def _placement(self, operation: str, hpa: int, length: int) -> int:
        """The index of the placement that holds a range; ArenaRangeError if none does."""
        self._require_open(operation)
        index = self._find(hpa, length)
        if index < 0 or length % PAGE_SIZE or hpa % PAGE_SIZE:
            raise ArenaRangeError(
                f"arena {operation} of [{hpa:#x}, {hpa + length:#x}): must be page-aligned and "
                "inside one placed range"
            )
        return index

    def retire(self, hpa: int, length: int) -> None:
        """Map fresh anonymous memory over a placed range and free its addresses.

        Engines may have the arena mapped and may be running; the caller has zapped and flushed
        every leaf into the range. Part of a placement may be retired.
        """
        index = self._placement("retire", hpa, length)
        self._map_anonymous(self._address + hpa - self.hpa_base, length)
        lower, upper = self._placed.pop(index)
        if hpa + length < upper:
            self._placed.insert(index, (hpa + length, upper))
        if lower < hpa:
            self._placed.insert(index, (lower, hpa))
        self._release(hpa, hpa + length)
        self._retires += 1

    def _find(self, hpa: int, length: int) -> int:
        """Index of the placement that covers the range, or -1."""
        index = bisect.bisect_right(self._placed, (hpa, HPA_LIMIT)) - 1
        if index < 0 or length <= 0:
            return -1
        lower, upper = self._placed[index]
        return index if lower <= hpa and hpa + length <= upper else -1

    # -- device access --------------------------------------------------------------------------

    def _transfer(
        self, operation: str, hpa: int, buffer: ctypes.Array[ctypes.c_char], length: int
    ) -> None:
        self._require_open(operation)
        if length == 0:
            return
        if self._find(hpa, length) < 0:
            raise ArenaFault(operation, hpa, length, errno.EFAULT, "not inside one placed range")
        call = processmemory.read if operation == "read" else processmemory.write
        here, there = ctypes.addressof(buffer), self._address + hpa - self.hpa_base
        code, done = errno.EFAULT, 0
        try:
            done = call(self._pid, there, here, length)
        except OSError as error:
            code = error.errno or errno.EFAULT
        if done != length and code == errno.EFAULT:  # not there, or there but never pinned
            to, source = (here, there) if operation == "read" else (there, here)
            done = usercopy.copy(to, source, length)
        if done != length:
            raise ArenaFault(operation, hpa, length, code, f"only {done} bytes could be reached")

    def read(self, hpa: int, length: int) -> bytes:
        """Copy ``length`` bytes out of placed memory for a device; raises `ArenaFault`.

        Goes through process_vm_readv(2), so that a page past the end of its file is an error and
        never a signal.
        """
        buffer = ctypes.create_string_buffer(length)
        self._transfer("read", hpa, buffer, length)
        return buffer.raw

    def write(self, hpa: int, data: bytes) -> None:
        """Copy ``data`` into placed memory for a device; raises `ArenaFault`."""
        buffer = ctypes.create_string_buffer(data, len(data))
        self._transfer("write", hpa, buffer, len(data))

    def words(self) -> memoryview | CarefulView:
        """All of the arena as a writable 'Q' view, for engines only.

        No bounds but the arena's own and no protection from SIGBUS: only for addresses that a
        second-stage leaf gave, and only while a shootdown would wait for the reader.
        """
        self._require_open("words")
        if self.careful:
            return CarefulView(self._address, self.size // 8)
        storage = (ctypes.c_uint64 * (self.size // 8)).from_address(self._address)
        return memoryview(storage).cast("B").cast("Q")

    def statistics(self) -> ArenaStatistics:
        """Counts now."""
        return ArenaStatistics(
            size=self.size,
            placed_bytes=sum(upper - lower for lower, upper in self._placed),
            placements=len(self._placed),
            places=self._places,
            retires=self._retires,
        )

    def close(self) -> None:
        """Unmap everything; only after every engine that maps the arena is closed. Idempotent."""
        if self._address:
            _libc.munmap(self._address, self.size)
            self._address = 0
            self._free.clear()
            self._placed.clear()
