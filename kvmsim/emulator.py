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
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final

from hwemu.cpu.api import Cpu, DescriptorTable, Regs, Sregs
from hwemu.encryptedaccess import Encrypt, Met
from kvmsim import exits
from kvmsim.confidential.base import Confidential
from kvmsim.confidential.hostview import HostView, hpa_of
from kvmsim.confidential.kinds import make_guard
from kvmsim.confidential.platform import Platform
from kvmsim.holdings import held
from kvmsim.hostmem import HostMemory, SharedRam
from kvmsim.inplacememory import InPlaceMemory
from kvmsim.kind import KINDS
from kvmsim.memoryuse import Allocated
from kvmsim.region import PrivateFile, Region
from kvmsim.report import memory_report
from kvmsim.running import RunningVm
from kvmsim.uapi import KVM_MEM_GUEST_MEMFD, PAGE_SHIFT, PAGE_SIZE
from kvmsim.views.gather import vm_tables
from kvmsim.vmm.bootparams import BootFlag, RamRange, Technology
from kvmsim.vmm.bounce import Disk
from kvmsim.vmm.convert import Discard
from kvmsim.vmm.loader import LOW_SIZE
from kvmsim.vmm.machine import Machine, MachineConfig, Resume, Stop, Wait
from kvmsim.vmm.prealloc import CHUNK_PAGES, PreallocError, Progress, preallocate
from kvmsim.vmm.vmsa import EntryState
from kvmsim.vmmemory import FilePart, VmMemory
from privfs.notifier.lane import LinkError

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
    prealloc: bool = False
    """Allocate all of it before the VM is there (:mod:`kvmsim.vmm.prealloc`)."""


@dataclass(frozen=True, slots=True)
class VmConfig:
    """One virtual machine.  RAM begins above the shared low memory, file after file; that of a
    confidential guest at 0, since such a guest starts in private memory.

    ``payload`` are bytes for private memory, by gpa, that the guest starts with.
    """

    memory: tuple[MemoryBackend, ...]
    vcpus: int = 2
    label: str = "vm"
    discard: Discard = Discard.BOTH
    flags: BootFlag = BootFlag.NONE
    payload: tuple[tuple[int, bytes], ...] = ()
    technology: Technology = Technology.SHARED_BIT
    batches: bool = False
    """Guests may convert many ranges by one call (:mod:`kvmsim.rangelist`)."""
    encrypt: Encrypt | None = Encrypt.VIEW
    """Where the ciphertext of a TD's or an SNP guest's pages is, None: nowhere."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a VM ended; ``status`` is the guest's, 0 for good."""

    status: int
    message: str


@dataclass(slots=True)
class _Layout:
    ram: list[RamRange] = field(default_factory=list)
    slots: list[tuple[Region, MemoryBackend | None]] = field(default_factory=list)
    shared: int = 0  #: bytes of the shared side


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


def lay_out(backends: tuple[MemoryBackend, ...], technology: Technology) -> _Layout:
    """Place low memory and every backend one above the other; ValueError for what cannot be."""
    layout, gpa = _Layout(), 0
    if not technology.confidential:
        gpa = LOW_SIZE
        layout.ram.append(RamRange(0, LOW_SIZE, private=False))
        layout.slots.append((Region(0, 0, 0, LOW_SIZE, 0), None))
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


