# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMM's memory on a real mount: conversion with discard, double allocation, preallocation,
payload that lies in private memory from the beginning.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mounts import Mounted, Mounter
from torture import Console

from kvmsim.emulator import Emulator, MemoryBackend, VmConfig
from kvmsim.holdings import held
from kvmsim.hostmem import HostMemory
from kvmsim.memoryuse import Allocated
from kvmsim.uapi import PAGE_SIZE, KvmError
from kvmsim.vmm.convert import Discard
from kvmsim.vmm.loader import LOW_SIZE
from kvmsim.vmm.prealloc import PreallocError, Progress

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

libc = ctypes.CDLL(None)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
MIB = 1 << 20
SIZE = 16 * MIB
PLACE = 8 * MIB
"""Where tests use memory: behind the guest kernel."""


@pytest.fixture
def ram(mount: Mounter) -> Path:
    """A private file of 16 MiB."""
    return private_file(mount())


def private_file(mounted: Mounted, size: int = SIZE) -> Path:
    path = mounted.path / "ram"
    path.touch()
    os.truncate(path, size)
    return path


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@contextlib.contextmanager
def machine(host: HostMemory, config: VmConfig) -> Iterator[tuple[Emulator, Console]]:
    """A machine that has not booted."""
    console = Console()
    emulator = Emulator(host, config, console.output)
    console.emulator = emulator
    try:
        yield emulator, console
    finally:
        emulator.close()


@contextlib.contextmanager
def booted(host: HostMemory, image: bytes, config: VmConfig) -> Iterator[tuple[Emulator, Console]]:
    with machine(host, config) as (emulator, console):
        emulator.boot(image)
        console.expect(r"^> ")
        yield emulator, console


def total(vm: Emulator) -> Allocated:
    """What the VM holds, in pages."""
    running = vm.running
    return sum(held(running.lock, running.vm.mmu, running.private, vm.shared).values(), Allocated())


def backed(vm: Emulator, gpa: int) -> tuple[bool, bool]:
    """Whether the private and the shared page of a gpa have memory."""
    gfn = gpa // PAGE_SIZE
    with vm.running.lock:
        slot = vm.running.vm.mmu.slots.find(gfn)
    assert slot is not None
    assert slot.file is not None
    page = slot.private_page(gfn)
    private = vm.running.private.runs(slot.file, page, page + 1)
    return bool(private), bool(list(vm.shared.runs(gfn, gfn + 1)))


# --- conversion --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """What is left after a conversion away from each side: bytes read after coming back."""

    private_kept: bool
    shared_kept: bool


#: Separate pools: a side keeps its bytes, and its page, until they are discarded.
MATRIX = {
    Discard.NONE: Row(private_kept=True, shared_kept=True),
    Discard.PRIVATE: Row(private_kept=False, shared_kept=True),
    Discard.SHARED: Row(private_kept=True, shared_kept=False),
    Discard.BOTH: Row(private_kept=False, shared_kept=False),
}
WAYS = ("explicit", "implicit")


def convert(console: Console, way: str, gpa: int, side: str) -> int:
    """Convert a page as the guest does, and read it."""
    if way == "explicit":
        console.command(f"convert {gpa:#x} 1 {side}")
    return peek(console, gpa, side)


def peek(console: Console, gpa: int, side: str) -> int:
    found = re.search(r"value=(0x[0-9a-f]+)", console.command(f"peek {gpa:#x} {side}"))
    assert found is not None
    return int(found[1], 16)


