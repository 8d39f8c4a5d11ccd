# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMM's answers to a guest's exits, without I/O: devices, hypercalls, conversions.

The machine runs no vCPU and reads no terminal. Whoever does hands it each exit and does what the
action says. All methods belong to one thread at a time.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from kvmsim.attributes import Attributes
from kvmsim.exits import (
    BadHvaExit,
    Exit,
    HltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoExit,
    MemoryFaultExit,
    MmioExit,
    ShutdownExit,
    SystemEventExit,
)
from kvmsim.rangelist import MapGpaRange, list_size, unpack
from kvmsim.uapi import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVMSIM_HC_MAP_GPA_RANGES,
    PAGE_SHIFT,
)
from kvmsim.vmm.bootparams import PAGE_SIZE, BootFlag, BootParams, RamRange, Technology
from kvmsim.vmm.bounce import DOORBELL, RESULT, BounceDevice, Disk
from kvmsim.vmm.convert import (
    Converted,
    Discard,
    GuestMemory,
    Refused,
    convert_list,
    convert_memory,
)
from kvmsim.vmm.elf import parse_elf
from kvmsim.vmm.fatal import gave_up
from kvmsim.vmm.launch import LaunchPage
from kvmsim.vmm.loader import LoadPlan, boot_params, plan
from kvmsim.vmm.serial import REGISTERS, Serial16550
from kvmsim.vmm.vmsa import EntryState

KVM_HC_KICK_CPU: Final = 5  # include/uapi/linux/kvm_para.h
KVM_ENOSYS: Final = 1000
_MAP_GPA_RANGE_PAGE_SIZE: Final = 0xF
_U64: Final = (1 << 64) - 1

FAULT_REPEATS: Final = 16
"""A vCPU that faults this often in a row where there is nothing to convert makes no progress."""


class StopReason(Enum):
    """Why a machine ended."""

    GUEST_EXIT = "the guest wrote its exit port"
    GUEST_FATAL = "the guest gave up"
    SHUTDOWN = "triple fault"
    ALL_HALTED = "every vCPU is halted and nothing can wake one"
    MEMORY = "a memory access that cannot be resolved"
    ENGINE = "the vCPU cannot go on"


@dataclass(frozen=True, slots=True)
class Resume:
    """Run the vCPU again; ``data`` answers the exit (bytes read, or a hypercall's result).

    ``wake``: vCPUs that waited and are runnable now.
    """

    data: bytes | int | None = None
    wake: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """The vCPU is halted: run it again once a `wake` names it."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The machine has ended; ``status`` is the guest's (0 good), or 1 if it had no say."""

    reason: StopReason
    status: int
    message: str


Action = Resume | Wait | Stop


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """A machine. The first RAM range starts at 0 and holds low memory.

    ``batches``: guests may convert many ranges by one call (:mod:`kvmsim.rangelist`).
    """

    ram: tuple[RamRange, ...]
    vcpus: int = 1
    flags: BootFlag = BootFlag.NONE
    discard: Discard = Discard.BOTH
    console_port: int = 0x3F8
    exit_port: int = 0xF4
    bounce_port: int = 0x520
    technology: Technology = Technology.SHARED_BIT
    batches: bool = False

    def boot_params(self) -> BootParams:
        """The boot-parameter page for this machine; ValueError if it cannot be one."""
        return replace(
            boot_params(self.technology, self.ram, self.vcpus, self.flags),
            console_port=self.console_port,
            exit_port=self.exit_port,
            bounce_port=self.bounce_port,
        )


@dataclass(slots=True)
class MachineStatistics:
    """What the guest asked of its VMM so far."""

    exits: int = 0
    hypercalls: int = 0
    unknown_hypercalls: int = 0
    batches: int = 0
    conversions_explicit: int = 0
    conversions_implicit: int = 0
    conversions_refused: int = 0
    discarded_bytes: int = 0
    unknown_port_accesses: int = 0
    mmio_accesses: int = 0
    halts: int = 0
    kicks: int = 0


@dataclass(slots=True)
class _Vcpu:
    halted: bool = False
    kicked: bool = False  # KVM: pv_unhalted
    repeated: int = 0
    last_fault: tuple[int, bool] | None = None


