# SPDX-License-Identifier: GPL-2.0-or-later
"""The hypervisor at EL2: it performs the transitions and keeps who owns what.

pfn and gfn count pages of 4 KiB. Every operation either is done whole or raises `PkvmError` and
changes nothing. Contents stay where they are: they are preserved by each transition but those
whose row says *zeroed*.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable, Sequence
from typing import Final, Self

import numpy as np

from hwemu.pkvm.engine import Engine, Machine, refuse, require, state_runs
from hwemu.pkvm.guest import VmTable
from hwemu.pkvm.state import MAX_REFERENCES, MAX_SHARES, MAX_VMS, Component, PageState, PkvmError
from hwemu.pkvm.transition import Deed
from hwemu.pkvm.vmemmap import Pages, Vmemmap

BLOCK_PAGES: Final = 512
"""Pages of a block, a leaf one level above the last (2 MiB)."""


class Hypervisor:
    """All of a machine's memory: ``memory`` are its ranges of pfns, of which ``hyp`` are EL2's own.

    ``block_pages`` and the limits are parameters for small worlds.
    """

    def __init__(
        self,
        machine: Machine,
        memory: Sequence[tuple[int, int]],
        hyp: Sequence[tuple[int, int]] = (),
        *,
        block_pages: int = BLOCK_PAGES,
        max_vms: int = MAX_VMS,
        max_shares: int = MAX_SHARES,
    ) -> None:
        self.vmemmap = Vmemmap(memory)
        self.vms = VmTable(max_vms)
        self._engine = Engine(machine, self.vmemmap, self.vms, block_pages, max_shares)
        for start, end in hyp:
            self.host_donate_hyp(start, end - start)

    # -- VMs -------------------------------------------------------------------------------------

    def create_vm(self, npages: int, *, protected: bool = True) -> int:
        """A VM with gfns [0, ``npages``); its handle (__pkvm_init_vm())."""
        return self.vms.insert(npages, protected=protected).handle

    def vcpu_load(self, handle: int) -> None:
        """A CPU loads a vCPU; EINVAL if the VM is dying (pkvm_load_hyp_vcpu())."""
        guest = self.vms.get("load vCPU", handle)
        if guest.dying:
            raise PkvmError(errno.EINVAL, f"load vCPU of VM {handle:#x}: it is dying")
        guest.loaded += 1

    def vcpu_put(self, handle: int) -> None:
        """And puts it; EINVAL if none is loaded."""
        guest = self.vms.get("put vCPU", handle)
        if not guest.loaded:
            raise PkvmError(errno.EINVAL, f"put vCPU of VM {handle:#x}: none is loaded")
        guest.loaded -= 1

    def start_teardown(self, handle: int) -> None:
        """From here on pages can be reclaimed (__pkvm_start_teardown_vm()).

        EBUSY while a vCPU is loaded, EINVAL if it is dying already.
        """
        guest = self.vms.get("start teardown", handle)
        what = f"start teardown of VM {handle:#x}"
        if guest.dying:
            raise PkvmError(errno.EINVAL, f"{what}: it is dying already")
        if guest.loaded:
            raise PkvmError(errno.EBUSY, f"{what}: {guest.loaded} vCPUs are loaded")
        guest.dying = True

    def finalize_teardown(self, handle: int) -> None:
        """Forget the VM; EBUSY before `start_teardown` and while it has pages."""
        guest = self.vms.get("finalize teardown", handle)
        what = f"finalize teardown of VM {handle:#x}"
        if not guest.dying:
            raise PkvmError(errno.EBUSY, f"{what}: teardown was not started")
        left = int(np.count_nonzero(guest.valid(0, guest.npages)))
        if left:
            raise PkvmError(errno.EBUSY, f"{what}: {left} pages are not reclaimed")
        self.vms.remove(guest)

    def teardown(self, handle: int) -> int:
        """What of it is not done yet; the pages that the host has back. Errors of the start."""
        guest = self.vms.get("teardown", handle)
        if not guest.dying:
            self.start_teardown(handle)
        given = 0
        for state, deed in _LAST:
            for gfn, npages in list(guest.runs(state)):
                self._engine.guest_pages(deed, guest, gfn, npages, block=None)
                given += npages
        self.finalize_teardown(handle)
        return given

    # -- host and guest --------------------------------------------------------------------------

    def host_donate_guest(
        self, handle: int, pfn: int, gfn: int, npages: int = 1, *, block: bool = False
    ) -> None:
        """What a fault of a protected guest leads to. ``block``: one large leaf."""
        self._engine.map_guest(Deed.HOST_DONATE_GUEST, handle, pfn, gfn, npages, block)

    def host_share_guest(
        self, handle: int, pfn: int, gfn: int, npages: int = 1, *, block: bool = False
    ) -> None:
        """The same for a guest that is not protected; a page may be lent to several."""
        self._engine.map_guest(Deed.HOST_SHARE_GUEST, handle, pfn, gfn, npages, block)

    def host_unshare_guest(
        self, handle: int, gfn: int, npages: int = 1, *, block: bool = False
    ) -> None:
        """Take lent pages from a guest. ``block`` must be what they are mapped by, else E2BIG."""
        guest = self._engine.guest(Deed.HOST_UNSHARE_GUEST, handle)
        self._engine.check_block("host unshares with guest", gfn, gfn, npages, block)
        self._engine.guest_pages(Deed.HOST_UNSHARE_GUEST, guest, gfn, npages, block=block)

    def host_reclaim_guest(
        self, handle: int, gfn: int, npages: int = 1, *, block: bool = False
    ) -> None:
        """Take the pages that a dying guest owned, zeroed unless the host could see them.

        EPERM for what was only lent to it.
        """
        guest = self._engine.guest(Deed.RECLAIM_OWNED, handle)
        self._engine.check_block("host reclaims", gfn, gfn, npages, block)
        self._engine.leaves("host reclaims", guest, gfn, npages, block)
        states = guest.states(gfn, npages)
        require("host reclaims", "guest", gfn, states, _RECLAIMABLE)
        for start, end, state in state_runs(states):
            deed = _RECLAIMABLE[state]
            self._engine.guest_pages(deed, guest, gfn + start, end - start, block=block)

    def host_move_guest(
        self, handle: int, pfn: int, gfn: int, npages: int = 1, *, block: bool = False
    ) -> None:
        """Put pages of the host in the place of a guest's, which stay its own with all that is in
        them; the old ones are the host's, zeroed. The guest may run.

        No kernel has such a call: it is made of what `host_donate_guest` and `host_reclaim_guest`
        do, and of a copy of EL2's.
        """
        guest = self._engine.guest(Deed.HOST_MOVE_OWNED, handle)
        self._engine.check_block("host moves", pfn, gfn, npages, block)
        rows = self._engine.memory_rows("host moves", pfn, npages)
        self._engine.replace(_MOVABLE, guest, gfn, rows, block=block)

    def host_split_guest(self, handle: int, gfn: int) -> None:
        """Map the block around ``gfn`` by pages, each with the block's state (Android).

        ENOENT if nothing is mapped, EINVAL if it is no block.
        """
        operation = "host splits block of guest"
        guest = self.vms.get(operation, handle)
        self._engine.check_gfns(operation, guest, gfn, 1)
        if not guest.valid(gfn, 1)[0]:
            raise PkvmError(errno.ENOENT, f"{operation} at gfn {gfn:#x}: not mapped")
        if not guest.blocks(gfn, 1)[0]:
            raise PkvmError(errno.EINVAL, f"{operation} at gfn {gfn:#x}: mapped by a page")
        size = self._engine.block_pages
        first = gfn - gfn % size
        state = PageState(int(guest.states(first, 1)[0]))
        guest.map(first, guest.pfns(first, size), state)
        self._engine.machine.flush_guest(handle, first, size)

    def guest_share_host(self, handle: int, gfn: int, npages: int = 1) -> None:
        """The guest opens its pages to the host. ENOENT: map them first; E2BIG: split first."""
        guest = self._engine.guest(Deed.GUEST_SHARE_HOST, handle)
        self._engine.guest_pages(Deed.GUEST_SHARE_HOST, guest, gfn, npages, block=False)

    def guest_unshare_host(self, handle: int, gfn: int, npages: int = 1) -> None:
        """And closes them, contents and all."""
        guest = self._engine.guest(Deed.GUEST_UNSHARE_HOST, handle)
        self._engine.guest_pages(Deed.GUEST_UNSHARE_HOST, guest, gfn, npages, block=False)

    def guest_relinquish(self, handle: int, gfn: int, npages: int = 1) -> None:
        """The guest gives pages back, for good; they are zeroed first."""
        guest = self._engine.guest(Deed.GUEST_RELINQUISH, handle)
        self._engine.guest_pages(Deed.GUEST_RELINQUISH, guest, gfn, npages, block=False)

    # -- host and hypervisor ---------------------------------------------------------------------

    def host_share_hyp(self, pfn: int, npages: int = 1) -> None:
        """Lend pages to EL2."""
        self._engine.host_pages(Deed.HOST_SHARE_HYP, pfn, npages)

    def host_unshare_hyp(self, pfn: int, npages: int = 1) -> None:
        """Take them back; EBUSY while EL2 has one pinned."""
        self._engine.host_pages(Deed.HOST_UNSHARE_HYP, pfn, npages)

    def host_donate_hyp(self, pfn: int, npages: int = 1) -> None:
        """Give pages to EL2."""
        self._engine.host_pages(Deed.HOST_DONATE_HYP, pfn, npages)

    def hyp_donate_host(self, pfn: int, npages: int = 1) -> None:
        """EL2 gives pages of its own back, zeroed."""
        self._engine.host_pages(Deed.HYP_DONATE_HOST, pfn, npages)

    def pin(self, who: Component, pfn: int, npages: int = 1) -> None:
        """Hold references, so that the pages stay as they are.

        EL2 pins what the host lent it (hyp_pin_shared_mem()), the host what it owns, for a device
        (__pkvm_host_use_dma(), Android). EPERM for other states, EBUSY at 65535 references.
        """
        operation = f"{who.name.lower()} pins"
        rows = self._engine.memory_rows(operation, pfn, npages)
        wanted = {
            Component.HOST: ((self.vmemmap.host_state, PageState.OWNED),),
            Component.HYP: (
                (self.vmemmap.host_state, PageState.SHARED_OWNED),
                (self.vmemmap.hyp_state, PageState.SHARED_BORROWED),
            ),
        }.get(who)
        if wanted is None:
            raise PkvmError(errno.EINVAL, f"{operation}: guests hold no references")
        for column, state in wanted:
            require(operation, "page", pfn, column[rows], (state,))
        refuse(
            errno.EBUSY,
            f"{operation}: all {MAX_REFERENCES} references are taken",
            pfn,
            self.vmemmap.refcount[rows] == MAX_REFERENCES,
        )
        self.vmemmap.refcount[rows] += np.uint16(1)

    def unpin(self, pfn: int, npages: int = 1) -> None:
        """Let go of references; EINVAL where there is none (hyp_unpin_shared_mem())."""
        rows = self._engine.memory_rows("unpin", pfn, npages)
        none = self.vmemmap.refcount[rows] == 0
        refuse(errno.EINVAL, "unpin: there is no reference", pfn, none)
        self.vmemmap.refcount[rows] -= np.uint16(1)

    def rows(self, operation: str, pfn: int, npages: int) -> Pages:
        """Rows of a range in the columns of ``vmemmap``; EINVAL unless all of it is memory."""
        return self._engine.memory_rows(operation, pfn, npages)

    # -- values ----------------------------------------------------------------------------------

    def key(self) -> Hashable:
        """The whole state as a hashable value; parameters are not in it."""
        return (self.vmemmap.key(), self.vms.key())

    def copy(self, machine: Machine) -> Self:
        """An independent twin on another machine."""
        twin = object.__new__(type(self))
        twin.vmemmap, twin.vms = self.vmemmap.copy(), self.vms.copy()
        old = self._engine
        twin._engine = Engine(machine, twin.vmemmap, twin.vms, old.block_pages, old.max_shares)
        return twin


_RECLAIMABLE: Final = {
    PageState.OWNED: Deed.RECLAIM_OWNED,
    PageState.SHARED_OWNED: Deed.RECLAIM_SHARED,
}
_MOVABLE: Final = {
    PageState.OWNED: Deed.HOST_MOVE_OWNED,
    PageState.SHARED_OWNED: Deed.HOST_MOVE_SHARED,
}
_LAST: Final = (*_RECLAIMABLE.items(), (PageState.SHARED_BORROWED, Deed.HOST_UNSHARE_GUEST))
