# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_MEMORY_ENCRYPT_OP of a TD: from KVM_TDX_INIT_VM to KVM_TDX_FINALIZE_VM.

tdx_vm_ioctl() and tdx_vcpu_ioctl() of arch/x86/kvm/vmx/tdx.c (v6.18), in their order of checks;
Documentation/virt/kvm/x86/intel-tdx.rst. What differs: a guest-physical address has 40 bits, the
topmost of them SHARED, so 40 is what CPUID 0x80000008 EAX[23:16] must say, where KVM takes 48 or
52; and nothing else of CPUID can be configured, since every CPUID of a TD is a #VE here.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from hwemu.cpu.cpuid import DEFAULT
from hwemu.tdx import TdxError
from hwemu.tdx.td import XFAM_FIXED1, TdParams
from kvmsim.confidential.base import Confidential
from kvmsim.confidential.tdx import TdxGuard
from kvmsim.device import cpuid
from kvmsim.device.capabilities import MAX_VCPUS
from kvmsim.device.launch import CommandRow, Turns, commands
from kvmsim.device.loading import Loading
from kvmsim.device.pending import Outcome
from kvmsim.device.results import Begun, Failure, Value
from kvmsim.device.table import Answer, Call, Level
from kvmsim.device.tdreset import reset_state
from kvmsim.guard import GuardRefusal
from kvmsim.kind import ADDRESS_BITS
from kvmsim.populate import Populate
from kvmsim.uapi import KVM_MAX_CPUID_ENTRIES, PAGE_SHIFT, PAGE_SIZE, U64, structs, tdx
from kvmsim.vmm.launch import LaunchPage, PageType

if TYPE_CHECKING:
    from kvmsim.device.vcpu import VcpuDevice
    from kvmsim.device.vm import VmDevice

SUPPORTED_ATTRS: Final = tdx.TDX_TD_ATTR_SEPT_VE_DISABLE
SUPPORTED_XFAM: Final = XFAM_FIXED1
_WIDTHS: Final = 0x8000_0008
_GPAW: Final = cpuid.Entry(_WIDTHS, eax=0xFF << 16)
CONFIGURABLE: Final = (_GPAW,)
"""CPUID bits that KVM_TDX_INIT_VM may set: the width of guest-physical addresses."""

_PROCESSOR: Final = tuple(
    cpuid.Entry(function, 0, 0, *leaf)
    for function, leaf in sorted(DEFAULT.items())
    if function & 0xC000_0000 != 0x4000_0000  # a hypervisor's
)
_MASK64: Final = U64 - 1


class State(Enum):
    """How far the launch is (enum kvm_tdx_state)."""

    UNINITIALIZED = "KVM_TDX_INIT_VM comes first"
    INITIALIZED = "KVM_TDX_FINALIZE_VM comes first"
    RUNNABLE = "the TD is finalized"


@dataclass(slots=True)
class Command:
    """Struct kvm_tdx_cmd."""

    call: Call
    id: int
    flags: int
    data: int
    hw_error: int

    def refused(self, number: int, reason: str) -> Exception:
        """What to raise."""
        return replace(self.call, name=_NAMES[self.id]).refused(number, reason)

    def no_flags(self, known: int = 0) -> None:
        """Refuse unknown ones."""
        if self.flags & ~known:
            raise self.refused(errno.EINVAL, f"flags {self.flags:#x}: not all are known")


def make(vm: VmDevice, guard: Confidential) -> TdxLaunch:
    """The launch of a TD."""
    assert isinstance(guard, TdxGuard)
    return TdxLaunch(vm, guard)


