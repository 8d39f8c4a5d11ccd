# SPDX-License-Identifier: GPL-2.0-or-later
"""What pKVM writes down of a page: states, owners, entries; and how it refuses.

Numbers are those of arch/arm64/kvm/hyp/include/nvhe/memory.h (enum pkvm_page_state, struct
hyp_page), asm/kvm_pkvm.h and asm/kvm_pgtable.h of Linux 6.14 and later.
"""

from __future__ import annotations

import enum
import errno
from typing import Final

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT


class PageState(enum.IntEnum):
    """What one component is to a page; 2 bits. A page has one state for every component."""

    OWNED = 0  #: nobody else reaches it
    SHARED_OWNED = 1  #: its own, and lent to another
    SHARED_BORROWED = 2  #: another's, lent to this one
    NOPAGE = 3  #: out of reach


class Component(enum.IntEnum):
    """Who has states; the numbers are the owner ids in invalid host entries.

    enum pkvm_component_id; 2 is FF-A's, which is not modelled.
    """

    HOST = 0
    HYP = 1
    GUEST = 3


#: Bits of a stage-2 leaf (kvm_pgtable.h, DDI 0487 D8.3): the state lies in SW bits 55 and 56.
PTE_VALID: Final = 1 << 0
PTE_PAGE: Final = 1 << 1  #: at the last level; a block of the level above has it clear
PTE_S2AP_RW: Final = 3 << 6
PTE_AF: Final = 1 << 10
PTE_STATE_SHIFT: Final = 55
PTE_ADDRESS: Final = (1 << 48) - PAGE_SIZE
#: Where an invalid host entry names the owner: KVM_INVALID_PTE_OWNER_MASK, bits 9 to 2.
PTE_OWNER_SHIFT: Final = 2

#: pkvm.h: handles of VMs begin here, and there are as many (KVM_MAX_PVMS).
HANDLE_OFFSET: Final = 0x1000
MAX_VMS: Final = 255
#: hyp_page.order of a page that is in no pool of the hypervisor (HYP_NO_ORDER).
NO_ORDER: Final = 0xFF
#: hyp_page.host_share_guest_count is a u32, refcount a u16.
MAX_SHARES: Final = (1 << 32) - 1
MAX_REFERENCES: Final = (1 << 16) - 1


def leaf(pfn: int, state: PageState, *, block: bool = False) -> int:
    """A valid stage-2 leaf of one page, readable and writable."""
    kind = 0 if block else PTE_PAGE
    return pfn << PAGE_SHIFT | PTE_VALID | kind | PTE_S2AP_RW | PTE_AF | state << PTE_STATE_SHIFT


class PkvmError(Exception):
    """A transition that is refused; nothing has changed. ``errno`` is what the hypercall returns.

    ``str()`` names operation, object, range and state.
    """

    def __init__(self, number: int, what: str) -> None:
        self.errno = number
        super().__init__(f"{errno.errorcode.get(number, number)}: {what}")
