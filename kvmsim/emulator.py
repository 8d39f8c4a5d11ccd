# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole virtual machine in this process: memory, vCPUs, and the VMM's role around them.

:class:`Emulator` assembles a :class:`~kvmsim.running.RunningVm`, its slots and the
:class:`~kvmsim.vmm.machine.Machine` that answers its exits.  An emulator process may hold many.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from hwemu.cpu.api import Cpu, DescriptorTable, Regs, Sregs
from kvmsim import exits
from kvmsim.hostmem import HostMemory, SharedRam
from kvmsim.region import PrivateFile, Region
from kvmsim.running import RunningVm
from kvmsim.uapi import ABIS, KVM_MEM_GUEST_MEMFD, PAGE_SHIFT, PAGE_SIZE
from kvmsim.vmm.bootparams import BootFlag, RamRange
from kvmsim.vmm.convert import Discard
from kvmsim.vmm.loader import LOW_SIZE, EntryState
from kvmsim.vmm.machine import Machine, MachineConfig, Resume, Stop, Wait

log = logging.getLogger(__name__)

_PR_SET_DUMPABLE: Final = 4
_SWITCH_INTERVAL: Final = 0.0002


@dataclass(frozen=True, slots=True)
class MemoryBackend:
    """A private file, or part of it, as guest RAM; bytes.  ``size`` 0 means to its end.

    ``slots`` is how many memslots it is cut into.
    """

    path: str
    offset: int = 0
    size: int = 0
    slots: int = 2


@dataclass(frozen=True, slots=True)
class VmConfig:
    """One virtual machine.  RAM begins above the shared low memory, file after file."""

    memory: tuple[MemoryBackend, ...]
    vcpus: int = 2
    label: str = "vm"
    discard: Discard = Discard.BOTH
    flags: BootFlag = BootFlag.NONE


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a VM ended; ``status`` is the guest's, 0 for good."""

    status: int
    message: str


@dataclass(slots=True)
class _Layout:
    ram: list[RamRange] = field(default_factory=list)
    slots: list[tuple[Region, MemoryBackend | None]] = field(default_factory=list)
    shared: int = 0