class TdxLaunch:
    """See :class:`kvmsim.device.launch.Launch`."""

    def __init__(self, vm: VmDevice, guard: TdxGuard) -> None:
        self._vm = vm
        self._guard = guard
        self._populate = Populate(vm.running)
        self._state = State.UNINITIALIZED
        self._ready: set[int] = set()  # vCPUs, by index, after KVM_TDX_INIT_VCPU
        self._entries: tuple[cpuid.Entry, ...] = ()
        self._turns = Turns(f"launch {vm.running.label}")

    # --- the VM -------------------------------------------------------------------------------

    def operation(self, call: Call) -> Answer:
        """tdx_vm_ioctl()."""
        return self._turns.call(call.name, lambda: self._of_vm(call))

    def _of_vm(self, call: Call) -> Answer:
        command = self._command(call)
        row = COMMANDS.get(command.id)
        if row is None or row.level is not Level.VM:
            raise call.refused(errno.EINVAL, f"no command {command.id} of a VM")
        try:
            row.handler(self, command)
        finally:
            done = (command.id, command.flags, command.data, command.hw_error)
            call.write(tdx.TDX_CMD.pack(*done))
        return 0

    def _command(self, call: Call) -> Command:
        command = Command(call, *call.read(tdx.TDX_CMD))
        if command.hw_error:
            raise call.refused(errno.EINVAL, f"hw_error {command.hw_error:#x} must be 0")
        return command

    def _capabilities(self, command: Command) -> None:
        """KVM_TDX_CAPABILITIES (tdx_get_capabilities())."""
        command.no_flags()
        at, caller = command.data, command.call.caller
        caller.read(at, tdx.TDX_CAPABILITIES.size)
        tail = at + tdx.TDX_CAPABILITIES.size
        room, _ = tdx.CPUID2_HEAD.unpack(caller.read(tail, tdx.CPUID2_HEAD.size))
        if room < len(CONFIGURABLE):
            raise command.refused(
                errno.E2BIG, f"room for {room} CPUID entries, there are {len(CONFIGURABLE)}"
            )
        head = tdx.TDX_CAPABILITIES.pack(SUPPORTED_ATTRS, SUPPORTED_XFAM, 0, 0, 0, 0)
        entries = b"".join(entry.pack() for entry in CONFIGURABLE)
        caller.write(at, head + tdx.CPUID2_HEAD.pack(len(CONFIGURABLE), 0) + entries)

    def _init_vm(self, command: Command) -> None:
        """KVM_TDX_INIT_VM (tdx_td_init(), setup_tdparams())."""
        if self._state is not State.UNINITIALIZED:
            raise command.refused(errno.EINVAL, "the TD is initialized")
        command.no_flags()
        attributes, xfam, config, owner, owner_config, reserved, entries = self._parameters(command)
        if any(reserved):
            raise command.refused(errno.EINVAL, "reserved words must be 0")
        if self._vm.vcpus:
            raise command.refused(errno.EBUSY, "there are vCPUs already")
        if attributes & ~SUPPORTED_ATTRS:
            raise command.refused(errno.EINVAL, f"attributes {attributes:#x}: not all can be had")
        if xfam & ~SUPPORTED_XFAM:
            raise command.refused(errno.EINVAL, f"XFAM {xfam:#x}: not all can be had")
        width = next((e.eax >> 16 & 0xFF for e in entries if e.function == _WIDTHS), 0)
        if width != ADDRESS_BITS:
            raise command.refused(
                errno.EINVAL,
                f"CPUID {_WIDTHS:#x} EAX[23:16] is {width}: addresses have {ADDRESS_BITS} bits",
            )
        if len(entries) != len(CONFIGURABLE):
            raise command.refused(errno.EINVAL, "CPUID entries that cannot be configured")
        params = TdParams(
            attributes, xfam | XFAM_FIXED1, MAX_VCPUS, mr_config_id=config, mr_owner=owner,
            mr_owner_config=owner_config,
        )  # fmt: skip
        with self._vm.running.lock, self._refusing(command):
            self._guard.init_vm(params)
        self._entries = entries
        self._state = State.INITIALIZED

    def _parameters(
        self, command: Command
    ) -> tuple[int, int, bytes, bytes, bytes, bytes, tuple[cpuid.Entry, ...]]:
        at, caller = command.data, command.call.caller
        head = tdx.TDX_INIT_VM.unpack(caller.read(at, tdx.TDX_INIT_VM.size))
        at += tdx.TDX_INIT_VM.size
        count, padding = tdx.CPUID2_HEAD.unpack(caller.read(at, tdx.CPUID2_HEAD.size))
        if count > KVM_MAX_CPUID_ENTRIES:
            raise command.refused(errno.E2BIG, f"{count} CPUID entries")
        size = count * structs.CPUID_ENTRY2.size
        entries = cpuid.unpack_entries(caller.read(at + tdx.CPUID2_HEAD.size, size))
        if padding:
            raise command.refused(errno.EINVAL, "the padding of kvm_cpuid2 must be 0")
        attributes, xfam, config, owner, owner_config, reserved = head
        return attributes, xfam, config, owner, owner_config, reserved, entries

    def _finalize(self, command: Command) -> None:
        """KVM_TDX_FINALIZE_VM (tdx_td_finalize())."""
        if self._state is not State.INITIALIZED:
            raise command.refused(errno.EINVAL, self._state.value)
        with self._vm.running.lock, self._refusing(command):
            self._guard.finish(())
            self._state = State.RUNNABLE
            self._vm.running.vm.pre_fault_allowed = True

    # --- a vCPU -------------------------------------------------------------------------------

    def vcpu_operation(self, vcpu: VcpuDevice, call: Call) -> Answer:
        """tdx_vcpu_ioctl()."""
        result = self._turns.call(call.name, lambda: self._of_vcpu(vcpu, call))
        return vcpu.wait_for(result.pending) if isinstance(result, Begun) else result

    def _of_vcpu(self, vcpu: VcpuDevice, call: Call) -> Answer:
        if self._state is not State.INITIALIZED:
            raise call.refused(errno.EINVAL, self._state.value)
        command = self._command(call)
        row = COMMANDS.get(command.id)
        if row is None or row.level is not Level.VCPU:
            raise call.refused(errno.EINVAL, f"no command {command.id} of a vCPU")
        answer: Answer = row.handler(self, vcpu, command)
        return answer

    def _init_vcpu(self, vcpu: VcpuDevice, command: Command) -> None:
        """KVM_TDX_INIT_VCPU (tdx_vcpu_init()); the immediate is what RCX and R8 hold at first."""
        command.no_flags()
        index = vcpu.engine.index
        if index in self._ready:
            raise command.refused(errno.EINVAL, f"vCPU {vcpu.id} is initialized")
        with self._vm.running.lock, self._refusing(command):
            self._guard.init_vcpu(index)
        self._ready.add(index)
        regs, sregs = reset_state(vcpu.id, command.data)
        vcpu.cpu.set_sregs(sregs)
        vcpu.cpu.set_regs(regs)
        vcpu.start_up()

    def _init_mem_region(self, vcpu: VcpuDevice, command: Command) -> Answer:
        """KVM_TDX_INIT_MEM_REGION (tdx_vcpu_init_mem_region())."""
        if vcpu.engine.index not in self._ready:
            raise command.refused(errno.EINVAL, "KVM_TDX_INIT_VCPU comes first")
        command.no_flags(tdx.KVM_TDX_MEASURE_MEMORY_REGION)
        caller, at = command.call.caller, command.data
        source, gpa, npages = tdx.TDX_INIT_MEM_REGION.unpack(
            caller.read(at, tdx.TDX_INIT_MEM_REGION.size)
        )
        end = (gpa + (npages << PAGE_SHIFT)) & _MASK64
        shared = self._vm.kind.shared_bit
        for reason, wrong in (
            ("source_addr and gpa are page-aligned", (source | gpa) % PAGE_SIZE),
            ("nr_pages is not 0", not npages),
            ("the range does not wrap", end <= gpa),
            ("gpa is private", (gpa | end - 1) & shared),
        ):
            if wrong:
                raise command.refused(
                    errno.EINVAL, f"source {source:#x}, gpa {gpa:#x}, {npages} pages: {reason}"
                )
        measured = command.flags & tdx.KVM_TDX_MEASURE_MEMORY_REGION
        type = PageType.NORMAL if measured else PageType.UNMEASURED

        def page(number: int) -> LaunchPage:
            offset = number << PAGE_SHIFT
            return LaunchPage(gpa + offset, caller.read(source + offset, PAGE_SIZE), type)

        def finish(done: int, failure: Failure | None) -> Outcome:
            offset = done << PAGE_SHIFT
            caller.write(
                at, tdx.TDX_INIT_MEM_REGION.pack(source + offset, gpa + offset, npages - done)
            )
            if failure is None:
                return Value(0)
            return Failure(failure.errno, f"{_NAMES[command.id]}: {failure.reason}")

        loading = Loading(self._populate, self._guard, npages, page, finish)
        return self._turns.keep(loading.begin())

    def _get_cpuid(self, vcpu: VcpuDevice, command: Command) -> None:
        """KVM_TDX_GET_CPUID (tdx_vcpu_get_cpuid()): what CPUID answers by way of #VE."""
        caller, at = command.call.caller, command.data
        room, _ = tdx.CPUID2_HEAD.unpack(caller.read(at, tdx.CPUID2_HEAD.size))
        width = ADDRESS_BITS << 16
        entries = [
            replace(entry, eax=entry.eax & ~_GPAW.eax | width) if entry.function == _WIDTHS
            else entry for entry in _PROCESSOR
        ]  # fmt: skip
        caller.write(at, tdx.CPUID2_HEAD.pack(len(entries), 0))
        if room < len(entries):
            raise command.refused(
                errno.E2BIG, f"room for {room} CPUID entries, there are {len(entries)}"
            )
        packed = b"".join(entry.pack() for entry in entries)
        caller.write(at + tdx.CPUID2_HEAD.size, packed)

    # --- what others ask ----------------------------------------------------------------------

    def region(self, call: Call) -> None:
        """KVM_MEMORY_ENCRYPT_(UN)REG_REGION: SEV's alone."""
        raise call.refused(errno.ENOTTY, "these are SEV's")

    def describe(self) -> dict[str, Any] | None:
        """Measurements, states, pages."""
        with self._vm.running.lock:
            if self._state is State.UNINITIALIZED or self._vm.dead:
                return None
            return self._guard.describe()

    def vcpu_refused(self) -> tuple[int, str] | None:
        """tdx_vcpu_create()."""
        if self._state is State.INITIALIZED:
            return None
        return errno.EIO, self._state.value

    def run_refused(self, vcpu: VcpuDevice) -> str:
        """tdx_vcpu_pre_run()."""
        if vcpu.engine.index not in self._ready:
            return "KVM_TDX_INIT_VCPU comes first"
        return "" if self._state is State.RUNNABLE else self._state.value

    def protected(self, vcpu: VcpuDevice) -> bool:
        """Always: no TD can be debugged (TDX_TD_ATTR_DEBUG)."""
        return True

    def _refusing(self, command: Command) -> _Refusing:
        return _Refusing(command)


