# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests about interrupt controllers, of which there is none: what each is refused with.

kvm_arch_vm_ioctl() of arch/x86/kvm/x86.c (v6.18) has an answer for a VM without controllers, and
that is given. After KVM_CREATE_IRQCHIP the kernel would have them: then EOPNOTSUPP, since a
program that got so far must not believe that an interrupt will come.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from struct import Struct
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from kvmsim.device.table import Call
from kvmsim.uapi import requests, structs

if TYPE_CHECKING:
    from kvmsim.device.vm import VmDevice

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Without:
    """``number`` refuses a request for ``reason``; ``always``: after KVM_CREATE_IRQCHIP, too."""

    number: int
    reason: str
    layout: Struct | None = None
    always: bool = False


_NO_CHIP: Final = "no KVM_CREATE_IRQCHIP"
_NO_PIT: Final = "no KVM_CREATE_PIT2"

RULES: Final = MappingProxyType(
    {
        requests.KVM_IRQ_LINE: Without(errno.ENXIO, _NO_CHIP, structs.IRQ_LEVEL),
        requests.KVM_IRQ_LINE_STATUS: Without(errno.ENXIO, _NO_CHIP, structs.IRQ_LEVEL),
        requests.KVM_GET_IRQCHIP: Without(errno.ENXIO, _NO_CHIP, structs.IRQCHIP),
        requests.KVM_SET_IRQCHIP: Without(errno.ENXIO, _NO_CHIP, structs.IRQCHIP),
        requests.KVM_CREATE_PIT: Without(errno.ENOENT, _NO_CHIP),
        requests.KVM_CREATE_PIT2: Without(errno.ENOENT, _NO_CHIP, structs.PIT_CONFIG),
        requests.KVM_REINJECT_CONTROL: Without(errno.ENXIO, _NO_PIT, always=True),
        # kvm_send_userspace_msi() and kvm_arch_can_set_irq_routing() ask for a controller
        requests.KVM_SIGNAL_MSI: Without(errno.EINVAL, _NO_CHIP, structs.MSI),
        requests.KVM_SET_GSI_ROUTING: Without(
            errno.EINVAL, "there is no interrupt controller to route to", always=True
        ),
        # as of a kernel without CONFIG_HAVE_KVM_IRQCHIP (include/linux/kvm_host.h)
        requests.KVM_IRQFD: Without(
            errno.EINVAL, "nothing can be signalled", structs.IRQFD, always=True
        ),
        # as of a kernel without CONFIG_HAVE_KVM_EVENTFD (before v6.8); KVM_CAP_IOEVENTFD is 0
        requests.KVM_IOEVENTFD: Without(
            errno.ENOSYS, "accesses to devices leave KVM_RUN", structs.IOEVENTFD, always=True
        ),
    }
)
"""By request."""


def refuse(vm: VmDevice, call: Call) -> None:
    """Refuse a request of :data:`RULES`, with a line in the log that names it."""
    rule = RULES[call.request]
    if rule.layout is not None:
        call.read(rule.layout)
    number, reason = rule.number, rule.reason
    if vm.irqchip and not rule.always:
        number, reason = errno.EOPNOTSUPP, "interrupt controllers are not simulated"
    log.info("%s: %s", call.name, reason)
    raise call.refused(number, reason)
