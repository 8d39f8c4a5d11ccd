# SPDX-License-Identifier: GPL-2.0-or-later
"""What a device with guest_memfd is asked, in fifteen experiments; each returns what it saw.

They ask for nothing that is private: the memory is mappable and shared from birth, which is what
any Linux since 6.18 has, so that a kernel's own device can be the referee.
"""

from __future__ import annotations

import mmap
import os
import signal
import threading
from collections.abc import Callable
from typing import Final

from kvm.grids import what_a_file_may_be, what_a_slot_may_be
from kvm.hands import advise, mapping, raw_fallocate
from kvm.world import (
    PAGES,
    RAM,
    SIZE,
    Answers,
    Experiment,
    World,
    answer,
    said,
)

from kvmsim.api import Memory
from kvmsim.api.guest import MAILBOX, SHARED_VIEW
from kvmsim.uapi import PAGE_SIZE

EXPERIMENTS: Final[dict[str, Experiment]] = {
    grid.__name__: grid for grid in (what_a_file_may_be, what_a_slot_may_be)
}


def experiment(what: Experiment) -> Experiment:
    EXPERIMENTS[what.__name__] = what
    return what


# --- contents -----------------------------------------------------------------------------------


@experiment
def allocate_punch_zero(world: World) -> Answers:
    file = world.file()
    world.slot(file)
    return {
        "allocate": answer(lambda: file.allocate(0, SIZE)),
        "allocated pages": world.loads(0, PAGES - 1),
        "store": world.store(3, 0x1111),
        "load": world.load(3),
        "allocate again": answer(lambda: file.allocate(0, SIZE)),
        "load then": world.load(3),
        "punch": answer(lambda: file.discard(3 * PAGE_SIZE, PAGE_SIZE)),
        "load at last": world.load(3),
    }


@experiment
def store_punch_load(world: World) -> Answers:
    file = world.file()
    world.slot(file)
    return {
        "fill": world.fill(0, PAGES, 0x2222),
        "filled": world.loads(3, 4, 7, 8),
        "punch": answer(lambda: file.discard(4 * PAGE_SIZE, 4 * PAGE_SIZE)),
        "punched": world.loads(3, 4, 7, 8),
        "store": world.store(5, 0x3333),
        "stored": world.loads(4, 5, 6),
        "punch at the end of the file": answer(lambda: file.discard(SIZE, PAGE_SIZE)),
        "punch across it": answer(lambda: file.discard(8 * PAGE_SIZE, SIZE)),
        "gone": world.loads(8, PAGES - 1),
    }


@experiment
def punch_from_another_process(world: World) -> Answers:
    file = world.file()
    world.slot(file)
    return {
        "fill": world.fill(0, PAGES, 0x4444),
        "punch": world.punch_elsewhere(file, 2, 2),
        "punched": world.loads(1, 2, 3, 4),
    }


@experiment
def remove_is_a_punch_and_dontneed_is_not(world: World) -> Answers:
    def mapped(memory: Memory, start: int) -> Answers:
        found = {"fill": world.fill(start, PAGES, 0x5555)}
        found["MADV_DONTNEED"] = answer(lambda: advise(memory, mmap.MADV_DONTNEED, 1))
        found["kept"] = world.loads(start + 1, start + 2)
        found["MADV_REMOVE"] = answer(lambda: memory.discard(2 * PAGE_SIZE, PAGE_SIZE))
        found["removed"] = world.loads(start + 1, start + 2, start + 3)
        return {f"{kind}: {name}": value for name, value in found.items()}

    plain = world.kvm.allocate(SIZE)
    world.vm.add_slot(RAM, plain)
    kind = "plain"
    found = mapped(plain, 0)
    file = world.file()
    world.slot(file, at=PAGES)
    kind = "guest_memfd"
    memory, found["mmap"] = mapping(file)
    if memory is not None:
        found |= mapped(memory, PAGES)
    return found


