# SPDX-License-Identifier: GPL-2.0-or-later
"""x86/private_mem_conversions_test: a guest makes its memory private and shared again.

After tools/testing/selftests/kvm/x86/private_mem_conversions_test.c: 2 MiB and a page for each
vCPU, ranges that begin and end at and beside the large page's borders, several vCPUs and slots.
The guest checks what it reads, the host what it can see.
"""

from __future__ import annotations

import random
import threading

import pytest
from selftests.conversions import BASE, HUGE, PER_CPU, RANGES, Conversions, all_at_once
from selftests.guest import Player, Script
from selftests.machine import KEEP, PUNCH, Background, Machine, fallocate

from kvmsim.uapi import PAGE_SIZE

ORIGINAL, INITIAL = 0xAA, 0xCC
SHAPES = {"one": (1, 1), "vcpus": (2, 1), "slots": (2, 3)}  #: vCPUs and slots


def shapes(name: str, *usual: tuple[bool, str]) -> pytest.MarkDecorator:
    """Every shape with ``name`` false and true; what is not ``usual`` is slow."""
    cases = [
        pytest.param(
            value, *SHAPES[shape], id=f"{name if value else 'not ' + name}, {shape}",
            marks=[] if (value, shape) in usual else [pytest.mark.slow],
        )
        for value in (False, True)
        for shape in SHAPES
    ]  # fmt: skip
    return pytest.mark.parametrize((name, "vcpus", "slots"), cases)


def around(script: Script, base: int, gpa: int, size: int) -> None:
    """What is left and right of a range is as it was."""
    script.check(base, gpa - base, INITIAL)
    script.check(gpa + size, base + PER_CPU - gpa - size, INITIAL)


def begin(script: Script, base: int) -> None:
    """Memory is shared at first: the guest writes, the host sees and writes, the guest sees."""
    script.fill(base, PER_CPU, ORIGINAL).check(base, PER_CPU, ORIGINAL)
    script.sync(base, PER_CPU, INITIAL << 8 | ORIGINAL).check(base, PER_CPU, INITIAL)


# --- explicit conversions -----------------------------------------------------------------------


