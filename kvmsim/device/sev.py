# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_MEMORY_ENCRYPT_OP of an SNP guest: from KVM_SEV_INIT2 to KVM_SEV_SNP_LAUNCH_FINISH.

sev_mem_enc_ioctl() of arch/x86/kvm/svm/sev.c (v6.18), in its order of checks;
Documentation/virt/kvm/x86/amd-memory-encryption.rst. ``sev_fd`` is not looked at: there is one
AMD-SP, and nobody has to open /dev/sev.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from hwemu.snp.guestcontext import POLICY_RESERVED, IdBlock, Policy
from kvmsim.confidential.base import Confidential
from kvmsim.confidential.snp import SnpGuard
from kvmsim.device import vmsa
from kvmsim.device.caller import Caller, Efault
from kvmsim.device.launch import CommandRow, Turns, commands
from kvmsim.device.loading import Loading
from kvmsim.device.pending import Outcome
from kvmsim.device.results import Failure, Value
from kvmsim.device.table import Answer, Call, Level
from kvmsim.guard import GuardRefusal
from kvmsim.populate import Populate
from kvmsim.uapi import ENC_REGION, KVM_MEMORY_ENCRYPT_REG_REGION, PAGE_SHIFT, PAGE_SIZE, U64, sev
from kvmsim.vmm.launch import LaunchPage, PageType
from kvmsim.vmm.vmsa import VMSA_GPA

if TYPE_CHECKING:
    from kvmsim.device.vcpu import VcpuDevice
    from kvmsim.device.vm import VmDevice

GHCB_VERSION_MAX: Final = 2
_POLICY_REFUSED: Final = POLICY_RESERVED | Policy.MIGRATE_MA
_MSR_PAT: Final = 0x277
_CHUNK: Final = 4 << 20
_ID_KEY: Final = slice(0x240, 0x240 + 0x404)  # of an ID authentication structure (56860)
#: Commands of guests that are not SNP's.
_OLD: Final = frozenset(range(sev.KVM_SEV_LAUNCH_START, sev.KVM_SEV_INIT2)) - {
    sev.KVM_SEV_SEND_UPDATE_VMSA, sev.KVM_SEV_RECEIVE_UPDATE_VMSA, sev.KVM_SEV_CERT_EXPORT,
}  # fmt: skip
_TYPES: Final[Mapping[int, PageType]] = MappingProxyType(
    {
        sev.KVM_SEV_SNP_PAGE_TYPE_NORMAL: PageType.NORMAL,
        sev.KVM_SEV_SNP_PAGE_TYPE_ZERO: PageType.ZERO,
        sev.KVM_SEV_SNP_PAGE_TYPE_UNMEASURED: PageType.UNMEASURED,
        sev.KVM_SEV_SNP_PAGE_TYPE_SECRETS: PageType.SECRETS,
        sev.KVM_SEV_SNP_PAGE_TYPE_CPUID: PageType.CPUID,
    }
)


@dataclass(slots=True)
class Command:
    """Struct kvm_sev_cmd."""

    call: Call
    id: int
    data: int
    error: int
    sev_fd: int

    def refused(self, number: int, reason: str) -> Exception:
        """What to raise."""
        name = COMMANDS[self.id].name if self.id in COMMANDS else self.call.name
        return replace(self.call, name=name).refused(number, reason)

    def tell(self) -> None:
        """Let the caller see the status of the AMD-SP; Efault."""
        done = sev.SEV_CMD.pack(self.id, self.data, self.error, self.sev_fd)
        self.call.write(done[sev.SEV_CMD_ERROR_OFFSET :], sev.SEV_CMD_ERROR_OFFSET)


def make(vm: VmDevice, guard: Confidential) -> SevLaunch:
    """The launch of an SNP guest."""
    assert isinstance(guard, SnpGuard)
    return SevLaunch(vm, guard)


