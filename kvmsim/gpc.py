# SPDX-License-Identifier: GPL-2.0-or-later
"""gfn_to_pfn_cache: a guest page that a device model keeps at hand, until it is taken away.

virt/kvm/pfncache.c (v6.18). A cache is *active* from activate to deactivate and *valid* while what
it found still holds. Every invalidation of its gfn makes it invalid before the bracket is left,
and so does any change of the slots; who wants to use it asks :meth:`GfnToPfnCache.check` under the
VM's lock each time, uses it under the same lock, and calls :meth:`refresh` where the answer is no.

One rule is stricter than KVM's, which follows the hva also where the guest made its gfn private
and then reads what nobody writes any more: here a private gfn is EFAULT.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Self

from kvmsim.effect import NeedPage, PageGrant, Retry, RetryReason
from kvmsim.memslot import Memslot
from kvmsim.mmu import Mmu
from kvmsim.uapi import EHWPOISON, PAGE_SHIFT, PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Refreshed:
    """0 and the host-physical address of the first byte, or -errno in ``errno`` (positive)."""

    errno: int
    hpa: int | None = None


GpcEffect = Refreshed | NeedPage | Retry
"""NeedPage: ask the owner, then ``page_arrived``. Retry: drop the lock, then ``refresh``."""


@dataclass(slots=True, eq=False)
class GfnToPfnCache:
    """A cache of ``length`` bytes at ``gpa``, without the shared bit, within one page."""

    gpa: int = 0
    length: int = 0
    active: bool = False
    hpa: int | None = None
    generation: int = -1
    snap: int = -1
    writable: bool = False

    @property
    def valid(self) -> bool:
        """Whether nothing has taken the page away; slots may still have changed."""
        return self.hpa is not None

    def activate(self, mmu: Mmu, gpa: int, length: int) -> GpcEffect:
        """kvm_gpc_activate(): from here on invalidations reach it; then a refresh.

        Only EINVAL leaves it inactive; after other errors a refresh may be tried again.
        """
        if not _fits(gpa, length):
            return Refreshed(errno.EINVAL)
        if not self.active:
            mmu.caches.append(self)
            self.active = True
        self.gpa, self.length, self.hpa = gpa, length, None
        return self.refresh(mmu)

    def deactivate(self, mmu: Mmu) -> None:
        """kvm_gpc_deactivate(): forget the page, and hear no more of it. Again is no error."""
        if self.active:
            mmu.caches.remove(self)
        self.active, self.hpa = False, None

    def check(self, mmu: Mmu, length: int | None = None, *, write: bool = False) -> bool:
        """kvm_gpc_check(): whether ``hpa`` may be used now, until the lock is dropped."""
        length = self.length if length is None else length
        return (
            self.active
            and self.hpa is not None
            and self.generation == mmu.slots.generation
            and (self.writable or not write)
            and _fits(self.gpa, length)
        )

    def refresh(self, mmu: Mmu, length: int | None = None) -> GpcEffect:
        """kvm_gpc_refresh(): look the page up again; EINVAL if inactive or across a page."""
        length = self.length if length is None else length
        if not self.active or not _fits(self.gpa, length):
            return Refreshed(errno.EINVAL)
        self.length = length
        if self.check(mmu):
            return Refreshed(0, self.hpa)
        self.hpa = None
        gfn = self.gpa >> PAGE_SHIFT
        self.snap = mmu.invalidate.seq
        slot = mmu.slots.find(gfn)
        if slot is None or mmu.is_private(gfn, slot):
            return Refreshed(errno.EFAULT)
        if mmu.invalidate.retry(gfn, self.snap):
            return Retry(RetryReason.IN_PROGRESS)
        if slot.whole:
            return self._ask(mmu, slot, gfn)
        hpa = None if slot.shared is None else slot.shared.hpa(slot.shared_page(gfn))
        return self._found(mmu, slot, hpa, writable=True)

    def page_arrived(self, mmu: Mmu, grant: PageGrant) -> GpcEffect:
        """Take what the owner granted, if the gfn still is what it was."""
        gfn = self.gpa >> PAGE_SHIFT
        slot = mmu.slots.find(gfn)
        if not self.active or mmu.invalidate.retry(gfn, self.snap) or slot is None:
            return Retry(RetryReason.INVALIDATED)
        page = slot.private_page(gfn)
        if grant.status or grant.file != slot.file or not grant.start <= page < grant.end:
            return Refreshed(grant.status or errno.EIO)
        start, end = mmu.backing.installable(grant.file, page, grant.start, grant.end, grant.seq)
        if not start <= page < end:
            return Retry(RetryReason.NEWER)
        hpa = mmu.backing.hpa(grant.instance, page)
        if hpa is None:
            return Retry(RetryReason.INSTANCE)
        return self._found(mmu, slot, hpa, writable=grant.writable)

    def invalidate(self, start: int, end: int) -> None:
        """gfn_to_pfn_cache_invalidate_start(): gfns [start, end) are being taken away."""
        if start <= self.gpa >> PAGE_SHIFT < end:
            self.hpa = None

    def key(self, mmu: Mmu) -> Hashable:
        """The whole state as a hashable value; counters by how far ``mmu`` has left them behind."""
        behind = (mmu.slots.generation - self.generation, mmu.invalidate.seq - self.snap)
        return (self.gpa, self.length, self.active, self.hpa, self.writable, behind)

    def copy(self, mmu: Mmu) -> Self:
        """A twin that belongs to a copied ``mmu``."""
        twin = replace(self)
        if twin.active:
            mmu.caches.append(twin)
        return twin

    def _ask(self, mmu: Mmu, slot: Memslot, gfn: int) -> GpcEffect:
        page = slot.private_page(gfn)
        if slot.file is None:
            return Refreshed(errno.EFAULT)
        if (slot.file, page) in mmu.poison:
            return Refreshed(EHWPOISON)
        return NeedPage(slot.file, page, page, page + 1, True)

    def _found(self, mmu: Mmu, slot: Memslot, hpa: int | None, *, writable: bool) -> GpcEffect:
        if hpa is None:
            return Refreshed(errno.EFAULT)
        self.hpa = hpa + self.gpa % PAGE_SIZE
        self.generation = mmu.slots.generation
        self.writable = writable and not slot.readonly
        return Refreshed(0, self.hpa)


def _fits(gpa: int, length: int) -> bool:
    """kvm_gpc_is_valid_len(): within one page, and not nothing."""
    return length > 0 and gpa % PAGE_SIZE + length <= PAGE_SIZE
