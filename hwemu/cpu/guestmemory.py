# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory as the vCPU sees it: guest page tables over the second-stage table.

For what the engine does not do itself: event delivery and a look at instruction bytes. The walk
is the processor's (AMD APM vol. 2, 5.3 and 5.4), accessed and dirty bits included. Arena memory is
read directly, which is allowed for the same reason that the engine may: only inside `Cpu.run`,
which a shootdown waits for.
"""

from __future__ import annotations

import zlib
from collections import deque

import numpy as np

from hwemu.careful import CarefulView
from hwemu.cpu.api import (
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
    EFER_NXE,
    Access,
    OnFault,
)
from hwemu.npt import (
    ACCESSED,
    ADDRESS_MASK,
    DIRTY,
    ENTRIES,
    LARGE,
    NX,
    PAGE_SIZE,
    PRESENT,
    RESERVED_MASK,
    USER,
    WRITABLE,
    WalkError,
    lookup,
    walk,
)

_ERROR_PRESENT, _ERROR_WRITE, _ERROR_USER, _ERROR_RESERVED, _ERROR_FETCH = 1, 2, 4, 8, 16
_FAULT_RETRIES = 4
_WALK_SEARCH_TABLES = 16
_TABLE_BITS = np.uint64(PRESENT | LARGE)
_TABLE_ENTRY = np.uint64(ADDRESS_MASK | PRESENT | LARGE)


class Stage2Miss(Exception):
    """The second stage does not allow ``access`` to ``gpa``."""

    def __init__(self, gpa: int, access: Access) -> None:
        super().__init__(f"no second-stage leaf for gpa {gpa:#x} ({access!r})")
        self.gpa = gpa
        self.access = access


class GuestFault(Exception):
    """The guest's own exception: vector, error code, and CR2 of a page fault."""

    def __init__(self, vector: int, error_code: int | None, cr2: int | None = None) -> None:
        super().__init__(f"guest exception {vector}")
        self.vector = vector
        self.error_code = error_code
        self.cr2 = cr2


class Unsupported(Exception):
    """The guest is in a mode that this engine does not emulate."""