@pytest.mark.parametrize("discard", list(Discard))
def test_every_conversion_leaves_what_its_discard_says(
    ram: Path, host: HostMemory, image: bytes, discard: Discard
) -> None:
    row = MATRIX[discard]
    config = VmConfig((MemoryBackend(str(ram), slots=1),), 1, "vm", discard)
    with booted(host, image, config) as (vm, console):
        counted = vm.machine.statistics
        for i, (there, back) in enumerate(itertools.product(WAYS, WAYS)):
            gpa, secret, public = PLACE + i * MIB, 0x1111 + i, 0x2222 + i
            case = f"{discard}, to shared {there}, to private {back}"
            explicit, implicit = counted.conversions_explicit, counted.conversions_implicit
            console.command(f"poke {gpa:#x} {secret:#x} private")
            assert backed(vm, gpa) == (True, False), case

            assert convert(console, there, gpa, "shared") == 0, case
            assert backed(vm, gpa) == (row.private_kept, True), case
            console.command(f"poke {gpa:#x} {public:#x} shared")
            assert total(vm).both == int(row.private_kept), case

            assert convert(console, back, gpa, "private") == secret * row.private_kept, case
            assert backed(vm, gpa) == (True, row.shared_kept), case
            assert total(vm).both == int(row.shared_kept), case

            assert convert(console, there, gpa, "shared") == public * row.shared_kept, case
            assert backed(vm, gpa) == (row.private_kept, True), case
            ways = [there, back, there]
            assert counted.conversions_explicit - explicit == ways.count("explicit"), case
            assert counted.conversions_implicit - implicit == ways.count("implicit"), case
            vm.running.private.punch(*_file_pages(vm, gpa))  # for the next one's sum
            vm.memory.discard_shared(gpa, PAGE_SIZE)
        assert counted.conversions_refused == 0