@experiment
def the_host_sees_what_the_guest_stores(world: World) -> Answers:
    """In memory that both may touch: at once, either way."""
    plain = world.kvm.allocate(SIZE)
    world.vm.add_slot(RAM, plain)
    plain.write(0, b"\x66" * 8)
    found = {"plain: load": world.load(0), "plain: store": world.store(1, 0x77)}
    found["plain: read"] = plain.read(PAGE_SIZE, 8).hex()
    file = world.file()
    world.slot(file, at=PAGES)
    memory, found["mmap"] = mapping(file)
    if memory is not None:
        memory.write(0, b"\x66" * 8)
        found |= {"load": world.load(PAGES), "store": world.store(PAGES + 1, 0x77)}
        found["read"] = memory.read(PAGE_SIZE, 8).hex()
    return found


# --- life ---------------------------------------------------------------------------------------


@experiment
def closing_the_last_fd(world: World) -> Answers:
    file = world.file()
    slot = world.slot(file)
    found = {"store": world.store(1, 0x88)}
    file.close()
    world.await_release(1, "0x88")
    found["load"] = world.load(1)
    found["another page"] = world.load(2)
    found["store again"] = world.store(1, 0x99)
    found["delete"] = answer(slot.delete)
    found["load without a slot"] = world.load(1)
    return found


@experiment
def a_mapping_keeps_the_file_alive(world: World) -> Answers:
    file = world.file()
    memory, mapped = mapping(file)
    found = {"mmap": mapped}
    if memory is not None:
        world.slot(file, memory=memory)
        found["store"] = world.store(1, 0xAA)
        file.close()
        found["load after close"] = world.load(1)
        memory.close()
        found["load after munmap"] = world.load(1)
    return found


@experiment
def bytes_outlive_their_slot(world: World) -> Answers:
    file = world.file()
    slot = world.slot(file, slot=1)
    found = {"fill": world.fill(0, PAGES, 0xBB)}
    found["delete"] = answer(slot.delete)
    found["load without a slot"] = world.load(1)
    again = world.slot(file, at=PAGES, slot=1)
    found["elsewhere"] = world.loads(PAGES, PAGES + 1, 2 * PAGES - 1)
    again.delete()
    other = world.slot(file, at=0, slot=2)
    found["back in another slot"] = world.load(1)
    found["delete twice"] = answer(lambda: (other.delete(), other._set(RAM, 0)))
    return found


# --- slots --------------------------------------------------------------------------------------


@experiment
def a_slot_begins_inside_its_file(world: World) -> Answers:
    """File page = offset of the slot + distance of the gfn."""
    file = world.file()
    whole = world.slot(file)
    for page in range(PAGES):
        world.store(page, 0xC0 + page)
    whole.delete()
    world.slot(file, page=4, pages=8)
    return {
        "first and last": world.loads(0, 7),
        "past the slot": world.load(8),
        "punch": answer(lambda: file.discard(5 * PAGE_SIZE, PAGE_SIZE)),
        "punched": world.loads(0, 1, 2),
        "punch of what no slot has": answer(lambda: file.discard(0, 4 * PAGE_SIZE)),
        "untouched": world.loads(0, 7),
    }


@experiment
def neighbours_in_one_file(world: World) -> Answers:
    file = world.file()
    found = {
        "lower half": answer(lambda: world.slot(file, pages=8, slot=1)),
        "upper half": answer(lambda: world.slot(file, page=8, pages=8, at=16, slot=2)),
        "half again": answer(lambda: world.slot(file, page=8, pages=8, at=32, slot=3)),
        "across both": answer(lambda: world.slot(file, page=4, pages=8, at=32, slot=3)),
        "one page of it": answer(lambda: world.slot(file, page=7, pages=1, at=32, slot=3)),
        "same gpa": answer(lambda: world.slot(world.file(), pages=1, at=7, slot=3)),
        "store below": world.store(7, 0xD7),
        "store above": world.store(16, 0xD8),
    }
    file.discard(7 * PAGE_SIZE, PAGE_SIZE)
    found["only the lower is punched"] = world.loads(7, 16)
    file.discard(7 * PAGE_SIZE, 2 * PAGE_SIZE)
    found["a punch across both"] = world.loads(7, 16)
    return found


