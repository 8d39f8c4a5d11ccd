# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM_MEMORY_ENCRYPT_OP and its likes are to a VM, by its kind: the launch of a guest.

``tdx`` and ``sev`` beside this are to it what tdx_vm_ioctl() and sev_mem_enc_ioctl() are to KVM
(arch/x86/kvm/vmx/tdx.c, arch/x86/kvm/svm/sev.c, v6.18).
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, Final, Protocol

from kvmsim.confidential.kinds import make_guard
from kvmsim.device.pending import Call as PendingCall
from kvmsim.device.results import Begun, Failure, Result
from kvmsim.device.serial import Serial
from kvmsim.device.table import Answer, Call, Level, answered

if TYPE_CHECKING:
    from kvmsim.device.vcpu import VcpuDevice
    from kvmsim.device.vm import VmDevice


class Launch(Protocol):
    """The launch of one confidential guest, as its VMM asks for it."""

    def operation(self, call: Call) -> Answer:
        """KVM_MEMORY_ENCRYPT_OP of the VM."""

    def vcpu_operation(self, vcpu: VcpuDevice, call: Call) -> Answer:
        """KVM_MEMORY_ENCRYPT_OP of a vCPU."""

    def region(self, call: Call) -> None:
        """KVM_MEMORY_ENCRYPT_REG_REGION and KVM_MEMORY_ENCRYPT_UNREG_REGION."""

    def describe(self) -> dict[str, Any] | None:
        """What its hardware says of the guest; None: there is none yet."""

    def vcpu_refused(self) -> tuple[int, str] | None:
        """Why there can be no vCPU now: errno and reason."""

    def run_refused(self, vcpu: VcpuDevice) -> str:
        """Why a vCPU cannot run yet (EINVAL); empty if it can."""

    def protected(self, vcpu: VcpuDevice) -> bool:
        """Whether nobody sees its registers (vcpu->arch.guest_state_protected)."""


@dataclass(frozen=True, slots=True)
class CommandRow:
    """One command of KVM_MEMORY_ENCRYPT_OP; ``what`` and ``errors`` are for people."""

    name: str
    level: Level
    handler: Callable[..., Any]
    what: str
    errors: str


def commands(numbers: ModuleType, *rows: CommandRow) -> Mapping[int, CommandRow]:
    """Rows by id, which ``numbers`` has under their names."""
    return MappingProxyType({getattr(numbers, row.name): row for row in rows})


class Turns:
    """One command of a launch at a time, also where one waits for memory (KVM's kvm->lock)."""

    def __init__(self, name: str) -> None:
        self._serial = Serial(name, self._cancel)

    def call(self, name: str, work: Callable[[], Answer]) -> Result:
        """Do ``work`` of the ioctl ``name`` now, or when its turn comes: then it is Begun."""
        return self._serial.call(lambda: answered(name, work))

    def keep(self, pending: PendingCall) -> Begun:
        """Keep the turn until ``pending`` is over: what ``work`` returns."""
        pending.on_done(lambda _: self._serial.unlock())
        return Begun(pending)

    def _cancel(self, pending: PendingCall) -> None:
        with self._serial.lock:
            waits = self._serial.remove(pending)
        if waits:
            pending.finish(Failure(errno.EINTR, "interrupted while another command was at work"))


#: kind → module with ``make(vm, guard)``; loaded when a VM of that kind is made.
_MODULES: Final[Mapping[str, str]] = MappingProxyType(
    {"tdx": "kvmsim.device.tdx", "snp": "kvmsim.device.sev"}
)


def make_launch(vm: VmDevice) -> Launch | None:
    """Put the kind's hardware around a VM that is being made; None for a kind that has none."""
    module = _MODULES.get(vm.kind.name)
    if module is None:
        return None
    guard = make_guard(vm.kind, vm.system.platform, vm.running)
    assert guard is not None, "every kind with a launch has a guard"
    vm.running.protect(guard)
    launch: Launch = importlib.import_module(module).make(vm, guard)
    return launch


def operation(vm: VmDevice, call: Call) -> Answer:
    """KVM_MEMORY_ENCRYPT_OP of a VM."""
    if vm.launch is None:
        raise call.refused(errno.ENOTTY, "no confidential hardware is around VMs of this type")
    return vm.launch.operation(call)


def vcpu_operation(vcpu: VcpuDevice, call: Call) -> Answer:
    """KVM_MEMORY_ENCRYPT_OP of a vCPU (vt_vcpu_mem_enc_ioctl())."""
    if vcpu.vm.launch is None:
        raise call.refused(errno.EINVAL, "the VM is no TD")
    return vcpu.vm.launch.vcpu_operation(vcpu, call)


def region(vm: VmDevice, call: Call) -> None:
    """KVM_MEMORY_ENCRYPT_(UN)REG_REGION: SEV's; v7's conversion."""
    if vm.launch is None:
        vm.memory.encrypt_region(call)
    else:
        vm.launch.region(call)