class SevLaunch:
    """See :class:`kvmsim.device.launch.Launch`."""

    def __init__(self, vm: VmDevice, guard: SnpGuard) -> None:
        self._vm = vm
        self._guard = guard
        self._populate = Populate(vm.running)
        self._active = False  # after KVM_SEV_INIT2
        self._started = False  # after KVM_SEV_SNP_LAUNCH_START
        self._measured: set[int] = set()  # vCPUs, by index, whose VMSA the AMD-SP has
        self._regions: list[tuple[int, int]] = []
        self._turns = Turns(f"launch {vm.running.label}")

    # --- commands -----------------------------------------------------------------------------

    def operation(self, call: Call) -> Answer:
        """sev_mem_enc_ioctl()."""
        if not call.argument:
            return 0  # a probe
        return self._turns.call(call.name, lambda: self._command(call))

    def _command(self, call: Call) -> Answer:
        command = Command(call, *call.read(sev.SEV_CMD))
        if self._active and command.id < sev.KVM_SEV_SNP_LAUNCH_START:
            raise command.refused(errno.EPERM, f"command {command.id} is none of SNP guests")
        if command.id in (sev.KVM_SEV_INIT, sev.KVM_SEV_ES_INIT):
            raise command.refused(errno.EINVAL, "VMs of this type begin with KVM_SEV_INIT2")
        if command.id in _OLD:
            raise command.refused(errno.ENOTTY, f"command {command.id}: it is no SEV guest")
        row = COMMANDS.get(command.id)
        if row is None:
            raise command.refused(errno.EINVAL, f"no command {command.id}")
        try:
            begun: Answer = row.handler(self, command)
        except BaseException:
            command.tell()
            raise
        if begun is None:
            command.tell()
        return begun

    def _init2(self, command: Command) -> None:
        """KVM_SEV_INIT2 (sev_guest_init2(), __sev_guest_init())."""
        data = command.call.caller.read(command.data, sev.SEV_INIT.size)
        features, flags, version = sev.SEV_INIT.unpack(data)
        for reason, wrong in (
            ("it comes before any vCPU", self._vm.vcpus),
            (f"flags {flags:#x}: none is known", flags),
            (f"VMSA features {features:#x}: none can be chosen", features),
            (f"GHCB version {version}: SNP has 2", version not in (0, GHCB_VERSION_MAX)),
        ):
            if wrong:
                raise command.refused(errno.EINVAL, reason)
        self._active = True

    def _launch_start(self, command: Command) -> None:
        """KVM_SEV_SNP_LAUNCH_START (snp_launch_start())."""
        if not self._active:
            raise command.refused(errno.ENOTTY, "KVM_SEV_INIT2 comes first")
        data = command.call.caller.read(command.data, sev.SNP_LAUNCH_START.size)
        policy, gosvw, flags = sev.SNP_LAUNCH_START.unpack(data)
        for reason, wrong in (
            ("the launch is started", self._started),
            (f"flags {flags:#x}: none is known", flags),
            (f"policy {policy:#x}: bits that KVM does not take", policy & _POLICY_REFUSED),
            (f"policy {policy:#x}: bit 17 must be set", not policy & Policy.MUST_BE_ONE),
        ):
            if wrong:
                raise command.refused(errno.EINVAL, reason)
        with self._vm.running.lock, _Refusing(command, self._guard):
            self._guard.launch_start(policy, gosvw)
        self._started = True

    def _launch_update(self, command: Command) -> Answer:
        """KVM_SEV_SNP_LAUNCH_UPDATE (snp_launch_update())."""
        if not self._started:
            raise command.refused(errno.EINVAL, "KVM_SEV_SNP_LAUNCH_START comes first")
        caller = command.call.caller
        data = caller.read(command.data, sev.SNP_LAUNCH_UPDATE.size)
        gfn, source, size, number, flags = sev.SNP_LAUNCH_UPDATE.unpack(data)
        type = _TYPES.get(number)
        if not size or size % PAGE_SIZE or flags or type is None:
            raise command.refused(
                errno.EINVAL, f"len {size:#x}, flags {flags:#x}, type {number}: not all are known"
            )
        with self._vm.running.lock:
            slot = self._vm.running.vm.mmu.slots.find(gfn)
        if slot is None or not slot.has_file:
            raise command.refused(errno.EINVAL, f"gfn {gfn:#x}: no guest_memfd is there")
        npages = min(size >> PAGE_SHIFT, slot.end_gfn - gfn)
        zero = type is PageType.ZERO
        self._guard.status, self._guard.rejected = 0, b""

        def page(index: int) -> LaunchPage:
            at = source + (index << PAGE_SHIFT)
            content = bytes(PAGE_SIZE) if zero else caller.read(at, PAGE_SIZE)
            return LaunchPage(gfn + index << PAGE_SHIFT, content, type)

        def finish(done: int, failure: Failure | None) -> Outcome:
            offset = done << PAGE_SHIFT
            if done:
                uaddr = source if zero else source + offset
                left = sev.SNP_LAUNCH_UPDATE_DONE.pack(gfn + done, uaddr, size - offset)
                caller.write(command.data, left)
                command.tell()
                return Value(0)
            assert failure is not None
            command.error = self._guard.status
            if type is PageType.CPUID and self._guard.rejected:
                caller.write(source, self._guard.rejected)  # what would have been accepted
            command.tell()
            return Failure(errno.EIO, f"{COMMANDS[command.id].name}: {failure.reason}")

        self._vm.pin()
        pending = Loading(self._populate, self._guard, npages, page, finish).begin()
        pending.on_done(lambda _: self._vm.unpin())
        return self._turns.keep(pending)

    def _launch_finish(self, command: Command) -> None:
        """KVM_SEV_SNP_LAUNCH_FINISH (snp_launch_finish()): VMSAs, then the last command."""
        if not self._active:
            raise command.refused(errno.ENOTTY, "KVM_SEV_INIT2 comes first")
        if not self._started:
            raise command.refused(errno.EINVAL, "KVM_SEV_SNP_LAUNCH_START comes first")
        caller = command.call.caller
        data = caller.read(command.data, sev.SNP_LAUNCH_FINISH.size)
        block_at, auth_at, block_en, _, _, host_data, flags = sev.SNP_LAUNCH_FINISH.unpack(data)
        if flags:
            raise command.refused(errno.EINVAL, f"flags {flags:#x}: none is known")
        running = self._vm.running
        with running.lock, _Refusing(command, self._guard):
            if not self._guard.finished:
                self._measure_vcpus()
        block = self._id_block(command, caller, block_at, auth_at) if block_en else None
        with running.lock, _Refusing(command, self._guard):
            self._guard.launch_finish(host_data=host_data, id_block=block)
            running.vm.pre_fault_allowed = True

    def _measure_vcpus(self) -> None:
        """snp_launch_update_vmsa(): in the order of their making."""
        for vcpu in self._vm.vcpus:
            index = vcpu.engine.index
            if index in self._measured:
                continue
            page = vmsa.pack(
                vcpu.cpu.get_regs(), vcpu.cpu.get_sregs(), vcpu.cpu.get_fpu(),
                dr6=vcpu.debugregs[4], dr7=vcpu.debugregs[5], pat=vcpu.cpu.get_msr(_MSR_PAT),
            )  # fmt: skip
            self._guard.stage(LaunchPage(VMSA_GPA, page, PageType.VMSA, index))
            self._measured.add(index)

    def _id_block(self, command: Command, caller: Caller, block_at: int, auth_at: int) -> IdBlock:
        """psp_copy_user_blob() of both."""
        if not block_at or not auth_at:
            raise command.refused(errno.EINVAL, "an ID block needs its two addresses")
        block = IdBlock.unpack(caller.read(block_at, sev.KVM_SEV_SNP_ID_BLOCK_SIZE))
        key = caller.read(auth_at, sev.KVM_SEV_SNP_ID_AUTH_SIZE)[_ID_KEY]
        return replace(block, id_key_digest=hashlib.sha384(key).digest())

    # --- what others ask ----------------------------------------------------------------------

    def vcpu_operation(self, vcpu: VcpuDevice, call: Call) -> Answer:
        """AMD's vCPUs have none."""
        raise call.refused(errno.ENOTTY, "SNP guests have commands of the VM alone")

    def region(self, call: Call) -> None:
        """KVM_MEMORY_ENCRYPT_(UN)REG_REGION (sev_mem_enc_register_region()): hvas, pinned.

        Nothing moves a page that is mapped here, so to pin it is to see that it is there.
        """
        region: tuple[int, int] = ENC_REGION.unpack(call.fetch(ENC_REGION.size))
        if not self._active:
            raise call.refused(errno.ENOTTY, "KVM_SEV_INIT2 comes first")
        address, size = region
        if call.request == KVM_MEMORY_ENCRYPT_REG_REGION:
            if not size or address + size >= U64:
                raise call.refused(errno.EINVAL, f"hva {address:#x}+{size:#x}: empty, or it wraps")
            if not _is_there(call.caller, address, size):
                raise call.refused(errno.ENOMEM, f"hva {address:#x}+{size:#x} cannot be pinned")
            self._regions.append(region)
        elif region in self._regions:
            self._regions.remove(region)
        else:
            raise call.refused(errno.EINVAL, f"hva {address:#x}+{size:#x} is not registered")

    def describe(self) -> dict[str, Any] | None:
        """The digest, the policy, frames."""
        with self._vm.running.lock:
            if not self._started or self._vm.dead:
                return None
            return self._guard.describe()

    def vcpu_refused(self) -> tuple[int, str] | None:
        """KVM makes vCPUs at any time."""
        return None

    def run_refused(self, vcpu: VcpuDevice) -> str:
        """svm_vcpu_pre_run(); and where VMRUN would fail, as KVM_EXIT_FAIL_ENTRY says there."""
        if not self._active:
            return "KVM_SEV_INIT2 comes first"
        if vcpu.engine.index not in self._measured or not self._guard.finished:
            return "KVM_SEV_SNP_LAUNCH_FINISH comes first"
        return ""

    def protected(self, vcpu: VcpuDevice) -> bool:
        """From the measurement of its VMSA on."""
        return vcpu.engine.index in self._measured


