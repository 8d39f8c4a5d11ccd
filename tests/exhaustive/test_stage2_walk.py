# SPDX-License-Identifier: GPL-2.0-or-later
"""Every small combination of entry bits: the table's walk, the engine's walk, and an oracle.

In the manner of kvm-unit-tests' x86/access.c: the oracle below is written from the manual (AMD
APM vol. 2, 5.3, 5.4, 15.25) and shares no code with either walk. A failing case is printed as
words.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest

from hwemu.cpu import rawcontext
from hwemu.cpu.api import Access, HltExit, Stage2Fault
from hwemu.stage2 import WalkError, WalkReason
from hwemu.testing import PD, POOL_HPA, TEXT, Machine

pytestmark = pytest.mark.exhaustive

TARGET = 1 << 39 | 0x20_3000
"""Guest-physical; the path to it holds nothing else."""
LINEAR = 0x20_3000

# bit -> word
BITS = {
    1 << 0: "present",
    1 << 1: "writable",
    1 << 2: "user",
    1 << 5: "accessed",
    1 << 7: "large",
    1 << 13: "address-bit-13",
    1 << 40: "reserved-bit-40",
    1 << 63: "no-execute",
}
ORDINARY = 0x27
VARIANTS = {
    "ordinary": ORDINARY,
    "absent": ORDINARY & ~1,
    "read-only": ORDINARY & ~2,
    "supervisor": ORDINARY & ~4,
    "not accessed": ORDINARY & ~0x20,
    "reserved bit": ORDINARY | 1 << 40,
    "no execute": ORDINARY | 1 << 63,
    "large": ORDINARY | 1 << 7,
    "large, misaligned": ORDINARY | 1 << 7 | 1 << 13,
    "large, read-only": (ORDINARY | 1 << 7) & ~2,
}

Levels = tuple[int, int, int, int]
"""Flag bits of the entries at levels 4, 3, 2, 1."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A translation (``hpa`` offset in the arena) or a fault with its P and RSVD bits."""

    offset: int | None = None
    present: bool = False
    reserved: bool = False


# where each kind of leaf leads: address field of the entry at levels 3, 2, 1
LEAF_BASE = {3: 0, 2: 0x40_0000, 1: 0x8000}


def oracle(levels: Levels, access: Access) -> Outcome:
    """What the manual says."""
    all_writable = all_user = True
    some_no_execute = False
    for level, flags in zip((4, 3, 2, 1), levels, strict=True):
        if not flags & 1:
            return Outcome()
        is_leaf = level == 1 or (bool(flags & 1 << 7) and level < 4)
        bad = bool(flags & 1 << 40)
        if level == 4 and flags & 1 << 7:
            bad = True
        if is_leaf and level > 1 and flags & 1 << 13:
            bad = True
        if bad:
            return Outcome(present=True, reserved=True)
        all_writable = all_writable and bool(flags & 2)
        all_user = all_user and bool(flags & 4)
        some_no_execute = some_no_execute or bool(flags >> 63)
        if is_leaf:
            break
    if not all_user:
        return Outcome(present=True)
    if access == Access.WRITE and not all_writable:
        return Outcome(present=True)
    if access == Access.EXEC and some_no_execute:
        return Outcome(present=True)
    size = {1: 1 << 12, 2: 1 << 21, 3: 1 << 30}[level]
    # bit 13 belongs to the address of a 4 KiB leaf
    extra = flags & 1 << 13 if level == 1 else 0
    return Outcome(offset=(LEAF_BASE[level] | extra) + TARGET % size)