@dataclass(slots=True)
class Machine:
    """Devices and policy of one VM over the memory that ``memory`` reaches.

    ``disk``: what the bounce-buffer device moves to and from; without it there is no such device.
    """

    config: MachineConfig
    memory: GuestMemory
    disk: Disk | None = None
    statistics: MachineStatistics = field(default_factory=MachineStatistics)
    serial: Serial16550 = field(default_factory=Serial16550)
    _output: bytearray = field(default_factory=bytearray)
    _vcpus: list[_Vcpu] = field(default_factory=list)
    _types: Attributes = field(default_factory=Attributes)  # 1: private
    bounce: BounceDevice | None = None

    def __post_init__(self) -> None:
        self.config.boot_params()  # refuse an impossible machine now
        self._vcpus = [_Vcpu() for _ in range(self.config.vcpus)]
        if self.disk is not None:
            self.bounce = BounceDevice(self.disk, self)

    # --- from outside --------------------------------------------------------------------

    def boot(
        self, image: bytes, payload: Sequence[tuple[int, bytes]] = ()
    ) -> tuple[EntryState, ...]:
        """Load a guest (an ELF file) that starts in shared memory; how each vCPU starts.

        ``payload`` (gpa, bytes) goes into private memory.  ImageError for what does not fit;
        KvmError or OSError from the memory.
        """
        load = self.load_plan(image, payload)
        if load.pages:
            raise ValueError(
                f"boot: a {self.config.technology.kind} guest starts in private memory: launch it"
            )
        for gpa, data in load.writes:
            self.memory.write_shared(gpa, data)
        for gpa, data in load.payload:
            self._set_type(gpa, len(data), private=True)
            self.memory.populate(gpa, data)
        return load.entries

    def load_plan(self, image: bytes, payload: Sequence[tuple[int, bytes]] = ()) -> LoadPlan:
        """What :meth:`boot` writes, or :meth:`launch` adds; ImageError for what does not fit."""
        return plan(parse_elf(image), self.config.boot_params(), payload)

    def launch(
        self, load: LoadPlan, add: Callable[[LaunchPage], None] | None = None
    ) -> tuple[EntryState, ...]:
        """Load a confidential guest: all private-capable RAM becomes private, pages are added.

        ``add`` loads one page, in the order of the plan, and may raise what it likes; without it
        they are populated, which is all that there is to it where nothing is measured (pKVM).
        """
        for r in self.config.ram:
            if r.private:
                self._set_type(r.gpa, r.size, private=True)
        for page in load.pages:
            if add is not None:
                add(page)
            else:
                self.memory.populate(page.gpa, page.data)
        return load.entries

    def _set_type(self, gpa: int, size: int, *, private: bool) -> None:
        self.memory.set_memory_attributes(gpa, size, private)
        self._types.set(gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT, int(private))

    def feed(self, data: bytes) -> tuple[int, ...]:
        """Console input; the vCPUs that it wakes (the line goes to the boot vCPU)."""
        self.serial.feed(data)
        return self._wake(0) if self.serial.interrupt else ()

    def take_output(self) -> bytes:
        """Console output since the last call."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def is_halted(self, vcpu: int) -> bool:
        """Whether a vCPU's last answer was :class:`Wait` and nothing has woken it since."""
        return self._vcpus[vcpu].halted

    def handle_exit(self, vcpu: int, exit: Exit) -> Action:
        """What to do about an exit of a vCPU."""
        self.statistics.exits += 1
        if not isinstance(exit, (MemoryFaultExit, InterruptedExit)):
            self._vcpus[vcpu].last_fault = None
        match exit:
            case IoExit():
                return self._port(exit)
            case HypercallExit(nr, args, ranges):
                self.statistics.hypercalls += 1
                if ranges:  # a confidential guest's own list (SNP's PSC, TDX's MapGPA)
                    return Resume(self._map_gpa_ranges(ranges) & _U64)
                return self._hypercall(nr, args)
            case HltExit():
                return self._halt(vcpu)
            case MemoryFaultExit():
                return self._memory_fault(vcpu, exit)
            case MmioExit(_, length, write, _):
                # No device lives in memory: reads float high, writes go nowhere.
                self.statistics.mmio_accesses += 1
                return Resume(None if write else b"\xff" * length)
            case InterruptedExit():
                return Resume()
            case ShutdownExit():
                return Stop(StopReason.SHUTDOWN, 1, f"vcpu {vcpu}: triple fault")
            case BadHvaExit(gpa):
                return Stop(
                    StopReason.MEMORY, 1, f"vcpu {vcpu}: nothing behind the shared side of {gpa:#x}"
                )
            case SystemEventExit(event, data):
                return self.guest_fatal(vcpu, gave_up(event, data))
            case InternalErrorExit(suberror, data):
                words = " ".join(f"{word:#x}" for word in data)
                return Stop(
                    StopReason.ENGINE, 1, f"vcpu {vcpu}: internal error {suberror} {words}".rstrip()
                )

    def guest_fatal(self, vcpu: int, text: str) -> Stop:
        """The guest gave up by other means than its exit port: TDX's ReportFatalError, SNP's
        termination request (GHCB MSR protocol).
        """
        return Stop(StopReason.GUEST_FATAL, 1, f"vcpu {vcpu}: the guest gave up: {text}")

    # --- memory as a device sees it ------------------------------------------------------

    def is_shared(self, gpa: int, size: int) -> bool:
        """Whether all of [gpa, gpa + size) lies in one range of RAM and is shared now."""
        if size <= 0 or not any(r.gpa <= gpa and gpa + size <= r.end for r in self.config.ram):
            return False
        first, end = gpa >> PAGE_SHIFT, -(-(gpa + size) >> PAGE_SHIFT)
        return self._types.uniform(first, end) and not self._types.get(first)

    def read_shared(self, gpa: int, length: int) -> bytes:
        """Bytes of the shared side."""
        return self.memory.read_shared(gpa, length)

    def write_shared(self, gpa: int, data: bytes) -> None:
        """Write to the shared side."""
        self.memory.write_shared(gpa, data)

    # --- devices -------------------------------------------------------------------------

    def _port(self, exit: IoExit) -> Action:
        if self.bounce is not None and exit.size == 4:
            register = exit.port - self.config.bounce_port
            if exit.write and register == DOORBELL:
                for first in range(0, len(exit.data), 4):
                    self.bounce.ring(int.from_bytes(exit.data[first : first + 4], "little"))
                return Resume()
            if not exit.write and register == RESULT:
                return Resume(int(self.bounce.result).to_bytes(4, "little") * exit.count)
        if not exit.write:
            values = bytearray()
            for _ in range(exit.count):
                values += bytes(self._port_in(exit.port + i) for i in range(exit.size))
            return Resume(bytes(values))
        for first in range(0, len(exit.data), exit.size):
            unit = exit.data[first : first + exit.size]
            if exit.port == self.config.exit_port:
                status = int.from_bytes(unit, "little") & 0xFF
                return Stop(StopReason.GUEST_EXIT, status, f"the guest ended with status {status}")
            for i, value in enumerate(unit):
                self._port_out(exit.port + i, value)
        return Resume()

    def _port_in(self, port: int) -> int:
        offset = port - self.config.console_port
        if 0 <= offset < REGISTERS:
            return self.serial.read(offset)
        self.statistics.unknown_port_accesses += 1
        return 0xFF

    def _port_out(self, port: int, value: int) -> None:
        offset = port - self.config.console_port
        if 0 <= offset < REGISTERS:
            self._output += self.serial.write(offset, value)
        else:
            self.statistics.unknown_port_accesses += 1

    # --- vCPUs ---------------------------------------------------------------------------

    def _halt(self, vcpu: int) -> Action:
        state = self._vcpus[vcpu]
        self.statistics.halts += 1
        if state.kicked or (vcpu == 0 and self.serial.interrupt):
            state.kicked = False
            return Resume()
        state.halted = True
        if all(v.halted for v in self._vcpus) and not self.serial.wakes_on_input:
            return Stop(StopReason.ALL_HALTED, 1, StopReason.ALL_HALTED.value)
        return Wait()

    def _wake(self, vcpu: int) -> tuple[int, ...]:
        state = self._vcpus[vcpu]
        if not state.halted:
            return ()
        state.halted = False
        state.kicked = False
        return (vcpu,)

    # --- hypercalls ----------------------------------------------------------------------

    def _hypercall(self, nr: int, args: tuple[int, ...]) -> Action:
        args = (*args, 0, 0, 0)
        if nr == KVM_HC_MAP_GPA_RANGE:
            return Resume(self._map_gpa_range(*args[:3]) & _U64)
        if nr == KVM_HC_KICK_CPU:
            return self._kick(args[1])
        if nr == KVMSIM_HC_MAP_GPA_RANGES and self.config.batches:
            return Resume(self._map_gpa_list(args[0], args[1]) & _U64)
        self.statistics.unknown_hypercalls += 1
        return Resume(-KVM_ENOSYS & _U64)

    def _kick(self, target: int) -> Action:
        """kvm_pv_kick_cpu_op(): remembered until the next HLT; an unknown target is no error."""
        self.statistics.kicks += 1
        if target >= len(self._vcpus):
            return Resume(0)
        self._vcpus[target].kicked = True
        return Resume(0, self._wake(target))

    def _map_gpa_range(self, gpa: int, npages: int, attributes: int) -> int:
        """0 or a negative errno (Documentation/virt/kvm/x86/hypercalls.rst)."""
        private = bool(attributes & KVM_MAP_GPA_RANGE_ENCRYPTED)
        if attributes & ~(_MAP_GPA_RANGE_PAGE_SIZE | KVM_MAP_GPA_RANGE_ENCRYPTED):
            self.statistics.conversions_refused += 1
            return -errno.EINVAL
        return self.convert(gpa, npages * PAGE_SIZE, private=private)

    def _map_gpa_list(self, gpa: int, count: int) -> int:
        """The list is read as KVM reads it, and refused as a whole."""
        size = list_size(gpa, count)
        if not size:
            return -errno.EINVAL
        if not self.is_shared(gpa, size):
            return -errno.EFAULT
        ranges = unpack(self.memory.read_shared(gpa, size))
        if not all(entry.valid for entry in ranges):
            return -errno.EINVAL
        return self._map_gpa_ranges(ranges)

    def _map_gpa_ranges(self, ranges: Sequence[MapGpaRange]) -> int:
        self.statistics.batches += 1
        return convert_list(ranges, lambda entry: self._map_gpa_range(*entry))

    # --- conversions ---------------------------------------------------------------------

    def convert(self, gpa: int, size: int, *, private: bool) -> int:
        """A conversion that the guest asked for, by whatever call; 0 or a negative errno."""
        result = self._convert(gpa, size, private)
        if isinstance(result, Refused):
            return -result.errno
        self.statistics.conversions_explicit += 1
        return 0

    def _convert(self, gpa: int, size: int, private: bool) -> Converted | Refused:
        result = convert_memory(
            self.memory, self.config.ram, gpa, size, private=private, discard=self.config.discard
        )
        if isinstance(result, Refused):
            self.statistics.conversions_refused += 1
            if result.attributes_set:
                self._doubt(gpa, size)
            return result
        if isinstance(result, Converted):
            self._types.set(gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT, int(private))
            self.statistics.discarded_bytes += result.discarded
            return result
        return Converted(gpa, size, private, changed=False, discarded=0)

    def _doubt(self, gpa: int, size: int) -> None:
        """Half a conversion: what part of it was done is not known, so no device goes there."""
        self._types.set(gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT, 1)

    def _memory_fault(self, vcpu: int, exit: MemoryFaultExit) -> Action:
        """An implicit conversion, unless the fault is about something else.

        KVM says EFAULT (v7: returns 0) for an access of the wrong type. Nothing changed by the
        conversion means that another vCPU was faster, or that the type is not what is wrong.
        """
        side = "private" if exit.private else "shared"
        what = f"vcpu {vcpu}: {side} access to {exit.gpa:#x}+{exit.size:#x}"
        if exit.errno not in (None, errno.EFAULT):
            name = errno.errorcode.get(exit.errno, str(exit.errno))
            return Stop(StopReason.MEMORY, 1, f"{what}: {name}: {exit.reason}")
        result = self._convert(exit.gpa, exit.size, exit.private)
        if isinstance(result, Refused):
            return Stop(StopReason.MEMORY, 1, f"{what}: {result.reason}")
        state = self._vcpus[vcpu]
        if result.changed:
            self.statistics.conversions_implicit += 1
            state.last_fault, state.repeated = None, 0
            return Resume()
        fault = (exit.gpa, exit.private)
        state.repeated = state.repeated + 1 if state.last_fault == fault else 1
        state.last_fault = fault
        if state.repeated >= FAULT_REPEATS:
            return Stop(
                StopReason.MEMORY,
                1,
                f"{what}: {exit.reason or 'refused for no given reason'} "
                f"(refused {state.repeated} times, and it is {side} already)",
            )
        return Resume()