def _is_there(caller: Caller, address: int, size: int) -> bool:
    start, end = address & -PAGE_SIZE, -(-(address + size) // PAGE_SIZE) * PAGE_SIZE
    shared = sum(piece.length for piece in caller.host_range(start, end - start))
    if shared == end - start:
        return True
    try:
        for at in range(start, end, _CHUNK):
            caller.read(at, min(_CHUNK, end - at))
    except Efault:
        return False
    return True


class _Refusing:
    """Turns a refusal of the AMD-SP into the ioctl's: its status goes to kvm_sev_cmd.error."""

    def __init__(self, command: Command, guard: SnpGuard) -> None:
        self._command = command
        self._guard = guard

    def __enter__(self) -> None:
        self._guard.status = 0

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, GuardRefusal):
            self._command.error = self._guard.status
            raise self._command.refused(error.errno, error.reason) from error


COMMANDS: Final = commands(
    sev,
    CommandRow("KVM_SEV_INIT2", Level.VM, SevLaunch._init2,
               "no VMSA feature can be chosen; GHCB version 2",
               "EINVAL: there are vCPUs, flags, features, version 1; EPERM: twice"),
    CommandRow("KVM_SEV_SNP_LAUNCH_START", Level.VM, SevLaunch._launch_start, "all",
               "ENOTTY: before KVM_SEV_INIT2; EINVAL: twice, flags, policy; EBUSY: every ASID is a "
               "guest's; EIO: the AMD-SP refuses, error says why"),
    CommandRow("KVM_SEV_SNP_LAUNCH_UPDATE", Level.VM, SevLaunch._launch_update,
               "all page types; with any progress it succeeds, and tells what is left",
               "EINVAL: before KVM_SEV_SNP_LAUNCH_START, len, flags, type, no guest_memfd; EIO: "
               "not private, assigned before, nothing at uaddr, the AMD-SP refuses"),
    CommandRow("KVM_SEV_SNP_LAUNCH_FINISH", Level.VM, SevLaunch._launch_finish,
               "measures the vCPUs in the order of their making; an ID block is compared, its "
               "signatures are not checked",
               "ENOTTY, EINVAL: before the others, flags, no address; EIO: the AMD-SP refuses"),
)  # fmt: skip
"""By id."""