class GuestMemory:
    """Walks for one vCPU.

    ``arena`` and ``pool`` are 'Q' views of arena memory and of the table pool; the control
    registers are set by the owner before each use (`enter`).
    """

    def __init__(
        self,
        arena: memoryview | CarefulView,
        arena_hpa: int,
        pool: memoryview,
        pool_hpa: int,
        root: int,
        on_fault: OnFault | None,
    ) -> None:
        self._arena = arena
        self._bytes = arena.cast("B")
        self._arena_hpa = arena_hpa
        self._arena_size = len(arena) * 8
        self._pool = pool
        self._pool_hpa = pool_hpa
        self._root = root
        self._on_fault = on_fault
        self._cr0 = self._cr3 = self._cr4 = self._efer = 0

    def enter(self, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """Use these control registers from now on."""
        self._cr0, self._cr3, self._cr4, self._efer = cr0, cr3, cr4, efer

    def release(self) -> None:
        """Drop the views."""
        self._bytes.release()
        self._arena.release()
        self._pool.release()

    # -- second stage ---------------------------------------------------------------------------

    def offset(self, gpa: int, access: Access) -> int:
        """Byte offset in the arena of ``gpa``; raises `Stage2Miss`."""
        write = access is Access.WRITE
        hpa = lookup(self._pool, self._pool_hpa, self._root, gpa, write)
        attempts = 0
        while hpa < 0:
            try:
                hpa = walk(self._pool, self._pool_hpa, self._root, gpa, write).hpa
            except WalkError:
                attempts += 1
                if (
                    attempts == _FAULT_RETRIES
                    or self._on_fault is None
                    or not self._on_fault(gpa, access)
                ):
                    raise Stage2Miss(gpa, access) from None
        offset = hpa - self._arena_hpa
        if not 0 <= offset < self._arena_size:
            raise Unsupported(f"gpa {gpa:#x} maps to hpa {hpa:#x} outside the arena")
        return offset

    # -- first stage ----------------------------------------------------------------------------

    def translate(self, address: int, access: Access, user: bool) -> int:
        """Guest-physical address of the linear ``address``; raises GuestFault or Stage2Miss."""
        if not self._cr0 & CR0_PG:
            return address & 0xFFFF_FFFF
        if not self._efer & EFER_LMA:
            if self._cr4 & CR4_PAE:
                raise Unsupported("guest paging with PAE outside long mode")
            return self._translate32(address & 0xFFFF_FFFF, access, user)
        if (address >> 47) not in (0, 0x1FFFF):
            raise GuestFault(13, 0)
        error = _ERROR_WRITE if access is Access.WRITE else 0
        error |= _ERROR_USER if user else 0
        if access is Access.EXEC and self._efer & EFER_NXE:
            error |= _ERROR_FETCH
        reserved = RESERVED_MASK if self._efer & EFER_NXE else RESERVED_MASK | NX
        words = self._arena
        table = self._cr3 & ADDRESS_MASK
        rights, no_exec = WRITABLE | USER, 0
        for level in (4, 3, 2, 1):
            shift = 12 + 9 * (level - 1)
            gpa = table + (((address >> shift) & 511) << 3)
            at = self.offset(gpa, Access.WRITE) >> 3  # AMD APM vol. 2, 15.25.6
            entry = words[at]
            if not entry & PRESENT:
                raise GuestFault(14, error, address)
            if entry & reserved or (level == 4 and entry & LARGE):
                raise GuestFault(14, error | _ERROR_PRESENT | _ERROR_RESERVED, address)
            rights &= entry
            no_exec |= entry & NX
            if level == 1 or (level < 4 and entry & LARGE):
                break
            if not entry & ACCESSED:
                words[at] = entry | ACCESSED
            table = entry & ADDRESS_MASK
        size = 1 << shift
        if level > 1 and entry & ADDRESS_MASK & (size - 1) & ~0x1000:
            raise GuestFault(14, error | _ERROR_PRESENT | _ERROR_RESERVED, address)
        denied = user and not rights & USER
        if access is Access.WRITE and not rights & WRITABLE:
            denied = denied or user or bool(self._cr0 & CR0_WP)
        if denied or (access is Access.EXEC and no_exec):
            raise GuestFault(14, error | _ERROR_PRESENT, address)
        touched = entry | ACCESSED | (DIRTY if access is Access.WRITE else 0)
        if touched != entry:
            words[at] = touched
        return int((entry & ADDRESS_MASK & ~(size - 1)) | (address & (size - 1)))

    def _translate32(self, address: int, access: Access, user: bool) -> int:
        """The walk of 32-bit paging: two levels of 4-byte entries, pages of 4 KiB and 4 MiB."""
        error = _ERROR_WRITE if access is Access.WRITE else 0
        error |= _ERROR_USER if user else 0
        words = self._arena
        table = self._cr3 & 0xFFFF_F000
        rights = WRITABLE | USER
        for shift in (22, 12):
            at = self.offset(table + (address >> shift & 1023) * 4, Access.WRITE)
            half = at % 8 * 8  # which half of the 8-byte word
            entry = int(words[at >> 3]) >> half & 0xFFFF_FFFF
            if not entry & PRESENT:
                raise GuestFault(14, error, address)
            rights &= entry
            if shift == 12 or (entry & LARGE and self._cr4 & CR4_PSE):
                break
            words[at >> 3] |= ACCESSED << half
            table = entry & 0xFFFF_F000
        denied = user and not rights & USER
        if access is Access.WRITE and not rights & WRITABLE:
            denied = denied or user or bool(self._cr0 & CR0_WP)
        if denied:
            raise GuestFault(14, error | _ERROR_PRESENT, address)
        words[at >> 3] |= (ACCESSED | (DIRTY if access is Access.WRITE else 0)) << half
        if shift == 12:
            return entry & 0xFFFF_F000 | address & 0xFFF
        # bits 13 to 20 of a large entry are bits 32 to 39 of the address (AMD APM vol. 2, 5.2.2)
        return entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32 | address & 0x3F_FFFF

    def _pieces(
        self, address: int, length: int, access: Access, user: bool
    ) -> list[tuple[int, int]]:
        """Arena (offset, length) of every page piece; all checked before any is used."""
        pieces = []
        while length:
            count = min(length, PAGE_SIZE - (address & (PAGE_SIZE - 1)))
            gpa = self.translate(address, access, user)
            pieces.append((self.offset(gpa, access), count))
            address = (address + count) & 0xFFFF_FFFF_FFFF_FFFF
            length -= count
        return pieces

    def read(self, address: int, length: int, *, user: bool = False, fetch: bool = False) -> bytes:
        """Bytes at a linear address."""
        access = Access.EXEC if fetch else Access.READ
        if (address & (PAGE_SIZE - 1)) + length <= PAGE_SIZE:
            at = self.offset(self.translate(address, access, user), access)
            return bytes(self._bytes[at : at + length])
        pieces = self._pieces(address, length, access, user)
        return b"".join(bytes(self._bytes[at : at + count]) for at, count in pieces)

    def read_int(self, address: int, length: int) -> int:
        """Little-endian unsigned integer at a linear address, supervisor access."""
        return int.from_bytes(self.read(address, length), "little")

    def write(self, address: int, data: bytes, *, user: bool = False) -> None:
        """Store bytes at a linear address."""
        done = 0
        for at, count in self._pieces(address, len(data), Access.WRITE, user):
            self._bytes[at : at + count] = data[done : done + count]
            done += count

    def code(self, address: int, user: bool) -> bytes:
        """Up to 15 instruction bytes at ``address``, less where the next page is not there."""
        here = min(15, PAGE_SIZE - (address & (PAGE_SIZE - 1)))
        data = self.read(address, here, user=user, fetch=True)
        if here < 15:
            try:
                data += self.read(address + here, 15 - here, user=user, fetch=True)
            except (GuestFault, Stage2Miss):
                pass
        return data

    def checksum(self, page: int) -> int | None:
        """A sum of guest-physical page number ``page``; None: the second stage has no leaf."""
        try:
            at = self.offset(page * PAGE_SIZE, Access.READ)
        except (Stage2Miss, Unsupported):
            return None
        return zlib.crc32(self._bytes[at : at + PAGE_SIZE])

    def is_guest_table(self, gpa: int) -> bool | None:
        """Whether the page of ``gpa`` is one of the guest's page tables; None: not found out.

        Looks at a bounded number of tables from CR3 down, for a fault report only.
        """
        if not self._cr0 & CR0_PG or not self._efer & EFER_LMA or gpa & 7:
            return False
        page = gpa & ADDRESS_MASK
        root = self._cr3 & ADDRESS_MASK
        if page == root:
            return True
        queue = deque([(root, 4)])
        for _ in range(_WALK_SEARCH_TABLES):
            if not queue:
                return False
            table, level = queue.popleft()
            try:
                hpa = walk(self._pool, self._pool_hpa, self._root, table, True).hpa
            except WalkError:
                continue
            at = (hpa - self._arena_hpa) >> 3
            if not 0 <= at < len(self._arena):
                continue
            row = np.frombuffer(self._arena[at : at + ENTRIES], dtype=np.uint64)
            # an entry that leads to a table: present, and not a large leaf
            below = row & _TABLE_ENTRY
            if (below == page | PRESENT).any():
                return True
            if level > 2:
                below = below[(below & _TABLE_BITS) == PRESENT]
                queue.extend((entry & ADDRESS_MASK, level - 1) for entry in below[:16].tolist())
        return None
