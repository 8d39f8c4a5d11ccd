# SPDX-License-Identifier: GPL-2.0-or-later
"""The bounce-buffer device: what a good ring does, and that a bad one touches nothing."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvmsim.diskfile import FileDisk
from kvmsim.exits import HypercallExit, IoExit
from kvmsim.vmm import bounce
from kvmsim.vmm.bootparams import RamRange
from kvmsim.vmm.bounce import BounceDevice, Operation, Status
from kvmsim.vmm.machine import Machine, MachineConfig, Resume

PAGE = 4096
RING, BUFFER, PRIVATE, END = 0x1000, 0x2000, 0x8000, 0x10000


@dataclass
class Memory:
    """64 KiB of RAM at 0, private from 0x8000 on."""

    data: bytearray = field(default_factory=lambda: bytearray(END))
    fail: int = 0

    def is_shared(self, gpa: int, size: int) -> bool:
        return size > 0 and gpa + size <= PRIVATE

    def read_shared(self, gpa: int, length: int) -> bytes:
        return bytes(self.data[gpa : gpa + length])

    def write_shared(self, gpa: int, data: bytes) -> None:
        self.data[gpa : gpa + len(data)] = data


@dataclass
class MemoryDisk:
    data: bytearray = field(default_factory=lambda: bytearray(b"\xdd" * 64 * bounce.SECTOR))
    fail: bool = False

    @property
    def sectors(self) -> int:
        return len(self.data) // bounce.SECTOR

    def read(self, sector: int, count: int) -> bytes:
        if self.fail:
            raise OSError(errno.EIO, "bad sector")
        return bytes(self.data[sector * bounce.SECTOR : (sector + count) * bounce.SECTOR])

    def write(self, sector: int, data: bytes) -> None:
        if self.fail:
            raise OSError(errno.EIO, "bad sector")
        self.data[sector * bounce.SECTOR : sector * bounce.SECTOR + len(data)] = data


def put_ring(
    memory: Memory,
    *requests: tuple[int, int, int, int],
    available: int | None = None,
    used: int = 0,
    magic: int = bounce.MAGIC,
    entries: int = bounce.ENTRIES,
    gpa: int = RING,
) -> None:
    """Offer (gpa, sector, length, operation) from index ``used`` on."""
    offered = (used + len(requests)) % 65536 if available is None else available
    bounce.HEADER.pack_into(memory.data, gpa, magic, entries, offered, used, 0)
    for index, request in enumerate(requests, used):
        at = gpa + bounce.DESCRIPTORS_OFFSET + index % bounce.ENTRIES * bounce.DESCRIPTOR.size
        bounce.DESCRIPTOR.pack_into(memory.data, at, *request, bounce.PENDING, 0)


def statuses(memory: Memory, count: int, first: int = 0) -> list[int]:
    found = []
    for index in range(first, first + count):
        at = RING + bounce.DESCRIPTORS_OFFSET + index % bounce.ENTRIES * bounce.DESCRIPTOR.size
        found.append(bounce.DESCRIPTOR.unpack_from(memory.data, at)[4])
    return found


def used(memory: Memory) -> int:
    return int(bounce.HEADER.unpack_from(memory.data, RING)[3])


def device() -> tuple[BounceDevice, Memory, MemoryDisk]:
    memory, disk = Memory(), MemoryDisk()
    return BounceDevice(disk, memory), memory, disk


@pytest.mark.parametrize("first", [0, 60, 65534])
def test_pages_go_out_and_come_back(first: int) -> None:
    made, memory, disk = device()
    memory.data[BUFFER : BUFFER + PAGE] = bytes(range(256)) * 16
    requests = [
        (BUFFER, 8, PAGE, Operation.WRITE),
        (BUFFER + PAGE, 8, PAGE, Operation.READ),
        (BUFFER + 2 * PAGE, 0, bounce.SECTOR, Operation.READ),
        *[(BUFFER + 3 * PAGE, 1, bounce.SECTOR, Operation.READ)] * 3,
    ]
    put_ring(memory, *requests, used=first)
    assert made.ring(RING // PAGE) is Status.OK
    assert statuses(memory, 6, first) == [Status.OK] * 6
    assert used(memory) == (first + 6) % 65536
    assert memory.data[BUFFER + PAGE : BUFFER + 2 * PAGE] == bytes(range(256)) * 16
    assert memory.data[BUFFER + 2 * PAGE :][: bounce.SECTOR] == b"\xdd" * bounce.SECTOR
    assert disk.data[8 * bounce.SECTOR :][:PAGE] == bytes(range(256)) * 16
    assert made.statistics.written_bytes == PAGE
    assert made.statistics.read_bytes == PAGE + 4 * bounce.SECTOR


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ((BUFFER, 0, PAGE, 2), Status.UNSUPPORTED),
        ((BUFFER, 0, PAGE, 0xFFFF), Status.UNSUPPORTED),
        ((BUFFER, 0, 0, Operation.READ), Status.BAD_LENGTH),
        ((BUFFER, 0, 511, Operation.READ), Status.BAD_LENGTH),
        ((BUFFER, 0, 0xFFFF_FFFF, Operation.READ), Status.BAD_LENGTH),
        ((BUFFER, 0, 0xFFFF_FE00, Operation.READ), Status.BAD_ADDRESS),
        ((PRIVATE, 0, PAGE, Operation.READ), Status.BAD_ADDRESS),
        ((PRIVATE, 0, PAGE, Operation.WRITE), Status.BAD_ADDRESS),
        ((PRIVATE - 512, 0, 1024, Operation.READ), Status.BAD_ADDRESS),
        ((END, 0, PAGE, Operation.READ), Status.BAD_ADDRESS),
        (((1 << 64) - 512, 0, PAGE, Operation.READ), Status.BAD_ADDRESS),
        ((1 << 39 | BUFFER, 0, PAGE, Operation.READ), Status.BAD_ADDRESS),
        ((BUFFER, 57, PAGE, Operation.READ), Status.BAD_SECTOR),
        ((BUFFER, 64, 512, Operation.WRITE), Status.BAD_SECTOR),
        ((BUFFER, (1 << 64) - 1, PAGE, Operation.WRITE), Status.BAD_SECTOR),
    ],
)
def test_bad_descriptors_get_an_error_and_touch_nothing(
    request_: tuple[int, int, int, int], status: Status
) -> None:
    made, memory, disk = device()
    put_ring(memory, request_, (BUFFER, 0, 512, Operation.READ))
    before, stored = bytes(memory.data[PRIVATE:]), bytes(disk.data)
    assert made.ring(RING // PAGE) is Status.OK
    assert statuses(memory, 2) == [status, Status.OK], "the next one is served"
    assert used(memory) == 2
    assert memory.data[BUFFER + 512 : PRIVATE] == bytes(PRIVATE - BUFFER - 512)
    assert memory.data[PRIVATE:] == before
    assert disk.data == stored
    assert made.statistics.answers[status] == 1


@pytest.mark.parametrize(
    ("ring", "change"),
    [
        (RING, {"magic": 0}),
        (RING, {"entries": 0}),
        (RING, {"entries": 65}),
        (RING, {"available": 65}),
        (RING, {"available": 65535}),
        (RING, {"available": 3, "used": 4}),
        (PRIVATE, {}),
    ],
)
def test_bad_rings_are_refused_and_not_touched(ring: int, change: dict[str, int]) -> None:
    made, memory, disk = device()
    put_ring(memory, (BUFFER, 0, PAGE, Operation.READ), gpa=ring, **change)
    before, stored = bytes(memory.data), bytes(disk.data)
    assert made.ring(ring // PAGE) is Status.BAD_RING
    assert made.result is Status.BAD_RING
    assert (memory.data, disk.data) == (before, stored)
    assert made.statistics.bad_rings == 1


@pytest.mark.parametrize("gfn", [0xFFFF_FFFF, 1 << 27, END // PAGE])
def test_rings_outside_ram_are_refused(gfn: int) -> None:
    made, _, _ = device()
    assert made.ring(gfn) is Status.BAD_RING


def test_a_disk_that_fails_is_an_io_error() -> None:
    made, memory, disk = device()
    disk.fail = True
    put_ring(memory, (BUFFER, 0, PAGE, Operation.READ), (BUFFER, 0, PAGE, Operation.WRITE))
    assert made.ring(RING // PAGE) is Status.OK
    assert statuses(memory, 2) == [Status.IOERR] * 2
    assert memory.data[BUFFER:] == bytes(END - BUFFER)


# --- behind its port ---------------------------------------------------------------------------


class VmMemory(Memory):
    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> bool:
        return True

    def discard_shared(self, gpa: int, size: int) -> None:
        pass

    def discard_private(self, gpa: int, size: int) -> None:
        pass

    def populate(self, gpa: int, source: bytes) -> None:
        raise AssertionError("no payload here")


def test_the_machine_knows_what_is_shared_and_rings() -> None:
    memory, disk = VmMemory(bytearray(8 << 20)), MemoryDisk()
    m = Machine(MachineConfig((RamRange(0, 8 << 20),)), memory, disk)
    port = m.config.bounce_port
    put_ring(memory, (0x400000, 0, PAGE, Operation.READ))
    bell = IoExit(port, 4, True, (RING // PAGE).to_bytes(4, "little"))
    assert m.handle_exit(0, HypercallExit(12, (0x400000, 1, 1 << 4, 0))) == Resume(0)
    assert not m.is_shared(0x400000, 1)
    assert not m.is_shared(0x3FF000, PAGE + 1)
    assert m.handle_exit(0, bell) == Resume()
    assert m.handle_exit(0, IoExit(port + 4, 4, False)) == Resume(bytes(4))
    assert statuses(memory, 1) == [Status.BAD_ADDRESS]
    assert m.handle_exit(0, HypercallExit(12, (0x400000, 1, 0, 0))) == Resume(0)
    assert m.is_shared(0x3FF000, 3 * PAGE)
    put_ring(memory, (0x400000, 0, PAGE, Operation.READ))
    m.handle_exit(0, bell)
    assert statuses(memory, 1) == [Status.OK]
    assert memory.data[0x400000 : 0x400000 + PAGE] == b"\xdd" * PAGE
    put_ring(memory, magic=1)
    m.handle_exit(0, bell)
    assert m.handle_exit(0, IoExit(port + 4, 4, False)) == Resume(b"\3\0\0\0")
    assert not m.is_shared(0, 0)
    assert not m.is_shared(8 << 20, PAGE)


def test_without_a_disk_there_is_no_device() -> None:
    m = Machine(MachineConfig((RamRange(0, 8 << 20),)), VmMemory(bytearray(8 << 20)))
    assert m.handle_exit(0, IoExit(m.config.bounce_port + 4, 4, False)) == Resume(b"\xff" * 4)


# --- a file as the disk ------------------------------------------------------------------------


def test_a_file_is_a_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(5 * bounce.SECTOR + 100))
    with FileDisk(path) as disk:
        assert disk.sectors == 5
        disk.write(3, b"\x11" * 1024)
        assert disk.read(2, 3) == bytes(512) + b"\x11" * 1024
        os.truncate(path, 512)
        with pytest.raises(OSError, match="the file ends inside"):
            disk.read(1, 1)
    assert path.stat().st_size == 512


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        FileDisk(tmp_path / "fifo")
    with pytest.raises(FileNotFoundError):
        FileDisk(tmp_path / "none")
