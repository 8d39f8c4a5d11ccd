# SPDX-License-Identifier: GPL-2.0-or-later
"""What pKVM answers, page by page, written from the prose of the kernel's documents.

An object a page and a list a guest; no tables, no arrays, and nothing of the model's code. A call
returns 0 or an errno, and with an errno nothing has changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from errno import E2BIG, EBUSY, EINVAL, ENOENT, ENOMEM, EPERM

OWNED, SHARED, BORROWED, NOPAGE = range(4)


@dataclass
class Page:
    """One page of memory. ``owner`` is "host", "hyp" or a guest's handle."""

    owner: object = "host"
    host: int = OWNED
    hyp: int = NOPAGE
    references: int = 0
    guests: int = 0  #: leaves of guests that it is lent to
    content: object = "host's"


@dataclass
class Slot:
    """What a guest has at a gfn."""

    pfn: int
    state: int
    block: bool


@dataclass
class Guest:
    """One VM."""

    protected: bool
    slots: list[Slot | None]
    dying: bool = False
    loaded: int = 0


@dataclass
class Predictor:
    """The whole machine."""

    pages: dict[int, Page]
    block: int
    max_vms: int
    max_shares: int
    guests: dict[int, Guest] = field(default_factory=dict)

    # -- VMs -------------------------------------------------------------------------------------

    def create_vm(self, npages: int, protected: bool) -> int:
        free = [h for h in range(0x1000, 0x1000 + self.max_vms) if h not in self.guests]
        if npages < 1:
            return EINVAL
        if not free:
            return ENOMEM
        self.guests[free[0]] = Guest(protected, [None] * npages)
        return 0

    def vcpu_load(self, handle: int) -> int:
        guest = self.guests.get(handle)
        if guest is None:
            return ENOENT
        if guest.dying:
            return EINVAL
        guest.loaded += 1
        return 0

    def vcpu_put(self, handle: int) -> int:
        guest = self.guests.get(handle)
        if guest is None:
            return ENOENT
        if guest.loaded == 0:
            return EINVAL
        guest.loaded -= 1
        return 0

    def start_teardown(self, handle: int) -> int:
        guest = self.guests.get(handle)
        if guest is None:
            return ENOENT
        if guest.dying:
            return EINVAL
        if guest.loaded > 0:
            return EBUSY
        guest.dying = True
        return 0

    def finalize_teardown(self, handle: int) -> int:
        guest = self.guests.get(handle)
        if guest is None:
            return ENOENT
        if not guest.dying or any(guest.slots):
            return EBUSY
        del self.guests[handle]
        return 0

    def teardown(self, handle: int) -> int:
        guest = self.guests.get(handle)
        refused = 0 if guest is not None and guest.dying else self.start_teardown(handle)
        if refused:
            return refused
        slots = self.guests[handle].slots
        for gfn, slot in enumerate(slots):
            if slot is not None:
                slots[gfn] = None
                self._back_to_host(slot)
        del self.guests[handle]
        return 0

    def _back_to_host(self, slot: Slot) -> None:
        page = self.pages[slot.pfn]
        if slot.state == BORROWED:  # it was the host's all the time
            page.guests -= 1
            if page.guests == 0:
                page.host = OWNED
            return
        if slot.state == OWNED:  # a secret until now
            page.content = 0
        page.owner, page.host = "host", OWNED

    # -- host to guest ---------------------------------------------------------------------------

    def _place(
        self, handle: int, pfn: int, gfn: int, npages: int, block: bool, protected: bool
    ) -> int:
        """Whether pages may come to a place at all."""
        guest = self.guests.get(handle)
        if guest is None:
            return ENOENT
        if guest.protected != protected or guest.dying:
            return EINVAL
        if block and (npages != self.block or pfn % self.block or gfn % self.block):
            return EINVAL
        if npages < 1 or any(p not in self.pages for p in range(pfn, pfn + npages)):
            return EINVAL
        if gfn < 0 or gfn + npages > len(guest.slots):
            return EINVAL
        return 0

    def host_donate_guest(self, handle: int, pfn: int, gfn: int, npages: int, block: bool) -> int:
        refused = self._place(handle, pfn, gfn, npages, block, True)
        if refused:
            return refused
        guest = self.guests[handle]
        pages = [self.pages[p] for p in range(pfn, pfn + npages)]
        if any(page.host != OWNED for page in pages):
            return EPERM
        if any(page.references for page in pages):
            return EBUSY
        if any(guest.slots[gfn : gfn + npages]):
            return EPERM
        for n, page in enumerate(pages):
            page.owner, page.host = handle, NOPAGE
            guest.slots[gfn + n] = Slot(pfn + n, OWNED, block)
        return 0

    def host_share_guest(self, handle: int, pfn: int, gfn: int, npages: int, block: bool) -> int:
        refused = self._place(handle, pfn, gfn, npages, block, False)
        if refused:
            return refused
        guest = self.guests[handle]
        pages = [self.pages[p] for p in range(pfn, pfn + npages)]
        if any(guest.slots[gfn : gfn + npages]):
            return EPERM
        for page in pages:  # the host's alone, or lent to guests only
            if page.host != OWNED and not (page.host == SHARED and page.guests):
                return EPERM
        if any(page.guests == self.max_shares for page in pages):
            return EBUSY
        for n, page in enumerate(pages):
            page.host = SHARED
            page.guests += 1
            guest.slots[gfn + n] = Slot(pfn + n, BORROWED, block)
        return 0

    def _slots(self, handle: int, gfn: int, npages: int, block: bool) -> list[Slot] | int:
        """What is mapped at a range, all of it in the same way; or why not."""
        guest = self.guests[handle]
        if npages < 1 or gfn < 0 or gfn + npages > len(guest.slots):
            return EINVAL
        found = guest.slots[gfn : gfn + npages]
        slots = [slot for slot in found if slot is not None]
        if len(slots) < len(found):
            return ENOENT
        if any(slot.block != block for slot in slots):
            return E2BIG
        return slots

    def host_unshare_guest(self, handle: int, gfn: int, npages: int, block: bool) -> int:
        guest = self.guests.get(handle)
        if guest is None:
            return ENOENT
        if guest.protected or (block and (npages != self.block or gfn % self.block)):
            return EINVAL
        slots = self._slots(handle, gfn, npages, block)
        if isinstance(slots, int):
            return slots
        if any(slot.state != BORROWED for slot in slots):
            return EPERM
        for n, slot in enumerate(slots):
            guest.slots[gfn + n] = None
            self._back_to_host(slot)
        return 0

    def host_reclaim_guest(self, handle: int, gfn: int, npages: int, block: bool) -> int:
        guest = self.guests.get(handle)
        if guest is None:
            return ENOENT
        if not guest.dying or (block and (npages != self.block or gfn % self.block)):
            return EINVAL
        slots = self._slots(handle, gfn, npages, block)
        if isinstance(slots, int):
            return slots
        if any(slot.state == BORROWED for slot in slots):
            return EPERM
        for n, slot in enumerate(slots):
            guest.slots[gfn + n] = None
            self._back_to_host(slot)
        return 0

    def host_move_guest(self, handle: int, pfn: int, gfn: int, npages: int, block: bool) -> int:
        refused = self._place(handle, pfn, gfn, npages, block, True)
        if refused:
            return refused
        slots = self._slots(handle, gfn, npages, block)
        if isinstance(slots, int):
            return slots
        fresh = [self.pages[p] for p in range(pfn, pfn + npages)]
        if any(page.host != OWNED for page in fresh):
            return EPERM
        if any(page.references for page in fresh):
            return EBUSY
        for n, slot in enumerate(slots):
            left = self.pages[slot.pfn]
            fresh[n].owner, fresh[n].host, fresh[n].content = handle, left.host, left.content
            left.owner, left.host, left.content = "host", OWNED, 0
            slot.pfn = pfn + n
        return 0

    def host_split_guest(self, handle: int, gfn: int) -> int:
        guest = self.guests.get(handle)
        if guest is None:
            return ENOENT
        if not 0 <= gfn < len(guest.slots):
            return EINVAL
        slot = guest.slots[gfn]
        if slot is None:
            return ENOENT
        if not slot.block:
            return EINVAL
        first = gfn // self.block * self.block
        for part in guest.slots[first : first + self.block]:
            assert part is not None
            part.block = False
        return 0

    # -- guest to host ---------------------------------------------------------------------------

    def _asked(self, handle: int, gfn: int, npages: int, state: int) -> list[Slot] | int:
        guest = self.guests.get(handle)
        if guest is None:
            return ENOENT
        if not guest.protected or guest.dying:
            return EINVAL
        slots = self._slots(handle, gfn, npages, False)
        if not isinstance(slots, int) and any(slot.state != state for slot in slots):
            return EPERM
        return slots

    def guest_share_host(self, handle: int, gfn: int, npages: int) -> int:
        slots = self._asked(handle, gfn, npages, OWNED)
        if isinstance(slots, int):
            return slots
        for slot in slots:
            slot.state, self.pages[slot.pfn].host = SHARED, BORROWED
        return 0

    def guest_unshare_host(self, handle: int, gfn: int, npages: int) -> int:
        slots = self._asked(handle, gfn, npages, SHARED)
        if isinstance(slots, int):
            return slots
        for slot in slots:
            slot.state, self.pages[slot.pfn].host = OWNED, NOPAGE
        return 0

    def guest_relinquish(self, handle: int, gfn: int, npages: int) -> int:
        slots = self._asked(handle, gfn, npages, OWNED)
        if isinstance(slots, int):
            return slots
        for n, slot in enumerate(slots):
            self.guests[handle].slots[gfn + n] = None
            self._back_to_host(slot)
        return 0

    # -- host and hypervisor ---------------------------------------------------------------------

    def _range(self, pfn: int, npages: int) -> list[Page]:
        if npages < 1 or any(p not in self.pages for p in range(pfn, pfn + npages)):
            return []
        return [self.pages[p] for p in range(pfn, pfn + npages)]

    def host_share_hyp(self, pfn: int, npages: int) -> int:
        pages = self._range(pfn, npages)
        if not pages:
            return EINVAL
        if any((page.host, page.hyp) != (OWNED, NOPAGE) for page in pages):
            return EPERM
        for page in pages:
            page.host, page.hyp = SHARED, BORROWED
        return 0

    def host_unshare_hyp(self, pfn: int, npages: int) -> int:
        pages = self._range(pfn, npages)
        if not pages:
            return EINVAL
        if any((page.host, page.hyp) != (SHARED, BORROWED) for page in pages):
            return EPERM
        if any(page.references for page in pages):
            return EBUSY
        for page in pages:
            page.host, page.hyp = OWNED, NOPAGE
        return 0

    def host_donate_hyp(self, pfn: int, npages: int) -> int:
        pages = self._range(pfn, npages)
        if not pages:
            return EINVAL
        if any(page.host != OWNED for page in pages):
            return EPERM
        if any(page.references for page in pages):
            return EBUSY
        for page in pages:
            page.owner, page.host, page.hyp = "hyp", NOPAGE, OWNED
        return 0

    def hyp_donate_host(self, pfn: int, npages: int) -> int:
        pages = self._range(pfn, npages)
        if not pages:
            return EINVAL
        if any(page.owner != "hyp" for page in pages):
            return EPERM
        for page in pages:
            page.owner, page.host, page.hyp, page.content = "host", OWNED, NOPAGE, 0
        return 0

    def pin(self, who: str, pfn: int, npages: int) -> int:
        if who == "guest":
            return EINVAL
        pages = self._range(pfn, npages)
        if not pages:
            return EINVAL
        wanted = (OWNED, NOPAGE) if who == "host" else (SHARED, BORROWED)
        if any((page.host, page.hyp) != wanted for page in pages):
            return EPERM
        if any(page.references == 0xFFFF for page in pages):
            return EBUSY
        for page in pages:
            page.references += 1
        return 0

    def unpin(self, pfn: int, npages: int) -> int:
        pages = self._range(pfn, npages)
        if not pages or any(page.references == 0 for page in pages):
            return EINVAL
        for page in pages:
            page.references -= 1
        return 0
