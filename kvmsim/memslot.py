# SPDX-License-Identifier: GPL-2.0-or-later
"""Memslots: which gfns have memory, and where its shared and its private side lie.

The algebra of KVM_SET_USER_MEMORY_REGION(2): create, delete, move, flags, and the binding of a
slot to a range of a private file. What is refused stands in :mod:`kvmsim.region`.
:meth:`Memslots.plan` only asks, :meth:`Memslots.apply` only does, so that a caller can zap what
the change takes away in between.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Self

from kvmsim.kind import SHARED_BIT_KIND, VmKind
from kvmsim.rangeindex import RangeIndex
from kvmsim.region import (
    ARCH,
    BIND,
    DELETE,
    GENERAL,
    MODIFY,
    PLACE,
    BadFd,
    PrivateFile,
    Region,
    Request,
    SharedSide,
    error,
    refuse,
)
from kvmsim.sortedkeys import SortedKeys
from kvmsim.uapi import (
    ABIS,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_READONLY,
    KVM_SET_USER_MEMORY_REGION,
    PAGE_SHIFT,
    Abi,
)


@dataclass(frozen=True, slots=True)
class Memslot:
    """One slot. Its private side is pages ``file_page`` … of ``file``; None: it has none.

    ``whole``: the file serves shared accesses as well (KVM_MEMSLOT_GMEM_ONLY).
    """

    id: int
    base_gfn: int
    npages: int
    flags: int
    userspace_addr: int
    shared: SharedSide | None = None
    file: int | None = None
    file_page: int = 0
    whole: bool = False

    @property
    def end_gfn(self) -> int:
        """The gfn after the last."""
        return self.base_gfn + self.npages

    @property
    def readonly(self) -> bool:
        """Whether guest writes are MMIO instead (KVM_MEM_READONLY)."""
        return bool(self.flags & KVM_MEM_READONLY)

    @property
    def has_file(self) -> bool:
        """Whether it was made with a private file, which may be gone (kvm_slot_has_gmem())."""
        return bool(self.flags & KVM_MEM_GUEST_MEMFD)

    def shared_page(self, gfn: int) -> int:
        """The page of :attr:`shared` behind ``gfn``."""
        return (self.userspace_addr >> PAGE_SHIFT) + gfn - self.base_gfn

    def private_page(self, gfn: int) -> int:
        """The page of :attr:`file` behind ``gfn``."""
        return self.file_page + gfn - self.base_gfn

    def private_gfn(self, page: int) -> int:
        """The gfn in front of file page ``page``."""
        return self.base_gfn + page - self.file_page


class Change(Enum):
    """KVM_MR_*: what setting a region amounts to."""

    CREATE = "create"
    DELETE = "delete"
    MOVE = "move"
    FLAGS_ONLY = "flags"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class SlotChange:
    """A change that was found legal. ``old`` is None for CREATE, ``new`` for DELETE."""

    change: Change
    old: Memslot | None
    new: Memslot | None

    @property
    def taken(self) -> Memslot | None:
        """The slot whose mappings the change takes away, if it does."""
        return self.old if self.change in (Change.DELETE, Change.MOVE) else None


class Memslots:
    """The slots of one VM (one address space), by id, by gfn and by file page."""

    __slots__ = (
        "_bases",
        "_by_base",
        "_by_file",
        "_by_id",
        "_by_shared",
        "abi",
        "generation",
        "kind",
    )

    def __init__(self, abi: Abi = "upstream", kind: VmKind = SHARED_BIT_KIND) -> None:
        self.abi: Abi = abi
        self.kind: VmKind = kind
        self.generation = 0
        """Changes so far (kvm_memslots.generation); no part of the state."""
        self._by_id: dict[int, Memslot] = {}
        self._by_base: dict[int, Memslot] = {}
        self._bases: SortedKeys[int] = SortedKeys()
        self._by_file: dict[int, RangeIndex] = {}
        self._by_shared: dict[int, RangeIndex] = {}  # by id(), of what a slot keeps alive

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Memslot]:
        """All slots by ascending gfn."""
        return (self._by_base[base] for base in self._bases)

    def get(self, slot: int) -> Memslot | None:
        """The slot with this id."""
        return self._by_id.get(slot)

    def find(self, gfn: int) -> Memslot | None:
        """The slot that holds ``gfn`` (gfn_to_memslot())."""
        base = self._bases.floor(gfn)
        if base is None:
            return None
        slot = self._by_base[base]
        return slot if gfn < slot.end_gfn else None

    def find_range(self, start: int, end: int) -> Iterator[tuple[Memslot, int, int]]:
        """The slots that meet gfns [start, end), each with the gfns clipped to it."""
        before = self._bases.floor(start)
        for base in self._bases.since(start if before is None else before):
            if base >= end:
                return
            slot = self._by_base[base]
            first, last = max(start, base), min(end, slot.end_gfn)
            if first < last:
                yield slot, first, last

    def find_file(self, file: int, start: int, end: int) -> Iterator[tuple[Memslot, int, int]]:
        """The slots bound to pages [start, end) of ``file``, each with its gfns, clipped.

        A callback never sees a page outside its slot. v7 lets one page be in several slots.
        """
        bound = self._by_file.get(file)
        if bound is not None:
            for slot_id, first, last in bound.meeting(start, end):
                slot = self._by_id[slot_id]
                yield slot, slot.private_gfn(first), slot.private_gfn(last)

    def find_shared(
        self, side: SharedSide, start: int, end: int
    ) -> Iterator[tuple[Memslot, int, int]]:
        """The slots whose shared side is pages [start, end) of ``side``, with gfns, clipped.

        Not those that are served by their file alone: no leaf of theirs points there.
        """
        bound = self._by_shared.get(id(side))
        if bound is not None:
            for slot_id, first, last in bound.meeting(start, end):
                slot = self._by_id[slot_id]
                delta = slot.base_gfn - slot.shared_page(slot.base_gfn)
                yield slot, first + delta, last + delta

    def overlaps(self, start: int, end: int, *, but: int) -> bool:
        """Whether a slot other than ``but`` holds any of gfns [start, end)."""
        return any(slot.id != but for slot, _, _ in self.find_range(start, end))

    def plan(
        self,
        region: Region,
        *,
        shared: SharedSide | None = None,
        file: PrivateFile | BadFd = BadFd.CLOSED,
        v1: bool = False,
    ) -> SlotChange:
        """What setting ``region`` would do; KvmError if it is refused. Changes nothing.

        ``file`` is what ``region.guest_memfd`` stands for; it is looked at only if the flag is
        set. ``v1``: the older ioctl, which knows no private file upstream (in v7 it does).
        """
        v1 = v1 and ABIS[self.abi].region_ioctl != KVM_SET_USER_MEMORY_REGION
        old = self._by_id.get(region.slot)
        request = Request(region, old, file, shared, self, v1)
        refuse(GENERAL, request)
        if region.memory_size == 0:
            refuse(DELETE, request)
            return SlotChange(Change.DELETE, old, None)
        base, end = request.gfns
        if old is None:
            refuse(PLACE, request)
            bound = self._bind(request) if request.private else None
            refuse(ARCH, request)
            of_file: tuple[int | None, int, bool] = (None, 0, False)
            if bound is not None:
                of_file = (bound.id, request.file_pages[0], bound.whole)
            new = Memslot(
                region.slot, base, end - base, region.flags, region.userspace_addr, shared, *of_file
            )
            return SlotChange(Change.CREATE, None, new)
        refuse(MODIFY, request)
        new = replace(old, base_gfn=base, flags=region.flags)
        if base != old.base_gfn:
            refuse(PLACE, request)
            refuse(ARCH, request)
            return SlotChange(Change.MOVE, old, new)
        return SlotChange(Change.FLAGS_ONLY if request.flags_changed else Change.NONE, old, new)

    def apply(self, change: SlotChange) -> None:
        """Do what :meth:`plan` found legal. Nothing may have been set in between."""
        self.generation += 1
        if change.old is not None:
            self._remove(change.old)
        if change.new is not None:
            self._insert(change.new)

    def set(
        self,
        region: Region,
        *,
        shared: SharedSide | None = None,
        file: PrivateFile | BadFd = BadFd.CLOSED,
        v1: bool = False,
    ) -> SlotChange:
        """:meth:`plan` and :meth:`apply` in one."""
        change = self.plan(region, shared=shared, file=file, v1=v1)
        self.apply(change)
        return change

    def release(self, file: int) -> None:
        """The slots of ``file`` lose it; they stay slots with a private file, which is gone."""
        self.generation += 1
        for slot_id in self._by_file.pop(file, ()):
            slot = self._by_id[slot_id]
            orphan = replace(slot, file=None)
            self._by_id[slot_id] = self._by_base[slot.base_gfn] = orphan

    def key(self) -> Hashable:
        """The whole state as a hashable value; a shared side counts as present or not."""
        return tuple(
            (s.id, s.base_gfn, s.npages, s.flags, s.userspace_addr, s.file, s.file_page, s.whole)
            for s in self
        )

    def copy(self) -> Self:
        """An independent twin; slots are values and are not copied."""
        twin = type(self)(self.abi, self.kind)
        twin._by_id, twin._by_base = self._by_id.copy(), self._by_base.copy()
        twin._bases = self._bases.copy()
        twin.generation = self.generation
        twin._by_file = {file: bound.copy() for file, bound in self._by_file.items()}
        twin._by_shared = {side: bound.copy() for side, bound in self._by_shared.items()}
        return twin

    def _bind(self, request: Request) -> PrivateFile:
        """kvm_gmem_bind(): the file, if the slot may be bound to it."""
        if isinstance(request.file, BadFd):
            closed = request.file is BadFd.CLOSED
            number = ABIS[self.abi].bad_fd_errno if closed else errno.EINVAL
            raise error(number, request.file.value, request)
        refuse(BIND, request)
        return request.file

    def _insert(self, slot: Memslot) -> None:
        self._by_id[slot.id] = slot
        self._by_base[slot.base_gfn] = slot
        self._bases.add(slot.base_gfn)
        for indexes, of, page in self._indexed(slot):
            indexes.setdefault(of, RangeIndex()).add(page, slot.npages, slot.id)

    def _remove(self, slot: Memslot) -> None:
        del self._by_id[slot.id], self._by_base[slot.base_gfn]
        self._bases.remove(slot.base_gfn)
        for indexes, of, page in self._indexed(slot):
            indexes[of].remove(page, slot.npages, slot.id)
            if not indexes[of]:
                del indexes[of]

    def _indexed(self, slot: Memslot) -> Iterator[tuple[dict[int, RangeIndex], int, int]]:
        """Where the slot's two sides are found again: index, what of, first page."""
        if slot.file is not None:
            yield self._by_file, slot.file, slot.file_page
        if slot.shared is not None and not slot.whole:
            yield self._by_shared, id(slot.shared), slot.shared_page(slot.base_gfn)
