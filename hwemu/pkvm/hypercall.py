# SPDX-License-Identifier: GPL-2.0-or-later
"""What a protected guest asks of the hypervisor: HVC, registers x0 to x3 in, x0 to x3 out.

kvm_handle_pvm_hvc64() of arch/arm64/kvm/hyp/nvhe/pkvm.c and
Documentation/virt/kvm/arm/hypercalls.rst; MEM_RELINQUISH is of Android's common kernel. Calls are
SMCCC 1.1: an error is a negative number in x0.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from hwemu.pkvm.hypervisor import Hypervisor
from hwemu.pkvm.state import PAGE_SHIFT, PAGE_SIZE, PkvmError

SMCCC_RET_SUCCESS: Final = 0
SMCCC_RET_INVALID_PARAMETER: Final = -3

FEATURES: Final = 0x8600_0000
HYP_MEMINFO: Final = 0xC600_0002
MEM_SHARE: Final = 0xC600_0003
MEM_UNSHARE: Final = 0xC600_0004
MEM_RELINQUISH: Final = 0xC600_0009


class HostTask(enum.Enum):
    """Why the guest leaves to the host."""

    MAP = "map the page, for a store; the guest asks again"
    SPLIT = "map the block around it by pages; the guest asks again"
    HANDLE = "not a call of the hypervisor's"


@dataclass(frozen=True, slots=True)
class Returned:
    """The guest goes on behind the HVC; ``x0`` is signed."""

    x0: int
    x1: int = 0
    x2: int = 0
    x3: int = 0


@dataclass(frozen=True, slots=True)
class ToHost:
    """The guest leaves to the host. ``ipa`` in bytes; with MAP and SPLIT it returns to the HVC
    itself, as from a stage-2 abort (__pkvm_memshare_page_req()).
    """

    task: HostTask
    ipa: int = 0


Answer = Returned | ToHost

_INVALID: Final = Returned(SMCCC_RET_INVALID_PARAMETER)
_OK: Final = Returned(SMCCC_RET_SUCCESS)


def _features(hyp: Hypervisor, handle: int, arguments: tuple[int, int, int]) -> Answer:
    return Returned(sum(1 << (call & 0x7F) for call in CALLS))


def _meminfo(hyp: Hypervisor, handle: int, arguments: tuple[int, int, int]) -> Answer:
    return _INVALID if any(arguments) else Returned(PAGE_SIZE)


def _page(
    change: Callable[[Hypervisor, int, int], None], answers: Mapping[int, HostTask | Returned]
) -> Callable[[Hypervisor, int, tuple[int, int, int]], Answer]:
    """A call whose x1 is the ipa of a page, and what the errors of its transition mean."""

    def call(hyp: Hypervisor, handle: int, arguments: tuple[int, int, int]) -> Answer:
        ipa, *rest = arguments
        if any(rest) or ipa % PAGE_SIZE:
            return _INVALID
        try:
            change(hyp, handle, ipa >> PAGE_SHIFT)
        except PkvmError as refused:
            answer = answers.get(refused.errno, _INVALID)
            return ToHost(answer, ipa) if isinstance(answer, HostTask) else answer
        return _OK

    return call


CALLS: Final[Mapping[int, Callable[[Hypervisor, int, tuple[int, int, int]], Answer]]] = (
    MappingProxyType(
        {
            FEATURES: _features,
            HYP_MEMINFO: _meminfo,
            MEM_SHARE: _page(
                lambda hyp, *page: hyp.guest_share_host(*page),
                {errno.ENOENT: HostTask.MAP, errno.E2BIG: HostTask.SPLIT},
            ),
            MEM_UNSHARE: _page(
                lambda hyp, *page: hyp.guest_unshare_host(*page), {errno.E2BIG: HostTask.SPLIT}
            ),
            # what is not mapped was given back already
            MEM_RELINQUISH: _page(
                lambda hyp, *page: hyp.guest_relinquish(*page),
                {errno.ENOENT: _OK, errno.E2BIG: HostTask.SPLIT},
            ),
        }
    )
)


def hypercall(
    hyp: Hypervisor, handle: int, x0: int, x1: int = 0, x2: int = 0, x3: int = 0
) -> Answer:
    """Answer one HVC of a guest; all but a protected guest's go to the host as they are.

    Raises `PkvmError` (ENOENT, EINVAL) if there is no such VM or it is dying: no vCPU of it can
    run.
    """
    guest = hyp.vms.get("hypercall", handle)
    if guest.dying:
        raise PkvmError(errno.EINVAL, f"hypercall of VM {handle:#x}: it is dying")
    call = CALLS.get(x0 & 0xFFFF_FFFF)
    if call is None or not guest.protected:
        return ToHost(HostTask.HANDLE)
    return call(hyp, handle, (x1, x2, x3))