# --- what the host may not touch ----------------------------------------------------------------


@experiment
def the_host_cannot_touch_what_is_not_shared(world: World) -> Answers:
    """Mappable, but not shared from birth."""
    file = world.file(mappable_only=True)
    world.slot(file)
    memory, mapped = mapping(file)
    found = {"mmap": mapped, "store": world.store(0, 0xE0), "load": world.load(0)}
    if memory is not None:
        found["read"] = answer(lambda: memory.read(0, 8))
        found["write"] = answer(lambda: memory.write(PAGE_SIZE, b"x"))
        found["read of what the guest stored"] = answer(lambda: memory.read(0, 1))
        file.allocate(0, SIZE)
        found["read of allocated memory"] = answer(lambda: memory.read(2 * PAGE_SIZE, 8))
    found["still the guest's"] = world.load(0)
    return found


# --- calls --------------------------------------------------------------------------------------


@experiment
def a_signal_ends_an_allocation(world: World) -> Answers:
    """With EINTR, and what was allocated stays; a punch is not interrupted."""
    pages = (256 << 20) // PAGE_SIZE
    file = world.file(pages)
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    found = {}
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        found["allocate"] = raw_fallocate(file, 1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        found["kept"] = "some" if 0 < world.pages(file) < pages else "all or none"
        found["allocate again"] = raw_fallocate(file, 1)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        found["punch"] = raw_fallocate(file, 3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    found["left"] = str(world.pages(file))
    return found


@experiment
def pages_are_counted(world: World) -> Answers:
    file = world.file()
    world.slot(file)
    counts = [world.pages(file)]
    file.allocate(0, 8 * PAGE_SIZE)
    counts.append(world.pages(file))
    world.store(12, 1)
    counts.append(world.pages(file))
    world.store(12, 2)
    counts.append(world.pages(file))
    file.discard(0, 4 * PAGE_SIZE)
    counts.append(world.pages(file))
    world.load(0)
    counts.append(world.pages(file))
    status = os.fstat(file.fileno())
    return {
        "new, allocated, stored, again, punched, loaded": " ".join(map(str, counts)),
        "st_size": str(status.st_size),
        "st_blksize": str(status.st_blksize),
        "st_blocks": str(status.st_blocks),
    }


# --- races --------------------------------------------------------------------------------------

ROUNDS = 60


@experiment
def a_spinning_vcpu(world: World) -> Answers:
    """A guest that stores a word wherever it finds 0 and leaves when it finds another's."""
    file = world.file()
    slot = world.slot(file)
    found = {}

    def spin(until: Callable[[], object]) -> str:
        file.discard(0, PAGE_SIZE)
        world.tell(0)
        world.agent.start("race", rcx=RAM, rbx=0xF00D, rsi=SHARED_VIEW + MAILBOX)
        spinning = threading.Thread(target=world.agent.resume)
        spinning.start()
        try:
            world.told(1)
            until()
        except BaseException:
            world.agent.vcpu.cancel()
            raise
        finally:
            spinning.join()
        return said(world.agent.exit)

    def punch() -> None:
        """Each punch is seen: the guest finds 0 and stores again."""
        for number in range(ROUNDS):
            file.discard(0, PAGE_SIZE)
            world.told(number + 2)
        world.agent.vcpu.cancel()

    found["punches"] = spin(punch)
    found["delete"] = spin(slot.delete)
    world.slot(file)
    found["close"] = spin(file.close)
    return found


@experiment
def another_process(world: World) -> Answers:
    """KVM's fds serve the address space that made the VM; the file serves everyone."""
    file = world.file()
    world.slot(file)
    found = {"store": world.store(1, 0xAB)}
    found["create"] = world.elsewhere(lambda: world.file())
    found["slot"] = world.elsewhere(lambda: world.vm.set_user_memory_region(7, 0, 0, 0))
    found["registers"] = world.elsewhere(lambda: world.agent.vcpu.regs)
    found["load"] = world.load(1)
    found["punch"] = world.punch_elsewhere(file, 1, 1)
    found["punched"] = world.load(1)
    return found
