# SPDX-License-Identifier: GPL-2.0-or-later
"""One instruction that talks to a device: replayed until every read of it is answered.

The instruction is executed as a whole by the engine, never decoded. A read without an answer
rolls the attempt back and leaves the engine as an exit; the answer is kept and the instruction
tried again. Writes become exits after the attempt that completed the instruction. So a
read-modify-write gives its read first and its write afterwards.

A repeated instruction is tried element by element. Of a repeated INS the device is asked for many
elements at once (`read_ahead`), and what it said lasts for as many attempts.
"""

from __future__ import annotations

from collections import deque

from hwemu.cpu.api import IoExit, MmioExit
from hwemu.npt import (
    ACCESSED,
    ADDRESS_MASK,
    DIRTY,
    ENTRIES,
    LARGE,
    NON_LEAF,
    PAGE_SIZE,
    PRESENT,
    ROOT_LEVEL,
    USER,
    WRITABLE,
)

DeviceExit = IoExit | MmioExit
MAX_PAGES = 2
"""Device pages one instruction may touch: one access that crosses a page boundary."""

_LEAF = PRESENT | WRITABLE | USER | ACCESSED | DIRTY
_WIDEST = 8
_READ_AHEAD = 1024


class PrivateTables:
    """An engine's own path through the second stage, for the length of one instruction.

    Copies of the tables on the way to up to two pages, with those pages leading to device memory
    instead; all other entries are the VM's. The last page is an empty root: nothing is reachable.
    """

    def __init__(
        self, area: memoryview, first_hpa: int, pool: memoryview, pool_hpa: int, root_hpa: int
    ) -> None:
        self._area = area
        self._hpa = first_hpa
        self._pool = pool
        self._pool_hpa = pool_hpa
        self._root_hpa = root_hpa
        self._ntables = len(area) // ENTRIES - 1
        self._used = 0
        self.empty_root_hpa = first_hpa + self._ntables * PAGE_SIZE
        self._clear(self._ntables)

    def release(self) -> None:
        """Drop the views."""
        self._area.release()
        self._pool.release()

    def _clear(self, table: int) -> None:
        self._area[table * ENTRIES : (table + 1) * ENTRIES] = memoryview(bytes(PAGE_SIZE)).cast("Q")

    def _copy(self, hpa: int) -> int:
        """A private copy of the table at ``hpa`` in the pool; its index."""
        table = self._used
        self._used += 1
        at = (hpa - self._pool_hpa) >> 3
        self._area[table * ENTRIES : (table + 1) * ENTRIES] = self._pool[at : at + ENTRIES]
        return table

    def build(self, pages: dict[int, int]) -> int:
        """Root of tables in which each gpa of ``pages`` leads to its device hpa."""
        self._used = 0
        self._copy(self._root_hpa)
        private = {0}
        for gpa, hpa in pages.items():
            table = 0
            for level in range(ROOT_LEVEL, 1, -1):
                word = table * ENTRIES + (gpa >> (12 + 9 * (level - 1)) & 511)
                entry = self._area[word]
                below = (entry & ADDRESS_MASK) - self._hpa >> 12
                if not (entry & PRESENT and below in private):
                    below = self._take(entry, level)
                    private.add(below)
                    self._area[word] = self._hpa + below * PAGE_SIZE | NON_LEAF
                table = below
            self._area[table * ENTRIES + (gpa >> 12 & 511)] = hpa | _LEAF
        return self._hpa

    def _take(self, entry: int, level: int) -> int:
        """A private table with what ``entry`` of ``level`` maps: nothing, a table, a large leaf."""
        if entry & PRESENT and not entry & LARGE:
            return self._copy(entry & ADDRESS_MASK)
        table = self._used
        self._used += 1
        self._clear(table)
        if entry & PRESENT:
            base = entry & ~LARGE if level == 2 else entry
            step = PAGE_SIZE << 9 * (level - 2)
            for index in range(ENTRIES):
                self._area[table * ENTRIES + index] = base + index * step
        return table