class _Refusing:
    """Turns a refusal of the hardware into the ioctl's: its status goes to hw_error."""

    def __init__(self, command: Command) -> None:
        self._command = command

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, GuardRefusal):
            if isinstance(error.__cause__, TdxError):
                self._command.hw_error = error.__cause__.status
            raise self._command.refused(error.errno, error.reason) from error


_INPUT: Final = "flags, hw_error is not 0"

COMMANDS: Final = commands(
    tdx,
    CommandRow("KVM_TDX_CAPABILITIES", Level.VM, TdxLaunch._capabilities,
               "SEPT_VE_DISABLE, x87 and SSE; of CPUID the width of guest-physical addresses",
               f"EINVAL: {_INPUT}; E2BIG: no room"),
    CommandRow("KVM_TDX_INIT_VM", Level.VM, TdxLaunch._init_vm,
               "all; the width is 40, not 48 or 52, and its topmost bit is SHARED",
               f"EINVAL: twice, attributes, XFAM, CPUID, reserved words, {_INPUT}; EBUSY: there "
               "are vCPUs; E2BIG: more than 256 entries; ENOSPC: every key is a TD's"),
    CommandRow("KVM_TDX_FINALIZE_VM", Level.VM, TdxLaunch._finalize, "all",
               "EINVAL: before KVM_TDX_INIT_VM, twice, hw_error is not 0"),
    CommandRow("KVM_TDX_INIT_VCPU", Level.VCPU, TdxLaunch._init_vcpu,
               "the state at the reset vector; data goes to RCX and R8",
               f"EINVAL: twice, after KVM_TDX_FINALIZE_VM, {_INPUT}"),
    CommandRow("KVM_TDX_INIT_MEM_REGION", Level.VCPU, TdxLaunch._init_mem_region,
               "all; what is left is told, also with an error",
               "EINVAL: before KVM_TDX_INIT_VCPU, after KVM_TDX_FINALIZE_VM, not aligned, no "
               f"pages, wrap, not private, no guest_memfd, {_INPUT}; EEXIST: loaded before; "
               "EFAULT: nothing at source_addr, the file is gone; EINTR; EIO: the module refuses"),
    CommandRow("KVM_TDX_GET_CPUID", Level.VCPU, TdxLaunch._get_cpuid,
               "what the processor has, with the width",
               "E2BIG: no room, the count is told; EINVAL: after KVM_TDX_FINALIZE_VM"),
)  # fmt: skip
"""By id."""
_NAMES: Final = {id: row.name for id, row in COMMANDS.items()}