class Emulator:
    """One VM from configuration to outcome.

    ``on_output(bytes)`` receives console output in the runner thread; ``running`` is the class
    that runs the vCPUs; ``platform`` the confidential hardware that guests of one host share;
    ``disk`` what the bounce-buffer device moves data to and from; ``on_prealloc`` hears how far
    preallocation is.  PreallocError where that fails; then, as after every other error, the owner
    has its memory back.
    """

    def __init__(
        self,
        host: HostMemory,
        config: VmConfig,
        on_output: Callable[[bytes], None],
        *,
        running: type[RunningVm] = RunningVm,
        platform: Platform | None = None,
        disk: Disk | None = None,
        on_prealloc: Callable[[MemoryBackend, Progress], None] = lambda backend, progress: None,
    ) -> None:
        layout = lay_out(config.memory, config.technology)
        self.config = config
        kind = KINDS[config.technology.kind]
        self.outcome: Outcome | None = None
        self._on_output = on_output
        self._paths: dict[int, str] = {}
        self._launched = False
        in_place = config.technology is Technology.PKVM
        self.running = running(host, config.vcpus, config.label, kind=kind, in_place=in_place)
        self.running.batches = config.batches
        try:
            self._platform = platform or Platform(host)
            self.guard = make_guard(kind, self._platform, self.running, config.encrypt)
            if self.guard is not None:
                self.running.protect(self.guard)
            self.shared = SharedRam(host, layout.shared, config.label)
        except BaseException:
            self.running.close()
            raise
        try:
            memory = InPlaceMemory if in_place else VmMemory
            self.memory = memory(self.running, self.shared)
            for region, backend in layout.slots:
                self._add_slot(region, backend)
            for backend in config.memory:
                if backend.prealloc:
                    self._preallocate(backend, partial(on_prealloc, backend))
            machine_config = MachineConfig(
                tuple(layout.ram), config.vcpus, config.flags, config.discard,
                technology=config.technology, batches=config.batches,
            )  # fmt: skip
            self.machine = Machine(machine_config, self.memory, disk)
        except BaseException:
            self.running.close()
            self.shared.close()
            raise

    def _add_slot(self, region: Region, backend: MemoryBackend | None) -> None:
        vm = self.running
        file: PrivateFile | None = None
        if backend is not None:
            file = vm.private.open(backend.path)
            self._paths[file.id] = backend.path
        with vm.lock:
            if file is None:
                vm.vm.set_user_memory_region2(region, shared=self.shared)
            else:
                vm.vm.set_user_memory_region2(region, shared=self.shared, file=file)
                vm.private.placed(file.id)

    def _preallocate(self, backend: MemoryBackend, told: Callable[[Progress], None]) -> None:
        file = self.running.private.open(backend.path)
        start = backend.offset >> PAGE_SHIFT
        end = start + (backend.size >> PAGE_SHIFT) if backend.size else file.npages
        chunk = max(CHUNK_PAGES, os.stat(backend.path).st_blksize >> PAGE_SHIFT)
        try:
            preallocate(FilePart(self.running.private, file.id, start, end), told, chunk=chunk)
        except PreallocError as error:
            error.filename = backend.path
            raise

    # --- life ---------------------------------------------------------------------------------

    def boot(self, image: bytes) -> None:
        """Load a guest kernel and start all vCPUs."""
        if self.guard is None:
            entries = self.machine.boot(image, self.config.payload)
        else:
            entries = self._launch(image, self.guard)
        for vcpu, entry in zip(self.running.vcpus, entries, strict=True):
            set_entry(vcpu.cpu, entry)
            self.running.make_runnable(vcpu.index)
        self.running.start(self._handle)

    def _launch(self, image: bytes, guard: Confidential) -> tuple[EntryState, ...]:
        """Load a guest into private memory by its hardware's own launch flow."""
        load = self.machine.load_plan(image, self.config.payload)
        with self.running.lock:
            guard.start(self.config.vcpus)
        entries = self.machine.launch(load, lambda page: self.memory.load(page, guard))
        with self.running.lock:
            guard.finish(entries)
            self._launched = True
        return entries

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

    def host_read(self, gpa: int, size: int) -> Met:
        """What the host's own software reads of private memory at ``gpa``, within one slot.

        ValueError if none is there now. No lock may be held, here and in `host_write`.
        """
        with self.running.lock:
            return HostView(self._platform).read(hpa_of(self.running, gpa, size), size)

    def host_write(self, gpa: int, data: bytes) -> Met:
        """What comes of a store of the host's own software there."""
        view = HostView(self._platform)
        with self.running.lock:
            met, poisoned = view.store(hpa_of(self.running, gpa, len(data)), data)
        view.settle(poisoned)
        return met

    def allocated(self) -> dict[int, Allocated]:
        """What each slot holds, in pages, by its id: asks the owners, so from a thread that may
        wait, and with no lock held.  LinkError if one does not answer.
        """
        running = self.running
        return held(running.lock, running.vm.mmu, running.private, self.shared)

    def report(self) -> dict[str, Any]:
        """What it is and holds now, in plain values; from a thread as for :meth:`allocated`.

        ``error`` says why ``allocated`` is None; ``hardware`` is what the VM's confidential
        hardware says of it, None before the launch, after the end, and without such.
        """
        running, found, error = self.running, None, ""
        hardware: dict[str, Any] | None = None
        try:
            found = self.allocated()
        except LinkError as lost:
            error = lost.strerror or str(lost)
        with running.lock:
            memory = memory_report(running.vm.mmu, found, self._paths)
            counters = asdict(running.vm.statistics())
            if self.guard is not None and self._launched:
                hardware = self.guard.describe()
            vcpus = [
                {"vcpu": vcpu.index, "state": vcpu.state.value, "faults": vcpu.faults}
                for vcpu in running.vcpus
            ]
        del counters["slots"], counters["memory"]  # told already
        state = "not started"
        if running.started:
            state = "ended" if running.stopping else "running"
        return {
            "vm": self.config.label,
            "pid": os.getpid(),
            "state": state,
            "kind": running.vm.kind.name,
            "hardware": hardware,
            "fence": running.host.fence.kind.text,
            "discard": self.config.discard.value,
            "vcpus": vcpus,
            **memory,
            "counters": {
                "vm": counters,
                "runner": asdict(running.statistics),
                "vmm": asdict(self.machine.statistics),
            },
            "error": error,
        }

    def tables(self, table: str, start: int, end: int) -> dict[str, Any]:
        """What a table says of gpas [start, end); from a thread as for :meth:`allocated`.

        KvmError if it has no such table, LinkError if an owner does not answer.
        """
        return vm_tables(self.running, table, start, end)

    def stop(self, why: str) -> None:
        """End the VM from any thread."""
        self.running.stop(why)

    def close(self) -> None:
        """Stop if need be, give back all memory, leave the owners."""
        with self.running.lock:
            self._launched = False
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
                    self.running.complete(index, data)
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