def explicit(script: Script, base: int, offset: int, size: int, *, allocate: bool) -> None:
    """One range there and back."""
    gpa = base + offset
    script.fill(gpa, size, 0x11).map_private(gpa, size, punch_too=allocate)
    # Private bytes are the guest's; the host keeps the last shared ones.
    script.fill(gpa, size, 0x22).sync(gpa, size, 0x11).check(gpa, size, 0x22)
    around(script, base, gpa, size)
    # Odd pages back: a private range with holes.
    pages = range(1, min(size // PAGE_SIZE, 16), 2)
    for page in pages:
        at = gpa + page * PAGE_SIZE
        script.map_shared(at, PAGE_SIZE, punch_too=allocate)
        script.sync(at, PAGE_SIZE, 0x33 << 8 | 0x11).check(at, PAGE_SIZE, 0x33)
        script.check(at - PAGE_SIZE, PAGE_SIZE, 0x22)
        script.sync(at - PAGE_SIZE, PAGE_SIZE, 0x11)
    # All of it back.
    script.map_shared(gpa, size, punch_too=allocate).fill(gpa, size, 0x33)
    script.sync(gpa, size, 0x44 << 8 | 0x33).check(gpa, size, 0x44)
    around(script, base, gpa, size)
    script.fill(gpa, size, INITIAL)
    script.map_shared(base, PER_CPU, punch_too=True)  # the next range finds no private page


@shapes("allocate", (False, "one"), (True, "slots"))
def test_explicit_conversion(machine: Machine, allocate: bool, vcpus: int, slots: int) -> None:
    """By hypercall, there and back, page by page and whole; neighbours are untouched."""
    made = Conversions(machine, vcpus, slots)

    def work(number: int, player: Player) -> None:
        base = BASE + number * PER_CPU
        script = player.script()
        begin(script, base)
        for offset, size in RANGES:
            explicit(script, base, offset, size, allocate=allocate)
        assert player.play(script, made.look_and_write, made.obey) is None

    all_at_once(made, work)
    assert machine.pages(made.file) == set()


# --- punches ------------------------------------------------------------------------------------


def punched(script: Script, base: int, offset: int, size: int, *, precise: bool) -> None:
    """Private memory whose pages are punched without a conversion."""
    gpa = base + offset
    script.fill(gpa, size, 0x55).sync(gpa, size, 0x55)
    script.map_private(gpa, size).fill(gpa, size, 0x66).check(gpa, size, 0x66)
    where = (gpa, size) if precise else (base, PER_CPU)
    script.sync(*where, PUNCHED)
    script.check(gpa, size, 0).sync(gpa, size, 0x55)
    around(script, base, gpa, size)
    script.map_shared(gpa, size, punch_too=True).check(gpa, size, 0x55).fill(gpa, size, INITIAL)


PUNCHED = 1 << 32


@shapes("precise", (False, "one"), (True, "slots"))
def test_punch_hole(machine: Machine, precise: bool, vcpus: int, slots: int) -> None:
    """A hole punched in private memory is zeros to the guest; what is shared does not notice."""
    made = Conversions(machine, vcpus, slots)

    def on_sync(gpa: int, size: int, what: int) -> None:
        if what == PUNCHED:
            made.file.discard(gpa - BASE, size)
        else:
            made.look_and_write(gpa, size, what)

    def work(number: int, player: Player) -> None:
        base = BASE + number * PER_CPU
        script = player.script()
        begin(script, base)
        for offset, size in RANGES:
            punched(script, base, offset, size, precise=precise)
        assert player.play(script, on_sync, made.obey) is None

    all_at_once(made, work)
    assert machine.pages(made.file) == set()


def test_punch_hole_reads_zero(machine: Machine) -> None:
    """The property alone, for any guest_memfd that a guest can use: what is punched is zero."""
    flags = 0 if machine.simulated else 3
    machine.need_guest_memfd(flags)
    vm = machine.vm(private=machine.simulated)
    (player,) = machine.players(vm)
    file = vm.create_guest_memfd(PER_CPU, flags)
    vm.add_slot(BASE, guest_memfd=file)
    if machine.simulated:
        vm.convert(BASE, PER_CPU, private=True)
    for offset, size in RANGES:
        fill = player.script().fill(BASE, PER_CPU, 0x77).check(BASE, PER_CPU, 0x77)
        assert player.play(fill) is None
        file.discard(offset, size)
        script = player.script().check(BASE, offset, 0x77).check(BASE + offset, size, 0)
        script.check(BASE + offset + size, PER_CPU - offset - size, 0x77)
        assert player.play(script) is None


def test_memfd_outlives_vm(machine: Machine) -> None:
    """Allocation and punch work on a file whose VM is gone."""
    machine.need_guest_memfd()
    vm = machine.vm()
    (player,) = machine.players(vm)
    file = vm.create_guest_memfd(PER_CPU)
    vm.add_slot(BASE, guest_memfd=file)
    vm.close()
    assert player.vcpu.handle < 0
    assert fallocate(file.fileno(), KEEP, 0, PER_CPU) == "0"
    assert fallocate(file.fileno(), PUNCH, 0, PER_CPU) == "0"


# --- many rounds --------------------------------------------------------------------------------

VICTIM = 16 * PAGE_SIZE


def rounds(made: Conversions, number: int, player: Player, count: int) -> int:
    """``count`` ranges of one vCPU there and back; how many conversions that were."""
    chance = random.Random(number)
    base = BASE + number * PER_CPU
    victim = BASE + len(made.players) * PER_CPU + number * VICTIM
    conversions = 0

    def obey(gpa: int, size: int, flags: int) -> None:
        nonlocal conversions
        made.obey(gpa, size, flags)
        conversions += 1
        assert made.doubled(gpa - BASE, size) == 0, "memory is held twice"

    assert player.play(player.script().map_private(victim, VICTIM), None, obey) is None
    for turn in range(count):
        offset, size = chance.choice(RANGES)
        allocate = size >= HUGE or bool(chance.getrandbits(1))
        gpa, mine = base + offset, number << 32 | turn << 8
        script = player.script()
        script.mark(gpa, size, mine | 1).marked(gpa, size, mine | 1)
        script.map_private(gpa, size, punch_too=allocate)
        script.marked(gpa, size, 0).mark(gpa, size, mine | 2)
        script.mark(victim, VICTIM, mine | 3).either(victim, VICTIM, mine | 3)
        script.sync(gpa, size).marked(gpa, size, mine | 2)
        if size > PAGE_SIZE:
            hole = gpa + chance.randrange(size // PAGE_SIZE) * PAGE_SIZE
            script.map_shared(hole, PAGE_SIZE).marked(hole, PAGE_SIZE, 0)
            script.mark(hole, PAGE_SIZE, mine | 4)
            script.marked(gpa, hole - gpa, mine | 2)
            script.marked(hole + PAGE_SIZE, gpa + size - hole - PAGE_SIZE, mine | 2)
            script.map_private(hole, PAGE_SIZE).marked(hole, PAGE_SIZE, 0)
        script.either(victim, VICTIM, mine | 3)
        script.map_shared(gpa, size).marked(gpa, size, 0)
        assert player.play(script, lambda gpa, size, _: made.look(gpa, size, 0), obey) is None
    return conversions


def punches(made: Conversions, over: threading.Event) -> int:
    """Punch what nobody counts on: victims, and private pages behind shared gfns, until told."""
    chance = random.Random(1)
    behind = len(made.players) * PER_CPU
    count = 0
    while not over.is_set():
        offset = behind + chance.randrange(len(made.players) * VICTIM // PAGE_SIZE) * PAGE_SIZE
        made.file.discard(offset, min(3 * PAGE_SIZE, made.size - offset))
        count += 1
    return count


@pytest.mark.parametrize(
    "count", [4, pytest.param(250, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_many_rounds(machine: Machine, count: int) -> None:
    """Four vCPUs, four slots, and somebody who punches: no wrong byte, and none held twice."""
    made = Conversions(machine, 4, 4, room=4 * VICTIM, discard=True)
    over = threading.Event()
    puncher = Background(lambda: punches(made, over))
    done: list[int] = []
    try:
        all_at_once(made, lambda number, player: done.append(rounds(made, number, player, count)))
    finally:
        over.set()
        assert puncher.end() > 0
    assert sum(done) >= 2 * 4 * count
    assert machine.pages(made.file) <= set(range(4 * PER_CPU // PAGE_SIZE, made.size // PAGE_SIZE))
    assert made.doubled(0, made.size) == 0
