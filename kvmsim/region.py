# SPDX-License-Identifier: GPL-2.0-or-later
"""What KVM_SET_USER_MEMORY_REGION(2) may ask for: the request and every rule that refuses it.

Each rule is one row (errno, reason, test) of a table, in the order in which the kernel asks:
check_memory_region_flags() and kvm_set_memory_region() in virt/kvm/kvm_main.c, kvm_gmem_bind() in
virt/kvm/guest_memfd.c, kvm_arch_prepare_memory_region() in arch/x86/kvm/x86.c (v6.18).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol, Self

from kvmsim.uapi import (
    ABIS,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_MAX_NR_PAGES,
    KVM_MEM_READONLY,
    KVM_USER_MEM_SLOTS,
    PAGE_SHIFT,
    PAGE_SIZE,
    U64,
    USERSPACE_MEMORY_REGION,
    USERSPACE_MEMORY_REGION2,
    KvmError,
)

if TYPE_CHECKING:
    from kvmsim.memslot import Memslot, Memslots

_HVA_LIMIT: Final = (1 << 47) - PAGE_SIZE  # TASK_SIZE_MAX with four levels: access_ok()


class SharedSide(Protocol):
    """Ordinary memory that a slot's ``userspace_addr`` points into (KVM: the hva side)."""

    def hpa(self, page: int) -> int | None:
        """Host-physical address of page ``page`` (an address >> 12); None: nothing is there."""


@dataclass(frozen=True, slots=True)
class PrivateFile:
    """A private file that an fd was resolved to: its identity, its size in pages, its flags.

    ``flags`` are GUEST_MEMFD_FLAG_*. With MMAP every access of a slot goes through the file;
    where files convert ``in_place`` it does for any.
    """

    id: int
    npages: int
    flags: int = 0
    in_place: bool = False

    @property
    def whole(self) -> bool:
        """Whether it serves the shared side as well (KVM_MEMSLOT_GMEM_ONLY)."""
        return self.in_place or bool(self.flags & GUEST_MEMFD_FLAG_MMAP)


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
class Request:
    """A region with what its fd and address were resolved to, and the slots it meets."""

    region: Region
    old: Memslot | None
    file: PrivateFile | BadFd
    shared: SharedSide | None
    slots: Memslots
    v1: bool

    @property
    def private(self) -> bool:
        """Whether the slot asks for a private file."""
        return bool(self.region.flags & KVM_MEM_GUEST_MEMFD)

    @property
    def flags_changed(self) -> int:
        """The flags that differ from those of the slot as it is."""
        return 0 if self.old is None else self.region.flags ^ self.old.flags

    @property
    def gfns(self) -> tuple[int, int]:
        """The gfns [start, end)."""
        base = self.region.guest_phys_addr >> PAGE_SHIFT
        return base, base + (self.region.memory_size >> PAGE_SHIFT)

    @property
    def file_pages(self) -> tuple[int, int]:
        """The pages [start, end) of the private file."""
        first = self.region.guest_memfd_offset >> PAGE_SHIFT
        return first, first + (self.region.memory_size >> PAGE_SHIFT)

    @property
    def refused_flags(self) -> int:
        """The flags that this interface does not know, or not together."""
        kind, abi = self.slots.kind, ABIS[self.slots.abi]
        known = KVM_MEM_LOG_DIRTY_PAGES
        if not kind.protected_state:
            known |= KVM_MEM_READONLY
        if not self.v1 and (kind.private_memory or not abi.private_slot_needs_private_memory):
            known |= KVM_MEM_GUEST_MEMFD
        if self.private:
            known &= ~abi.private_slot_refuses
        return self.region.flags & ~known


_Check = tuple[int, str, Callable[[Request], object]]

# check_memory_region_flags() and the general sanity checks, for any change.
GENERAL: Final[tuple[_Check, ...]] = (
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

DELETE: Final[tuple[_Check, ...]] = (
    (errno.EINVAL, "no such slot to delete", lambda r: r.old is None),
)

MODIFY: Final[tuple[_Check, ...]] = (
    (
        errno.EINVAL,
        "a slot with a private file can only be deleted; delete it first",
        lambda r: r.private or (r.old is not None and r.old.has_file),
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
PLACE: Final[tuple[_Check, ...]] = (
    (
        errno.EEXIST,
        "gfns overlap another slot",
        lambda r: r.slots.overlaps(*r.gfns, but=r.region.slot),
    ),
)

BIND: Final[tuple[_Check, ...]] = (
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

ARCH: Final[tuple[_Check, ...]] = (
    (
        errno.EINVAL,
        "gfns reach the shared half, or beyond what the guest can address",
        lambda r: r.gfns[1] > r.slots.kind.max_gfn,
    ),
)


def refuse(checks: tuple[_Check, ...], request: Request) -> None:
    """Raise the first row of ``checks`` that refuses ``request``."""
    for number, reason, refused in checks:
        if refused(request):
            raise error(number, reason, request)


def error(number: int, reason: str, request: Request) -> KvmError:
    """The refusal as an exception, with the request's slot and range."""
    region = request.region
    return KvmError(
        number,
        "KVM_SET_USER_MEMORY_REGION" if request.v1 else "KVM_SET_USER_MEMORY_REGION2",
        reason,
        slot=region.slot,
        start=region.guest_phys_addr,
        size=region.memory_size,
    )
