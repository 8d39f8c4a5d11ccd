# SPDX-License-Identifier: GPL-2.0-or-later
"""Memslots: which gfns have memory, and where its shared and its private side lie.

The algebra of KVM_SET_USER_MEMORY_REGION(2): create, delete, move, flags, and the binding of a
slot to a range of a private file. Every rule is one row of a table below, in the order in which
kvm_set_memory_region() and kvm_gmem_bind() ask (virt/kvm/kvm_main.c, guest_memfd.c, v6.18).
:meth:`Memslots.plan` only asks, :meth:`Memslots.apply` only does, so that a caller can zap what
the change takes away in between.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Protocol, Self

from kvmsim.uapi import (
    ABIS,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_MAX_NR_PAGES,
    KVM_MEM_READONLY,
    KVM_SET_USER_MEMORY_REGION,
    KVM_USER_MEM_SLOTS,
    PAGE_SHIFT,
    PAGE_SIZE,
    U64,
    USERSPACE_MEMORY_REGION,
    USERSPACE_MEMORY_REGION2,
    Abi,
    KvmError,
)

SHARED_BIT: Final = 1 << 39
"""The gpa bit that selects the shared side of a gfn, as TDX's SHARED bit does."""

MAX_GFN: Final = SHARED_BIT >> PAGE_SHIFT
"""First gfn that no slot may reach: above it a gfn would alias the shared side of another."""

_HVA_LIMIT: Final = (1 << 47) - PAGE_SIZE  # TASK_SIZE_MAX with four levels: access_ok()


class SharedSide(Protocol):
    """Ordinary memory that a slot's ``userspace_addr`` points into (KVM: the hva side)."""

    def hpa(self, page: int) -> int | None:
        """Host-physical address of page ``page`` (an address >> 12); None: nothing is there."""


@dataclass(frozen=True, slots=True)
class PrivateFile:
    """A private file that an fd was resolved to: its identity and its size in pages."""

    id: int
    npages: int


class BadFd(Enum):
    """What an fd was resolved to that no slot can be bound to."""

    CLOSED = "the private fd is not open"
    NOT_PRIVATE = "the private fd is not a private memory file"
    OTHER_VM = "the private file belongs to another VM"