def read_ahead(size: int, rcx: int, rdi: int, *, backwards: bool) -> int:
    """How many elements of ``size`` bytes a repeated INS asks for at once.

    As KVM does (pio_in_emulated() of arch/x86/kvm/emulate.c), who takes the bytes that are left
    of the page for elements.
    """
    in_page = rdi % PAGE_SIZE if backwards else PAGE_SIZE - rdi % PAGE_SIZE
    return max(min(in_page, _READ_AHEAD // size, rcx), 1)


class DeviceAccess:
    """The state of one replayed instruction at ``rip``."""

    def __init__(self, rip: int) -> None:
        self.rip = rip
        self.pages: list[int] = []
        self.unanswered: DeviceExit | None = None
        self._answers: list[DeviceExit] = []
        self._writes: deque[DeviceExit] = deque()
        self._next = 0
        self._piece = 0
        self._elements = 1  # that were asked for at once
        self._load = (0, 0)
        self._loaded: dict[bool, MmioExit] = {}

    def add_page(self, gpa: int) -> bool:
        """Take the page of ``gpa`` as a device; False if the instruction has too many."""
        page = gpa & ~(PAGE_SIZE - 1)
        if page not in self.pages:
            if len(self.pages) == MAX_PAGES:
                return False
            self.pages.append(page)
        return True

    def answer(self, data: bytes) -> None:
        """The device's answer to `unanswered`."""
        asked = self.unanswered
        assert asked is not None
        self.unanswered = None
        if isinstance(asked, MmioExit):
            self._answers.append(MmioExit(asked.gpa, asked.size, False, data))
        else:
            size = asked.size
            self._answers += [
                IoExit(asked.port, size, False, data[at : at + size])
                for at in range(0, len(data), size)
            ]

    def ask_for(self, count: int) -> None:
        """Have `unanswered`, of a port, ask for as many elements."""
        asked = self.unanswered
        assert isinstance(asked, IoExit)
        self.unanswered = IoExit(asked.port, asked.size, False, count=count)
        self._elements = count

    @property
    def asked(self) -> int:
        """Bytes that answer `unanswered`."""
        match self.unanswered:
            case IoExit(size=size, count=count):
                return size * count
            case MmioExit(size=size):
                return size
        return 0

    def done(self) -> bool:
        """An attempt completed the instruction, or an element of it: whether nothing is left.

        Else it is tried again for the next element, which finds its own device pages.
        """
        del self._answers[: self._next]
        self._next = 0
        self.pages.clear()
        return self._elements == 1 or not self._answers

    @property
    def answered(self) -> bool:
        """Whether the device has said something that the instruction has not taken yet."""
        return self.unanswered is None and bool(self._answers)

    # -- one attempt ----------------------------------------------------------------------------

    def begin_attempt(self) -> None:
        """Forget what the last attempt did; answers stay."""
        self.unanswered = None
        self._writes.clear()
        self._next = 0
        self._piece = 0

    def writes(self) -> deque[DeviceExit]:
        """The writes of the completed attempt, in order."""
        return self._writes

    def _known(self) -> bytes | None:
        """The next answer, if there is one."""
        if self._next == len(self._answers):
            return None
        self._next += 1
        return self._answers[self._next - 1].data

    def begin_load(self, offset: int, size: int) -> None:
        """The instruction loads ``size`` bytes (1…8) at ``offset`` of a page, a device's or not."""
        self._load = (offset, size)
        self._loaded.clear()

    def read_memory(self, gpa: int, size: int) -> int | None:
        """The engine reads for the load that was begun; None: not known yet, the attempt is void.

        It reads an aligned word by halves, and a misaligned one by the two aligned words around
        it. The device is asked once for what the load has on each of its pages, and for no other
        byte (KVM: emulator_read_write()).
        """
        if self.unanswered is not None:
            return None
        offset, wanted = self._load
        # Behind a page boundary the words begin again at the start of a page.
        second = offset + wanted > PAGE_SIZE and gpa % PAGE_SIZE < offset & -wanted
        part = self._loaded.get(second)
        if part is None:
            on_first = min(wanted, PAGE_SIZE - offset)
            at, length = (0, wanted - on_first) if second else (offset, on_first)
            asked = MmioExit(gpa & -PAGE_SIZE | at, length, False)
            data = self._known()
            if data is None:
                self.unanswered = asked
                return None
            part = self._loaded[second] = MmioExit(asked.gpa, length, False, data)
        first = gpa - part.gpa
        picked = part.data[max(first, 0) : max(first + size, 0)]
        return int.from_bytes(picked, "little") << 8 * max(-first, 0)

    def write_memory(self, gpa: int, size: int, value: int) -> None:
        """The guest writes; void after an unanswered read."""
        if self.unanswered is not None:
            return
        data = value.to_bytes(8, "little")[:size]
        last = self._writes[-1] if self._writes else None
        if isinstance(last, MmioExit) and (
            self._joins(last, gpa, size)
            # a misaligned store comes as single bytes; KVM's ends at a page boundary
            or (
                size == self._piece == 1
                and gpa == last.gpa + last.size
                and last.size < _WIDEST
                and gpa % PAGE_SIZE
            )
        ):
            self._writes[-1] = MmioExit(last.gpa, last.size + size, True, last.data + data)
        else:
            self._writes.append(MmioExit(gpa, size, True, data))
        self._piece = size

    @staticmethod
    def _joins(last: MmioExit, gpa: int, size: int) -> bool:
        return (
            size == 4 and last.size == 4 and last.gpa % _WIDEST == 0 and gpa == last.gpa + last.size
        )

    def read_port(self, port: int, size: int) -> int | None:
        """IN or INS; None: not known yet."""
        if self.unanswered is not None:
            return None
        self._writes.clear()  # INS has stored a zero, to see that it can
        self._piece = 0
        data = self._known()
        if data is None:
            self.unanswered = IoExit(port, size, False)
            return None
        return int.from_bytes(data, "little")

    def write_port(self, port: int, size: int, value: int) -> None:
        """OUT or OUTS."""
        if self.unanswered is None:
            self._writes.append(IoExit(port, size, True, value.to_bytes(4, "little")[:size]))
