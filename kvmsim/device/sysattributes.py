# SPDX-License-Identifier: GPL-2.0-or-later
"""Attributes of /dev/kvm itself: KVM_HAS_DEVICE_ATTR and KVM_GET_DEVICE_ATTR.

__kvm_x86_dev_get_attr() of arch/x86/kvm/x86.c and sev_dev_get_attr() of arch/x86/kvm/svm/sev.c
(v6.18), neither of which looks at the flags.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from kvmsim.device.table import Call
from kvmsim.uapi import (
    KVM_X86_GRP_SEV,
    KVM_X86_SEV_VMSA_FEATURES,
    KVM_X86_SNP_VM,
    KVM_X86_XCOMP_GUEST_SUPP,
    structs,
)


@dataclass(frozen=True, slots=True)
class Attribute:
    """``value`` is what is read; ``vm_type``: one that the device must offer."""

    value: int
    vm_type: int | None = None


ATTRIBUTES: Final[Mapping[tuple[int, int], Attribute]] = MappingProxyType(
    {
        (0, KVM_X86_XCOMP_GUEST_SUPP): Attribute(0),  # the processor has no XSAVE
        (KVM_X86_GRP_SEV, KVM_X86_SEV_VMSA_FEATURES): Attribute(0, KVM_X86_SNP_VM),
    }
)
"""By group and number."""


def has(call: Call, types: Iterable[int]) -> None:
    """KVM_HAS_DEVICE_ATTR."""
    _find(call, types)


def get(call: Call, types: Iterable[int]) -> None:
    """KVM_GET_DEVICE_ATTR."""
    value, address = _find(call, types)
    call.caller.write(address, structs.U64_VALUE.pack(value))


def _find(call: Call, types: Iterable[int]) -> tuple[int, int]:
    _, group, number, address = call.read(structs.DEVICE_ATTR)
    found = ATTRIBUTES.get((group, number))
    if found is None or (found.vm_type is not None and found.vm_type not in types):
        raise call.refused(errno.ENXIO, f"no attribute {number} in group {group}")
    return found.value, address
