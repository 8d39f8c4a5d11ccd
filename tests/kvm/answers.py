# SPDX-License-Identifier: GPL-2.0-or-later
"""What the experiments must see: measured on Linux 6.18 with a guest in ring 3.

The simulator has to answer the same, but for :data:`DIFFERENCES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

EXPECTED: Final[Mapping[str, Mapping[str, str]]] = {
    "what_a_file_may_be": {
        "size 0x0": "EINVAL",
        "size 0x1": "EINVAL",
        "size 0xfff": "EINVAL",
        "size 0x1000": "0",
        "size 0x1001": "EINVAL",
        "size -0x1000": "EINVAL",
        "size 0x10000000000": "0",
        "size 0x7fffffffffffffff": "EINVAL",
        "flags 0x0": "0",
        "flags 0x1": "0",
        "flags 0x2": "0",
        "flags 0x3": "0",
        "flags 0x4": "EINVAL",
        "flags 0x80000000": "EINVAL",
        "flags 0x8000000000000000": "EINVAL",
        "reserved words": "0",
        "of the system": "EINVAL",
        "bad pointer": "EFAULT",
    },
    "what_a_slot_may_be": {
        "as it should be": "0",
        "part of the file": "0",
        "no fd": "EBADF",
        "a memfd": "EINVAL",
        "the VM's fd": "EINVAL",
        "another VM's": "EINVAL",
        "past the end of the file": "EINVAL",
        "unaligned offset": "EINVAL",
        "negative offset": "EINVAL",
        "unaligned size": "EINVAL",
        "unaligned gpa": "EINVAL",
        "gpa that wraps": "EINVAL",
        "unaligned hva": "EINVAL",
        "hva of the kernel": "EINVAL",
        "last slot": "0",
        "one slot more": "EINVAL",
        "another address space": "EINVAL",
        "dirty log": "EINVAL",
        "read-only": "EINVAL",
        "unknown flag": "EINVAL",
        "delete what is not": "EINVAL",
        "through the first ioctl": "EINVAL",
        "the same again": "EINVAL",
        "move": "EINVAL",
        "smaller": "EINVAL",
        "another file": "EINVAL",
        "to a plain one": "EINVAL",
        "overlap": "EEXIST",
        "overlap, and past the end": "EEXIST",
        "file range twice": "EINVAL",
        "delete through the first ioctl": "0",
    },
    "allocate_punch_zero": {
        "allocate": "0",
        "allocated pages": "0x0 0x0",
        "store": "done",
        "load": "0x1111",
        "allocate again": "0",
        "load then": "0x1111",
        "punch": "0",
        "load at last": "0x0",
    },
    "store_punch_load": {
        "fill": "done",
        "filled": "0x2222 0x2222 0x2222 0x2222",
        "punch": "0",
        "punched": "0x2222 0x0 0x0 0x2222",
        "store": "done",
        "stored": "0x0 0x3333 0x0",
        "punch at the end of the file": "0",
        "punch across it": "0",
        "gone": "0x0 0x0",
    },
    "punch_from_another_process": {
        "fill": "done",
        "punch": "0",
        "punched": "0x4444 0x0 0x0 0x4444",
    },
    "remove_is_a_punch_and_dontneed_is_not": {
        "plain: fill": "done",
        "plain: MADV_DONTNEED": "0",
        "plain: kept": "0x5555 0x5555",
        "plain: MADV_REMOVE": "0",
        "plain: removed": "0x5555 0x0 0x5555",
        "mmap": "0",
        "guest_memfd: fill": "done",
        "guest_memfd: MADV_DONTNEED": "0",
        "guest_memfd: kept": "0x5555 0x5555",
        "guest_memfd: MADV_REMOVE": "0",
        "guest_memfd: removed": "0x5555 0x0 0x5555",
    },
    "the_host_sees_what_the_guest_stores": {
        "plain: load": "0x6666666666666666",
        "plain: store": "done",
        "plain: read": "7700000000000000",
        "mmap": "0",
        "load": "0x6666666666666666",
        "store": "done",
        "read": "7700000000000000",
    },
    "closing_the_last_fd": {
        "store": "done",
        "load": "MEMORY_FAULT shared +0x1000+0x1000 EFAULT",
        "another page": "MEMORY_FAULT shared +0x2000+0x1000 EFAULT",
        "store again": "MEMORY_FAULT shared +0x1000+0x1000 EFAULT",
        "delete": "0",
        "load without a slot": "MMIO read +0x1000+8",
    },
    "a_mapping_keeps_the_file_alive": {
        "mmap": "0",
        "store": "done",
        "load after close": "0xaa",
        "load after munmap": "MEMORY_FAULT shared +0x1000+0x1000 EFAULT",
    },
    "bytes_outlive_their_slot": {
        "fill": "done",
        "delete": "0",
        "load without a slot": "MMIO read +0x1000+8",
        "elsewhere": "0xbb 0xbb 0xbb",
        "back in another slot": "0xbb",
        "delete twice": "EINVAL",
    },
    "a_slot_begins_inside_its_file": {
        "first and last": "0xc4 0xcb",
        "past the slot": "MMIO read +0x8000+8",
        "punch": "0",
        "punched": "0xc4 0x0 0xc6",
        "punch of what no slot has": "0",
        "untouched": "0xc4 0xcb",
    },
    "neighbours_in_one_file": {
        "lower half": "0",
        "upper half": "0",
        "half again": "EINVAL",
        "across both": "EINVAL",
        "one page of it": "EINVAL",
        "same gpa": "EEXIST",
        "store below": "done",
        "store above": "done",
        "only the lower is punched": "0x0 0xd8",
        "a punch across both": "0x0 0x0",
    },
    "the_host_cannot_touch_what_is_not_shared": {
        "mmap": "0",
        "store": "done",
        "load": "0xe0",
        "read": "EFAULT",
        "write": "EFAULT",
        "read of what the guest stored": "EFAULT",
        "read of allocated memory": "EFAULT",
        "still the guest's": "0xe0",
    },
    "a_signal_ends_an_allocation": {
        "allocate": "EINTR",
        "kept": "some",
        "allocate again": "0",
        "punch": "0",
        "left": "0",
    },
    "pages_are_counted": {
        "new, allocated, stored, again, punched, loaded": "0 8 9 9 5 6",
        "st_size": "65536",
        "st_blksize": "4096",
        "st_blocks": "0",
    },
    "a_spinning_vcpu": {
        "punches": "InterruptedExit",
        "delete": "MMIO read +0x0+8",
        "close": "MEMORY_FAULT shared +0x0+0x1000 EFAULT",
    },
    "another_process": {
        "store": "done",
        "create": "EIO",
        "slot": "EIO",
        "registers": "EIO",
        "load": "0xab",
        "punch": "0",
        "punched": "0x0",
    },
}


class Difference(NamedTuple):
    """What the simulator answers instead; None: it is not asked, since nothing is mapped."""

    answer: str | None
    reason: str


_PRIVATE: Final = (
    "its memory is private (a SW_PROTECTED_VM with the attribute), where this kernel has only "
    "memory that is shared from birth"
)
_NO_MAPPING: Final = (
    _PRIVATE + ": its file is made without flags, and mmap(2) of it is ENODEV, as for flags 0"
)
_NO_SLOT: Final = (
    "an access to a private gfn without a slot is no MMIO (kvm_mmu_faultin_pfn() of "
    "arch/x86/kvm/mmu/mmu.c)"
)
_NO_INIT_SHARED: Final = (
    "nothing is shared from birth in a VM whose memory is private "
    "(kvm_arch_supports_gmem_init_shared())"
)
_BLOCKS: Final = "the kernel never counts blocks of a guest_memfd; a mount does, for du(1)"


def _fault(page: int) -> str:
    return f"MEMORY_FAULT private {page * 4096:+#x}+0x1000 EFAULT"


_UNMAPPED: Final = Difference("ENODEV", _NO_MAPPING)
_UNASKED: Final = Difference(None, _NO_MAPPING)

DIFFERENCES: Final[Mapping[str, Mapping[str, Difference]]] = {
    "what_a_file_may_be": {
        f"flags {flags:#x}": Difference("EINVAL", _NO_INIT_SHARED) for flags in (2, 3)
    },
    "remove_is_a_punch_and_dontneed_is_not": {
        "mmap": _UNMAPPED,
        "guest_memfd: fill": _UNASKED,
        "guest_memfd: MADV_DONTNEED": _UNASKED,
        "guest_memfd: kept": _UNASKED,
        "guest_memfd: MADV_REMOVE": _UNASKED,
        "guest_memfd: removed": _UNASKED,
    },
    "the_host_sees_what_the_guest_stores": {
        "mmap": _UNMAPPED,
        "load": _UNASKED,
        "store": _UNASKED,
        "read": _UNASKED,
    },
    "closing_the_last_fd": {
        "load": Difference(_fault(1), _PRIVATE),
        "another page": Difference(_fault(2), _PRIVATE),
        "store again": Difference(_fault(1), _PRIVATE),
        "load without a slot": Difference(_fault(1), _NO_SLOT),
    },
    "a_mapping_keeps_the_file_alive": {
        "mmap": _UNMAPPED,
        "store": _UNASKED,
        "load after close": _UNASKED,
        "load after munmap": _UNASKED,
    },
    "bytes_outlive_their_slot": {"load without a slot": Difference(_fault(1), _NO_SLOT)},
    "a_slot_begins_inside_its_file": {"past the slot": Difference(_fault(8), _NO_SLOT)},
    "pages_are_counted": {"st_blocks": Difference("48", _BLOCKS)},
    "a_spinning_vcpu": {
        "delete": Difference(_fault(0), _NO_SLOT),
        "close": Difference(_fault(0), _PRIVATE),
    },
}


#: The experiments that ask the simulator for files that the host may map.
MAPPABLE: Final = ("what_a_file_may_be", "the_host_cannot_touch_what_is_not_shared")


def expected(kind: str, name: str) -> dict[str, str]:
    """What experiment ``name`` must see on the device ``kind``: "real" or "simulated"."""
    answers: dict[str, str | None] = dict(EXPECTED[name])
    if kind == "simulated":
        answers |= {what: found.answer for what, found in DIFFERENCES.get(name, {}).items()}
    return {what: found for what, found in answers.items() if found is not None}
