# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of an access: of the host to a page, of a guest to a gfn.

handle_host_mem_abort() and host_inject_abort() of arch/arm64/kvm/hyp/nvhe/mem_protect.c;
do_page_fault() of arch/arm64/mm/fault.c is who gets the abort.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from hwemu.pkvm.hypervisor import Hypervisor
from hwemu.pkvm.state import PAGE_SHIFT, PAGE_SIZE, Component, PageState


class Mode(enum.Enum):
    """In what the host was."""

    USER = "a program"
    UACCESS = "the kernel, with a fixup (copy_from_user() and its like)"
    KERNEL = "the kernel, without one"


class HostOutcome(enum.Enum):
    """What the host meets."""

    DONE = "the access is made"
    SIGSEGV = "abort injected: the program gets SIGSEGV"
    EFAULT = "abort injected: the fixup, and the call fails with EFAULT"
    OOPS = "abort injected: the kernel dies of it"


HOST_ACCESS: Final[Mapping[tuple[PageState, Mode], HostOutcome]] = MappingProxyType(
    {
        **{
            (state, mode): HostOutcome.DONE
            for state in PageState
            if state is not PageState.NOPAGE
            for mode in Mode
        },
        (PageState.NOPAGE, Mode.USER): HostOutcome.SIGSEGV,
        (PageState.NOPAGE, Mode.UACCESS): HostOutcome.EFAULT,
        (PageState.NOPAGE, Mode.KERNEL): HostOutcome.OOPS,
    }
)
"""By the host's state of the page. Stage 2 has no page that the host may only read."""


@dataclass(frozen=True, slots=True)
class Reached:
    """A guest's access goes to ``hpa``."""

    hpa: int


@dataclass(frozen=True, slots=True)
class Stage2Abort:
    """No leaf: the guest leaves to the host, which is to donate (``protected``) or share a page."""

    ipa: int
    protected: bool


@dataclass(frozen=True, slots=True)
class Outside:
    """Beyond the guest's memory: an access to a device, which the host emulates."""

    ipa: int


def host_access(hyp: Hypervisor, pfn: int, mode: Mode) -> HostOutcome:
    """One access of the host; `PkvmError` EINVAL if there is no memory."""
    return HOST_ACCESS[_host_states(hyp, pfn, 1)[0], mode]


def host_reaches(hyp: Hypervisor, pfn: int, npages: int) -> npt.NDArray[np.bool_]:
    """For each page of a range whether the host reaches it; EINVAL unless all are memory."""
    rows = hyp.rows("host access", pfn, npages)
    found: npt.NDArray[np.bool_] = hyp.vmemmap.host_state[rows] != PageState.NOPAGE
    return found


def _host_states(hyp: Hypervisor, pfn: int, npages: int) -> list[PageState]:
    rows = hyp.rows("host access", pfn, npages)
    return [PageState(state) for state in hyp.vmemmap.host_state[rows].tolist()]


def guest_access(hyp: Hypervisor, handle: int, ipa: int) -> Reached | Stage2Abort | Outside:
    """One access of a guest to ``ipa``, in bytes; `PkvmError` ENOENT if there is no such VM."""
    guest = hyp.vms.get("guest access", handle)
    gfn = ipa >> PAGE_SHIFT
    if not 0 <= gfn < guest.npages:
        return Outside(ipa)
    if not guest.valid(gfn, 1)[0]:
        return Stage2Abort(ipa, guest.protected)
    return Reached(int(guest.pfns(gfn, 1)[0]) << PAGE_SHIFT | ipa % PAGE_SIZE)


def owner(hyp: Hypervisor, pfn: int) -> tuple[Component, int]:
    """Whose a page is: the component, and of a guest its handle (else 0).

    The host's table tells: what it does not own names the owner in its invalid entry, and what is
    lent to it (SHARED_BORROWED) lies in the leaves of the one that lent it, so all are searched.
    """
    state = _host_states(hyp, pfn, 1)[0]
    row = pfn - hyp.vmemmap.first
    if state is PageState.NOPAGE:
        return Component(int(hyp.vmemmap.owner[row])), int(hyp.vmemmap.handle[row])
    if state is PageState.SHARED_BORROWED:
        for guest in hyp.vms:
            lent = guest.states(0, guest.npages) == PageState.SHARED_OWNED
            if (guest.pfns(0, guest.npages)[lent] == pfn).any():
                return Component.GUEST, guest.handle
        raise AssertionError(f"page {pfn:#x} is lent to the host by nobody")
    return Component.HOST, 0