def prepare_process() -> None:
    """Make this process fit to run vCPUs: prompt shootdowns, memory hidden from debuggers.

    And let it have what it may: an extent is a descriptor, and secret memory is locked memory.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL)
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (hard, hard))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("prctl(PR_SET_DUMPABLE): %s", os.strerror(ctypes.get_errno()))


def lay_out(backends: tuple[MemoryBackend, ...]) -> _Layout:
    """Place low memory and every backend one above the other; ValueError for what cannot be."""
    layout = _Layout([RamRange(0, LOW_SIZE, private=False)], [], LOW_SIZE)
    layout.slots.append((Region(0, 0, 0, LOW_SIZE, 0), None))
    gpa = LOW_SIZE
    for backend in backends:
        status = os.stat(backend.path)
        unit = max(PAGE_SIZE, status.st_blksize)  # the mount may be backed by huge pages
        size = backend.size or status.st_size - backend.offset
        if size <= 0 or size % unit or backend.offset % unit:
            raise ValueError(
                f"{backend.path}: offset {backend.offset} and size {size} must be multiples of "
                f"{unit}, size not 0: truncate the file to its size first"
            )
        if backend.slots < 1 or size // unit < backend.slots:
            raise ValueError(
                f"{backend.path}: {size} bytes cannot be cut into {backend.slots} slots of whole "
                f"pages of {unit} bytes: use fewer slots"
            )
        layout.ram.append(RamRange(gpa, size))
        cut = size // backend.slots // unit * unit
        for i in range(backend.slots):
            length = cut if i < backend.slots - 1 else size - cut * i
            layout.slots.append((
                Region(
                    len(layout.slots), KVM_MEM_GUEST_MEMFD, gpa + i * cut, length,
                    gpa + i * cut, backend.offset + i * cut,
                ),
                backend,
            ))  # fmt: skip
        gpa += size
    layout.shared = gpa
    return layout


class VmMemory:
    """What the VMM does to its VM's memory (the ``GuestMemory`` of :mod:`kvmsim.vmm.convert`).

    Every method belongs to the runner thread, or to a VM that does not run: no vCPU is in guest
    code then, and a flush before the next entry is all that a zap needs.
    """

    def __init__(self, vm: RunningVm, shared: SharedRam) -> None:
        self._vm = vm
        self._shared = shared

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> bool:
        """KVM_SET_MEMORY_ATTRIBUTES; True if anything changed."""
        vm = self._vm.vm
        value = ABIS[vm.abi].attribute_private if private else 0
        with self._vm.lock:
            zapped = vm.set_memory_attributes(gpa, size, value)
        if zapped.ranges:
            self._vm.flush_zapped(zapped)
        return bool(zapped.ranges)

    def discard_shared(self, gpa: int, size: int) -> None:
        """Zap and free the shared side of a range."""
        start, end = gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT
        with self._vm.lock:
            zapped = self._vm.vm.invalidate_shared(self._shared, start, end)
        self._vm.flush_zapped(zapped)
        self._shared.discard(gpa, size)

    def discard_private(self, gpa: int, size: int) -> None:
        """Punch the private side of a range through its owners."""
        start, end = gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT
        with self._vm.lock:
            parts = [
                (slot.file, slot.private_page(first), slot.private_page(last))
                for slot, first, last in self._vm.vm.mmu.slots.find_range(start, end)
                if slot.file is not None
            ]
        for file, first, last in parts:
            self._vm.private.punch(file, first, last)

    def read_shared(self, gpa: int, length: int) -> bytes:
        """Read the shared side as a device does."""
        return self._shared.read(gpa, length)

    def write_shared(self, gpa: int, data: bytes) -> None:
        """Write the shared side as a device does."""
        self._shared.write(gpa, data)


class Emulator:
    """One VM from configuration to outcome.

    ``on_output(bytes)`` receives console output in the runner thread; ``running`` is the class
    that runs the vCPUs.
    """

    def __init__(
        self,
        host: HostMemory,
        config: VmConfig,
        on_output: Callable[[bytes], None],
        *,
        running: type[RunningVm] = RunningVm,
    ) -> None:
        layout = lay_out(config.memory)
        self.config = config
        self.outcome: Outcome | None = None
        self._on_output = on_output
        self.running = running(host, config.vcpus, config.label)
        try:
            self.shared = SharedRam(host, layout.shared, config.label)
            self.memory = VmMemory(self.running, self.shared)
            for region, backend in layout.slots:
                self._add_slot(region, backend)
            machine_config = MachineConfig(
                tuple(layout.ram), config.vcpus, config.flags, config.discard
            )
            self.machine = Machine(machine_config, self.memory)
        except BaseException:
            self.running.close()
            raise

    def _add_slot(self, region: Region, backend: MemoryBackend | None) -> None:
        vm = self.running
        file: PrivateFile | None = None
        if backend is not None:
            file = vm.private.open(backend.path)
        with vm.lock:
            if file is None:
                vm.vm.set_user_memory_region2(region, shared=self.shared)
            else:
                vm.vm.set_user_memory_region2(region, shared=self.shared, file=file)
                vm.private.placed(file.id)

    # --- life ---------------------------------------------------------------------------------

    def boot(self, image: bytes) -> None:
        """Load a guest kernel and start all vCPUs."""
        for vcpu, entry in zip(self.running.vcpus, self.machine.boot(image), strict=True):
            set_entry(vcpu.cpu, entry)
            self.running.make_runnable(vcpu.index)
        self.running.start(self._handle)

    def feed(self, data: bytes) -> None:
        """Give the console input, from any thread."""

        def give() -> None:
            for index in self.machine.feed(data):
                self.running.make_runnable(index)

        self.running.post(give)

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait for the end; None after ``timeout`` seconds."""
        if not self.running.wait(timeout):
            return None
        if self.outcome is None:
            self.outcome = Outcome(1, self.running.stop_reason)
        return self.outcome

    def inject_memory_error(self, gpa: int) -> None:
        """Let the memory of the private page at ``gpa`` fail, from any thread.

        Every later access is KVM_EXIT_MEMORY_FAULT with EHWPOISON until the page is punched.
        ValueError where no private file is.
        """
        vm, gfn = self.running, gpa >> PAGE_SHIFT
        with vm.lock:
            slot = vm.vm.mmu.slots.find(gfn)
            if slot is None or slot.file is None:
                raise ValueError(f"poison of gpa {gpa:#x}: no private memory is there")
            zapped = vm.vm.inject_memory_error(slot.file, slot.private_page(gfn))
        vm.flush_zapped(zapped)

    def stop(self, why: str) -> None:
        """End the VM from any thread."""
        self.running.stop(why)

    def close(self) -> None:
        """Stop if need be, give back all memory, leave the owners."""
        self.running.close()
        self.shared.close()

    # --- exits --------------------------------------------------------------------------------

    def _handle(self, index: int, left: exits.Exit) -> bool:
        action = self.machine.handle_exit(index, left)
        output = self.machine.take_output()
        if output:
            self._on_output(output)
        match action:
            case Resume(data, wake):
                if data is not None:
                    self.running.vcpus[index].cpu.complete(data)
                for other in wake:
                    self.running.make_runnable(other)
            case Wait():
                self.running.halt(index)
            case Stop(_, status, message):
                self.outcome = Outcome(status, message)
                return False
        return True


def set_entry(cpu: Cpu, entry: EntryState) -> None:
    """Set a vCPU's registers to the boot protocol's entry state."""
    cpu.set_regs(
        Regs(rip=entry.rip, rsp=entry.rsp, rdi=entry.rdi, rsi=entry.rsi, rflags=entry.rflags)
    )
    cpu.set_sregs(Sregs.long_mode(entry.cr3, gdt=DescriptorTable(entry.gdt_base, entry.gdt_limit)))