@dataclass(frozen=True, slots=True)
class Region:
    """struct kvm_userspace_memory_region2, all in bytes; size 0 deletes the slot."""

    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int = 0
    guest_memfd_offset: int = 0
    guest_memfd: int = 0

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Decode 32 bytes (KVM_SET_USER_MEMORY_REGION) or 160 (…2, v7's _ext)."""
        if len(data) == USERSPACE_MEMORY_REGION.size:
            return cls(*USERSPACE_MEMORY_REGION.unpack(data))
        return cls(*USERSPACE_MEMORY_REGION2.unpack(data))

    def to_bytes(self) -> bytes:
        """Encode as 160 bytes; the first 32 are the older struct."""
        return USERSPACE_MEMORY_REGION2.pack(
            self.slot,
            self.flags,
            self.guest_phys_addr,
            self.memory_size,
            self.userspace_addr,
            self.guest_memfd_offset,
            self.guest_memfd,
        )


@dataclass(frozen=True, slots=True)
class Memslot:
    """One slot. Its private side is pages ``file_page`` … of ``file``; None: it has none."""

    id: int
    base_gfn: int
    npages: int
    flags: int
    userspace_addr: int
    shared: SharedSide | None = None
    file: int | None = None
    file_page: int = 0

    @property
    def end_gfn(self) -> int:
        """The gfn after the last."""
        return self.base_gfn + self.npages

    @property
    def readonly(self) -> bool:
        """Whether guest writes are MMIO instead (KVM_MEM_READONLY)."""
        return bool(self.flags & KVM_MEM_READONLY)

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


@dataclass(frozen=True, slots=True)
class _Request:
    """What the checks look at."""

    region: Region
    old: Memslot | None
    file: PrivateFile | BadFd
    shared: SharedSide | None
    slots: Memslots
    v1: bool

    @property
    def private(self) -> bool:
        return bool(self.region.flags & KVM_MEM_GUEST_MEMFD)

    @property
    def flags_changed(self) -> int:
        return 0 if self.old is None else self.region.flags ^ self.old.flags

    @property
    def gfns(self) -> tuple[int, int]:
        base = self.region.guest_phys_addr >> PAGE_SHIFT
        return base, base + (self.region.memory_size >> PAGE_SHIFT)

    @property
    def file_pages(self) -> tuple[int, int]:
        first = self.region.guest_memfd_offset >> PAGE_SHIFT
        return first, first + (self.region.memory_size >> PAGE_SHIFT)

    @property
    def refused_flags(self) -> int:
        known = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY
        if not self.v1:
            known |= KVM_MEM_GUEST_MEMFD
        if self.private:
            known &= ~ABIS[self.slots.abi].private_slot_refuses
        return self.region.flags & ~known


_Check = tuple[int, str, Callable[[_Request], object]]

# check_memory_region_flags() and the general sanity checks, for any change.
_GENERAL: Final[tuple[_Check, ...]] = (
    (
        errno.EINVAL,
        f"slot id must be below {KVM_USER_MEM_SLOTS}",
        lambda r: r.region.slot & 0xFFFF >= KVM_USER_MEM_SLOTS,
    ),
    (errno.EINVAL, "flags not supported here, or not together", lambda r: r.refused_flags),
    (errno.EINVAL, "size is not page-aligned", lambda r: r.region.memory_size % PAGE_SIZE),
    (
        errno.EINVAL,
        "guest address is not page-aligned",
        lambda r: r.region.guest_phys_addr % PAGE_SIZE,
    ),
    (
        errno.EINVAL,
        "userspace address is not page-aligned",
        lambda r: r.region.userspace_addr % PAGE_SIZE,
    ),
    (
        errno.EINVAL,
        "userspace range is not canonical",
        lambda r: r.region.userspace_addr + r.region.memory_size > _HVA_LIMIT,
    ),
    (
        errno.EINVAL,
        "offset in the private file is not page-aligned",
        lambda r: r.private and r.region.guest_memfd_offset % PAGE_SIZE,
    ),
    (
        errno.EINVAL,
        "offset in the private file + size wraps",
        lambda r: r.private and r.region.guest_memfd_offset + r.region.memory_size >= U64,
    ),
    (errno.EINVAL, "only address space 0 exists", lambda r: r.region.slot >> 16),
    (
        errno.EINVAL,
        "guest address + size wraps",
        # u64: a sum of exactly 2^64 is 0 and smaller than the address.
        lambda r: r.region.guest_phys_addr + r.region.memory_size >= U64,
    ),
    (
        errno.EINVAL,
        f"more than {KVM_MEM_MAX_NR_PAGES} pages",
        lambda r: r.region.memory_size >> PAGE_SHIFT > KVM_MEM_MAX_NR_PAGES,
    ),
)

_DELETE: Final[tuple[_Check, ...]] = (
    (errno.EINVAL, "no such slot to delete", lambda r: r.old is None),
)

_MODIFY: Final[tuple[_Check, ...]] = (
    (
        errno.EINVAL,
        "a slot with a private file can only be deleted; delete it first",
        lambda r: r.private or (r.old is not None and r.old.file is not None),
    ),
    (
        errno.EINVAL,
        "the userspace side of a slot cannot change; delete it first",
        lambda r: (
            r.old is not None
            and (r.region.userspace_addr != r.old.userspace_addr or r.shared is not r.old.shared)
        ),
    ),
    (
        errno.EINVAL,
        "the size of a slot cannot change; delete it first",
        lambda r: r.old is not None and r.region.memory_size >> PAGE_SHIFT != r.old.npages,
    ),
    (
        errno.EINVAL,
        "KVM_MEM_READONLY cannot change; delete the slot first",
        lambda r: r.flags_changed & KVM_MEM_READONLY,
    ),
)

# For CREATE and MOVE: kvm_check_memslot_overlap(), then kvm_gmem_bind(), then the architecture.
_PLACE: Final[tuple[_Check, ...]] = (
    (
        errno.EEXIST,
        "gfns overlap another slot",
        lambda r: r.slots.overlaps(*r.gfns, but=r.region.slot),
    ),
)

_BIND: Final[tuple[_Check, ...]] = (
    (
        errno.EINVAL,
        "private range is outside its file",
        lambda r: (
            ABIS[r.slots.abi].checks_file
            and isinstance(r.file, PrivateFile)
            and r.file_pages[1] > r.file.npages
        ),
    ),
    (
        errno.EINVAL,
        "private range is already bound to a slot",
        lambda r: (
            ABIS[r.slots.abi].checks_file
            and isinstance(r.file, PrivateFile)
            and next(r.slots.find_file(r.file.id, *r.file_pages), None) is not None
        ),
    ),
)

_ARCH: Final[tuple[_Check, ...]] = (
    (errno.EINVAL, "gfns reach the shared half", lambda r: r.gfns[1] > MAX_GFN),
)


class Memslots:
    """The slots of one VM (one address space), by id, by gfn and by file page."""

    __slots__ = ("_bases", "_by_base", "_by_file", "_by_id", "abi")

    def __init__(self, abi: Abi = "upstream") -> None:
        self.abi: Abi = abi
        self._by_id: dict[int, Memslot] = {}
        self._by_base: dict[int, Memslot] = {}
        self._bases: list[int] = []
        self._by_file: dict[int, list[tuple[int, int]]] = {}  # file: sorted (file_page, slot id)

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
        index = bisect_right(self._bases, gfn) - 1
        if index < 0:
            return None
        slot = self._by_base[self._bases[index]]
        return slot if gfn < slot.end_gfn else None

    def find_range(self, start: int, end: int) -> Iterator[tuple[Memslot, int, int]]:
        """The slots that meet gfns [start, end), each with the gfns clipped to it."""
        index = max(bisect_right(self._bases, start) - 1, 0)
        while index < len(self._bases) and self._bases[index] < end:
            slot = self._by_base[self._bases[index]]
            first, last = max(start, slot.base_gfn), min(end, slot.end_gfn)
            if first < last:
                yield slot, first, last
            index += 1

    def find_file(self, file: int, start: int, end: int) -> Iterator[tuple[Memslot, int, int]]:
        """The slots bound to pages [start, end) of ``file``, each with its gfns, clipped.

        A callback never sees a page outside its slot. v7 lets one page be in several slots.
        """
        bound = self._by_file.get(file, ())
        for file_page, slot_id in bound[: bisect_left(bound, (end, -1))]:
            slot = self._by_id[slot_id]
            first, last = max(start, file_page), min(end, file_page + slot.npages)
            if first < last:
                yield slot, slot.private_gfn(first), slot.private_gfn(last)

    def find_shared(
        self, side: SharedSide, start: int, end: int
    ) -> Iterator[tuple[Memslot, int, int]]:
        """The slots whose shared side is pages [start, end) of ``side``, with gfns, clipped."""
        for slot in self:
            if slot.shared is side:
                page = slot.shared_page(slot.base_gfn)
                first, last = max(start, page), min(end, page + slot.npages)
                if first < last:
                    yield slot, slot.base_gfn + first - page, slot.base_gfn + last - page

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
        request = _Request(region, old, file, shared, self, v1)
        _refuse(_GENERAL, request)
        if region.memory_size == 0:
            _refuse(_DELETE, request)
            return SlotChange(Change.DELETE, old, None)
        base, end = request.gfns
        if old is None:
            _refuse(_PLACE, request)
            new = Memslot(
                region.slot, base, end - base, region.flags, region.userspace_addr, shared
            )
            if request.private:
                new = replace(new, file=self._bind(request), file_page=request.file_pages[0])
            _refuse(_ARCH, request)
            return SlotChange(Change.CREATE, None, new)
        _refuse(_MODIFY, request)
        new = replace(old, base_gfn=base, flags=region.flags)
        if base != old.base_gfn:
            _refuse(_PLACE, request)
            _refuse(_ARCH, request)
            return SlotChange(Change.MOVE, old, new)
        return SlotChange(Change.FLAGS_ONLY if request.flags_changed else Change.NONE, old, new)

    def apply(self, change: SlotChange) -> None:
        """Do what :meth:`plan` found legal. Nothing may have been set in between."""
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

    def key(self) -> Hashable:
        """The whole state as a hashable value; a shared side counts as present or not."""
        return tuple(
            (s.id, s.base_gfn, s.npages, s.flags, s.userspace_addr, s.file, s.file_page)
            for s in self
        )

    def copy(self) -> Self:
        """An independent twin; slots are values and are not copied."""
        twin = type(self)(self.abi)
        twin._by_id, twin._by_base = self._by_id.copy(), self._by_base.copy()
        twin._bases = self._bases.copy()
        twin._by_file = {file: bound.copy() for file, bound in self._by_file.items()}
        return twin

    def _bind(self, request: _Request) -> int:
        """kvm_gmem_bind(): the file id, if the slot may be bound to it."""
        if isinstance(request.file, BadFd):
            closed = request.file is BadFd.CLOSED
            number = ABIS[self.abi].bad_fd_errno if closed else errno.EINVAL
            raise _error(number, request.file.value, request)
        _refuse(_BIND, request)
        return request.file.id

    def _insert(self, slot: Memslot) -> None:
        self._by_id[slot.id] = slot
        self._by_base[slot.base_gfn] = slot
        insort(self._bases, slot.base_gfn)
        if slot.file is not None:
            insort(self._by_file.setdefault(slot.file, []), (slot.file_page, slot.id))

    def _remove(self, slot: Memslot) -> None:
        del self._by_id[slot.id], self._by_base[slot.base_gfn]
        del self._bases[bisect_left(self._bases, slot.base_gfn)]
        if slot.file is not None:
            bound = self._by_file[slot.file]
            bound.remove((slot.file_page, slot.id))
            if not bound:
                del self._by_file[slot.file]


def _refuse(checks: tuple[_Check, ...], request: _Request) -> None:
    for number, reason, refused in checks:
        if refused(request):
            raise _error(number, reason, request)


def _error(number: int, reason: str, request: _Request) -> KvmError:
    region = request.region
    return KvmError(
        number,
        "KVM_SET_USER_MEMORY_REGION" if request.v1 else "KVM_SET_USER_MEMORY_REGION2",
        reason,
        slot=region.slot,
        start=region.guest_phys_addr,
        size=region.memory_size,
    )
