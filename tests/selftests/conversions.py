# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM whose guest converts its memory: slots over one guest_memfd, and the VMM that obeys."""

from __future__ import annotations

import itertools
from typing import Final

from selftests.guest import PUNCH_TOO
from selftests.machine import Background, Machine, shared_runs

from kvmsim.uapi import PAGE_SIZE

BASE: Final = 64 << 20
HUGE: Final = 2 << 20
PER_CPU: Final = HUGE + PAGE_SIZE
RANGES: Final = (
    (0, PAGE_SIZE), (0, HUGE), (PAGE_SIZE, PAGE_SIZE), (PAGE_SIZE, HUGE), (HUGE, PAGE_SIZE),
)  # fmt: skip
"""What is converted of the memory of a vCPU: offset, size."""


class Conversions:
    """``vcpus`` vCPUs with PER_CPU bytes each, in ``slots`` slots of equal size.

    ``room`` bytes follow for whoever needs them. ``discard``: what a conversion leaves is given
    back at once, on both sides.
    """

    def __init__(
        self,
        machine: Machine,
        vcpus: int,
        slots: int,
        *,
        room: int = 0,
        discard: bool = False,
    ) -> None:
        machine.need_guest_memfd()
        self.machine = machine
        self.discard = discard
        self.vm = machine.vm(private=True)
        self.players = machine.players(self.vm, vcpus)
        pages = (vcpus * PER_CPU + room) // PAGE_SIZE
        self.size = pages * PAGE_SIZE
        self.memory = machine.kvm.allocate(self.size)
        self.file = self.vm.create_guest_memfd(self.size)
        cuts = [number * pages // slots * PAGE_SIZE for number in range(slots + 1)]
        for start, end in itertools.pairwise(cuts):
            self.vm.add_slot(
                BASE + start, self.memory, memory_offset=start, guest_memfd=self.file,
                offset=start, size=end - start,
            )  # fmt: skip

    def close(self) -> None:
        """End the VM; file and memory live on."""
        self.vm.close()

    # --- the VMM ------------------------------------------------------------------------------

    def obey(self, gpa: int, size: int, flags: int) -> None:
        """KVM_HC_MAP_GPA_RANGE of a guest."""
        private = bool(flags & 1 << 4)
        offset = gpa - BASE
        if flags & PUNCH_TOO and private:
            self.file.allocate(offset, size)
        self.vm.convert(gpa, size, private=private)
        if self.discard:
            if private:
                self.memory.discard(offset, size)
            else:
                self.file.discard(offset, size)
        elif flags & PUNCH_TOO and not private:
            self.file.discard(offset, size)

    def look(self, gpa: int, size: int, expected: int) -> None:
        """The shared side is what the guest says it must be: a byte."""
        found = self.memory.read(gpa - BASE, size)
        assert found == bytes([expected & 0xFF]) * size, f"gpa {gpa:#x}+{size:#x}"

    def look_and_write(self, gpa: int, size: int, patterns: int) -> None:
        """The same; then another byte is written if there is one above the first."""
        self.look(gpa, size, patterns)
        if patterns >> 8:
            self.memory.write(gpa - BASE, bytes([patterns >> 8]) * size)

    def doubled(self, offset: int, size: int) -> int:
        """Bytes of a range that are allocated on both sides."""
        private = self.machine.pages(self.file)
        first, last = offset // PAGE_SIZE, (offset + size) // PAGE_SIZE
        both = 0
        for start, end in shared_runs(self.memory):
            for page in range(max(first, start // PAGE_SIZE), min(last, -(-end // PAGE_SIZE))):
                both += page in private
        return both * PAGE_SIZE


def all_at_once(conversions: Conversions, work: object) -> None:
    """``work(number, player)`` for every vCPU, each in a thread of its own."""
    threads = [
        Background(lambda number=number, player=player: work(number, player))  # type: ignore[operator]
        for number, player in enumerate(conversions.players)
    ]
    errors = []
    for thread in threads:
        try:
            thread.end(600)
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]