def _file_pages(vm: Emulator, gpa: int) -> tuple[int, int, int]:
    with vm.running.lock:
        slot = vm.running.vm.mmu.slots.find(gpa // PAGE_SIZE)
    assert slot is not None
    assert slot.file is not None
    page = slot.private_page(gpa // PAGE_SIZE)
    return slot.file, page, page + 1


def test_redundant_conversions_change_nothing(ram: Path, host: HostMemory, image: bytes) -> None:
    config = VmConfig((MemoryBackend(str(ram)),), 1, "vm", Discard.BOTH)
    with booted(host, image, config) as (vm, console):
        console.command(f"poke {PLACE:#x} 0x77 private")
        console.command(f"convert {PLACE:#x} 1 private")
        assert peek(console, PLACE, "private") == 0x77
        assert backed(vm, PLACE) == (True, False)


# --- preallocation -----------------------------------------------------------------------------


def test_preallocation_fills_its_part_of_the_file(ram: Path, host: HostMemory) -> None:
    told: list[Progress] = []
    part = MemoryBackend(str(ram), offset=4 * MIB, size=8 * MIB, slots=3, prealloc=True)
    config = VmConfig((part,), 1, "vm")
    os.posix_fallocate(fd := os.open(ram, os.O_RDWR), 4 * MIB, PAGE_SIZE)
    os.close(fd)
    vm = Emulator(host, config, lambda output: None, on_prealloc=lambda backend, p: told.append(p))
    try:
        assert allocated(ram) == 8 * MIB
        assert (told[0], told[-1]) == (Progress(0, 2047), Progress(2047, 2047))
        assert total(vm) == Allocated(private=2048, stale=2048)  # it starts shared
    finally:
        vm.close()
    assert allocated(ram) == 8 * MIB


def test_preallocation_without_enough_memory_leaves_nothing(
    mount: Mounter, host: HostMemory
) -> None:
    mounted = mount("size=96M")
    ram = private_file(mounted, 256 * MIB)
    mounted.expected_log = "budget|memory"
    os.posix_fallocate(fd := os.open(ram, os.O_RDWR), 0, MIB)
    os.close(fd)
    config = VmConfig((MemoryBackend(str(ram), prealloc=True),), 1, "vm")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PreallocError) as caught:
        Emulator(host, config, lambda output: None)
    assert (caught.value.errno, caught.value.left) == (errno.ENOSPC, False)
    assert (caught.value.done, caught.value.total) == (16384, (255 * MIB) // PAGE_SIZE)
    assert allocated(ram) == MIB
    assert mounted.ask("status")["sessions"] == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    mounted.audit()


# --- payload -----------------------------------------------------------------------------------


def test_a_payload_is_in_private_memory_before_the_guest_runs(
    ram: Path, host: HostMemory, image: bytes
) -> None:
    data = b"".join(word.to_bytes(8, "little") * 512 for word in range(1, 601))  # 600 pages
    config = VmConfig((MemoryBackend(str(ram)),), 1, "vm", payload=((PLACE, data),))
    with booted(host, image, config) as (vm, console):
        for page in (0, 1, 511, 512, 599):
            assert peek(console, PLACE + page * PAGE_SIZE, "private") == page + 1
        assert peek(console, PLACE + 600 * PAGE_SIZE, "private") == 0
        with pytest.raises(KvmError, match="has been started"):
            vm.memory.populate(PLACE, bytes(PAGE_SIZE))
        assert peek(console, PLACE, "private") == 1


def test_population_while_others_punch_leaves_bytes_or_zeros(
    mount: Mounter, host: HostMemory
) -> None:
    """A page is filled before its punch, or after; never where its memory was."""
    mounted = mount()
    ram = private_file(mounted)
    data = b"\xa5" * (512 * PAGE_SIZE)
    config = VmConfig((MemoryBackend(str(ram)),), 1, "vm")
    fd = os.open(ram, os.O_RDWR | os.O_CLOEXEC)
    done = threading.Event()

    def punch() -> None:
        while not done.is_set():
            libc.fallocate(fd, PUNCH, PLACE - LOW_SIZE, len(data))

    with machine(host, config) as (vm, _):
        puncher = threading.Thread(target=punch)
        puncher.start()
        try:
            vm.memory.set_memory_attributes(PLACE, len(data), True)
            for _ in range(4):
                vm.memory.populate(PLACE, data)
                vm.memory.discard_private(PLACE, len(data))
            vm.memory.populate(PLACE, data)
        finally:
            done.set()
            puncher.join()
            os.close(fd)
        assert not vm.running.stopping, vm.running.stop_reason
        stage2, seen = vm.running.stage2, set()
        with vm.running.lock:
            for _, hpa, npages in stage2.mapped(PLACE, 512):
                seen |= set(vm.running.host.read(hpa, npages * PAGE_SIZE))
        assert seen <= {0, 0xA5}
        assert vm.running.statistics.shootdowns > 0
    mounted.audit()


def test_population_is_refused_where_it_cannot_be(ram: Path, host: HostMemory) -> None:
    config = VmConfig((MemoryBackend(str(ram)),), 1, "vm")
    page = bytes(PAGE_SIZE)
    with machine(host, config) as (vm, _):
        memory = vm.memory
        memory.set_memory_attributes(PLACE, 2 * PAGE_SIZE, True)
        for gpa, source, number, why in (
            (PLACE + 1, page, errno.EINVAL, "not page-aligned"),
            (PLACE, page[1:], errno.EINVAL, "not page-aligned"),
            (PLACE, b"", errno.EINVAL, "no source page"),
            (PLACE, 3 * page, errno.EINVAL, "not all of it is private"),
            (0, page, errno.EINVAL, "not all of it is private"),
            (LOW_SIZE + SIZE, page, errno.EINVAL, "not all of it is private"),
        ):
            with pytest.raises(KvmError, match=why) as caught:
                memory.populate(gpa, source)
            assert caught.value.errno == number
        with pytest.raises(KvmError, match="no launch is measured") as caught:
            memory.populate(PLACE, page, measure=True)
        assert caught.value.errno == errno.EOPNOTSUPP
        assert allocated(ram) == 0

        memory.populate(PLACE, page)
        with pytest.raises(KvmError, match="populated before") as caught:
            memory.populate(PLACE, 2 * page)
        assert caught.value.errno == errno.EEXIST
        memory.populate(PLACE + PAGE_SIZE, page)
        memory.discard_private(PLACE, PAGE_SIZE)
        memory.populate(PLACE, page)
        assert allocated(ram) == 2 * PAGE_SIZE
