# SPDX-License-Identifier: GPL-2.0-or-later
"""The exit of an event that could not be delivered, since its way leads to a device.

kvm_prepare_event_vectoring_exit() of arch/x86/kvm/x86.c (v6.18): the emulator has no delivery of
events, so an IDT, a TSS or a stack where no memory is cannot be helped.
"""

from __future__ import annotations

from typing import Final

from hwemu.cpu.api import Access
from hwemu.cpu.vmcb import EXIT_NPF
from kvmsim.exits import InternalErrorExit
from kvmsim.uapi import KVM_INTERNAL_ERROR_DELIVERY_EV

_WRITE: Final = 1 << 1  # EXITINFO1 of #NPF (AMD APM vol. 2, 15.25.6)
_USER: Final = 1 << 2
_FINAL: Final = 1 << 32


def event_delivery(gpa: int, access: Access, vcpu: int) -> InternalErrorExit:
    """KVM_INTERNAL_ERROR_DELIVERY_EV with what svm_get_exit_info() would say of the exit:
    EXITINFO2, the exit code, EXITINFO1; then the gpa and, for the host's CPU, the vCPU's index.
    """
    info1 = _FINAL | _USER | (_WRITE if access & Access.WRITE else 0)
    return InternalErrorExit(KVM_INTERNAL_ERROR_DELIVERY_EV, (gpa, EXIT_NPF, info1, gpa, vcpu))
