# SPDX-License-Identifier: GPL-2.0-or-later
"""Events that wait for injection into one vCPU: struct kvm_vcpu_events and its rules.

kvm_vcpu_ioctl_x86_get_vcpu_events(), …set_vcpu_events(), kvm_vcpu_ioctl_interrupt() and
kvm_check_and_inject_events() of arch/x86/kvm/x86.c (v6.18).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hwemu.cpu.delivery import ERROR_CODE_VECTORS
from kvmsim.device.registers import Invalid
from kvmsim.uapi import (
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_VCPUEVENT_VALID_SMM,
    structs,
)

_NMI: Final = 2
_REPORTED: Final = (
    KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM
)
_KNOWN: Final = _REPORTED | KVM_VCPUEVENT_VALID_SIPI_VECTOR


@dataclass(frozen=True, slots=True)
class Injection:
    """What to give the engine next."""

    vector: int
    error_code: int | None = None


@dataclass(slots=True)
class Events:
    """An exception, an NMI and an external interrupt at most."""

    exception: Injection | None = None
    interrupt: int | None = None
    nmi: bool = False
    nmi_masked: bool = False
    sipi_vector: int = 0

    @property
    def waiting(self) -> bool:
        """Whether anything is to be injected."""
        return self.exception is not None or self.interrupt is not None or self.nmi

    def next(self) -> Injection | None:
        """Take what comes first: exception, NMI, interrupt."""
        if self.exception is not None:
            taken, self.exception = self.exception, None
            return taken
        if self.nmi:
            self.nmi = False
            return Injection(_NMI)
        if self.interrupt is not None:
            vector, self.interrupt = self.interrupt, None
            return Injection(vector)
        return None

    def pack(self, *, shadow: bool) -> bytes:
        """Struct kvm_vcpu_events."""
        fault = self.exception
        return structs.VCPU_EVENTS.pack(
            fault is not None,
            fault.vector if fault else 0,
            fault is not None and fault.error_code is not None,
            0,
            (fault.error_code or 0) if fault else 0,
            self.interrupt is not None,
            self.interrupt or 0,
            0,
            shadow,
            0,
            self.nmi,
            self.nmi_masked,
            self.sipi_vector,
            _REPORTED,
            *(0, 0, 0, 0),
            *(0, 0, 0),
        )

    def unpack(self, data: bytes) -> None:
        """Take over struct kvm_vcpu_events; :class:`Invalid` changes nothing."""
        (
            injected, nr, has_error_code, _, error_code,
            interrupt, vector, soft, _,
            nmi_injected, nmi_pending, nmi_masked,
            sipi_vector, flags,
            smm, smi_pending, _, _,
            *_,
        ) = structs.VCPU_EVENTS.unpack(data)  # fmt: skip
        if flags & ~_KNOWN:
            raise Invalid(f"flags {flags:#x}: payloads and triple faults are not enabled")
        if injected and (nr > 31 or nr == _NMI):
            raise Invalid(f"exception {nr}: none of the processor's")
        if flags & KVM_VCPUEVENT_VALID_SMM and (smm or smi_pending):
            raise Invalid("system management mode is not simulated")
        if interrupt and soft:
            raise Invalid("a software interrupt cannot be injected again")
        code = error_code if has_error_code and nr in ERROR_CODE_VECTORS else None
        self.exception = Injection(nr, code) if injected else None
        self.interrupt = vector if interrupt else None
        pending = bool(flags & KVM_VCPUEVENT_VALID_NMI_PENDING and nmi_pending)
        kept = self.nmi and not flags & KVM_VCPUEVENT_VALID_NMI_PENDING
        self.nmi = bool(nmi_injected) or pending or kept
        self.nmi_masked = bool(nmi_masked)
        if flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR:
            self.sipi_vector = sipi_vector