class Walker:
    """A machine whose path to TARGET is rewritten for every case."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        assert machine.hpa == 1 << 39, "a 1 GiB leaf needs the file at an aligned address"
        machine.write(PD + 8, struct.pack("<Q", 1 << 39 | 0x20_0000 | 0x87))
        machine.holes.add(TARGET >> 12)
        # markers: at every place that any leaf can lead to, code that says where it is
        for place in self.places():
            machine.write(place, b"\xb8" + struct.pack("<I", place) + b"\xf4")
        machine.stage2.map(TARGET, machine.hpa, 1)
        self.words = memoryview(machine.pool).cast("B").cast("Q")
        self.path = []
        table = 0
        for level in (4, 3, 2, 1):
            word = table * 512 + (TARGET >> (12 + 9 * (level - 1)) & 511)
            self.path.append(word)
            table = ((self.words[word] & 0xFFFF_FFFF_F000) - POOL_HPA) >> 12
        self.below = [self.words[word] & 0xFFFF_FFFF_F000 for word in self.path[:3]]
        # entry code: read, write, jump
        self.code = {
            Access.READ: bytes.fromhex("8b 46 01 f4"),  # mov eax,[rsi+1]; hlt
            Access.WRITE: bytes.fromhex("48 89 7e 10 b8 00 00 00 00 f4"),  # mov [rsi+16],rdi
            Access.EXEC: bytes.fromhex("ff e6"),  # jmp rsi
        }
        machine.boot(b"\x90")
        for at, bytes_ in enumerate(self.code.values()):
            machine.write(TEXT + 0x40 * at, bytes_)

    @staticmethod
    def places() -> Iterator[int]:
        for level, size in ((1, 1 << 12), (2, 1 << 21), (3, 1 << 30)):
            yield LEAF_BASE[level] + TARGET % size
        yield LEAF_BASE[1] + (1 << 13) + TARGET % 4096

    def set(self, levels: Levels) -> None:
        for level, word, flags, below in zip(
            (4, 3, 2, 1), self.path, levels, (*self.below, 0), strict=True
        ):
            leaf = level == 1 or (flags & 1 << 7 and level < 4)
            address = self.machine.hpa | LEAF_BASE[level] if leaf else below
            if not leaf:
                flags &= ~(1 << 13)  # would lead to another table
            self.words[word] = address | flags

    def by_table(self, access: Access) -> Outcome:
        try:
            leaf = self.machine.stage2.walk(TARGET, write=access == Access.WRITE)
        except WalkError as error:
            return Outcome(
                present=error.reason is not WalkReason.NOT_PRESENT,
                reserved=error.reason is WalkReason.RESERVED_BIT,
            )
        if access == Access.EXEC and not leaf.executable:
            return Outcome(present=True)
        return Outcome(offset=leaf.hpa - self.machine.hpa)

    def by_engine(self, access: Access) -> Outcome:
        machine, cpu = self.machine, self.machine.cpu
        cpu._engine.flush_tlb()
        regs = cpu.get_regs()
        at = TEXT + 0x40 * list(self.code).index(access)
        cpu.set_regs(type(regs)(rip=at, rsi=LINEAR, rdi=0x5EED, rsp=regs.rsp))
        exit_ = cpu.run()
        if isinstance(exit_, Stage2Fault):
            assert exit_ == Stage2Fault(exit_.gpa, access)
            assert exit_.gpa & ~0xFFF == TARGET
            assert cpu.get_regs().rip == (LINEAR if access == Access.EXEC else at)
            code = cpu._raw.d[rawcontext.ERROR_CODE]
            return Outcome(present=bool(code & 1), reserved=bool(code & 8))
        assert exit_ == HltExit()
        if access != Access.WRITE:
            return Outcome(offset=cpu.get_regs().rax)
        hit = [place for place in self.places() if machine.word(place + 16) == 0x5EED]
        for place in hit:
            machine.write(place + 16, bytes(8))
        assert len(hit) == 1
        return Outcome(offset=hit[0])


def in_words(levels: Levels, access: Access) -> str:
    lines = [f"access: {access.name}"]
    for level, flags in zip((4, 3, 2, 1), levels, strict=True):
        names = [word for bit, word in BITS.items() if flags & bit]
        lines.append(f"level {level}: {' '.join(names) or 'nothing'}")
    return "\n  ".join(lines)


def compare(walker: Walker, cases: Iterable[Levels]) -> int:
    count = 0
    for levels in cases:
        # bit 13 has a meaning in leaves only
        for access in (Access.READ, Access.WRITE, Access.EXEC):
            walker.set(levels)
            expected = oracle(levels, access)
            for name, seen in (
                ("Stage2.walk", walker.by_table(access)),
                ("the engine", walker.by_engine(access)),
            ):
                if seen != expected:
                    pytest.fail(
                        f"{name} says {seen}, the manual {expected}, for\n  "
                        + in_words(levels, access)
                    )
            count += 1
    return count


@pytest.fixture
def walker() -> Iterator[Walker]:
    with Machine() as machine:
        walker = Walker(machine)
        yield walker
        walker.words.release()


def test_every_product_of_variants(walker: Walker) -> None:
    every = VARIANTS.values()
    cases = itertools.product(every, every, every, every)
    assert compare(walker, cases) == 3 * len(VARIANTS) ** 4


def test_every_subset_of_bits_at_every_level(walker: Walker) -> None:
    def cases() -> Iterator[Levels]:
        for position in range(4):
            for chosen in itertools.product((0, 1), repeat=len(BITS)):
                flags = sum(bit for bit, on in zip(BITS, chosen, strict=True) if on)
                levels = [ORDINARY] * 4
                levels[position] = flags
                yield levels[0], levels[1], levels[2], levels[3]

    assert compare(walker, cases()) == 3 * 4 * 2 ** len(BITS)


def test_the_comparison_can_fail(walker: Walker) -> None:
    """The test of the test: a table that grants a write the oracle refuses."""
    levels = (ORDINARY, ORDINARY & ~2, ORDINARY, ORDINARY)
    walker.set((ORDINARY,) * 4)
    assert oracle(levels, Access.WRITE) != walker.by_table(Access.WRITE)
    assert oracle(levels, Access.WRITE) != walker.by_engine(Access.WRITE)
    assert "level 3: present user accessed" in in_words(levels, Access.WRITE)
