# SPDX-License-Identifier: GPL-2.0-or-later
"""An entry of the reverse map table: its fields, its 16 bytes, and the state that they mean.

Fields: AMD APM vol. 2, table 15-34.  The 16 bytes are those of the PPR of family 19h model 01h,
as ``struct rmpentry_raw`` in ``arch/x86/virt/svm/sev.c`` has them; the permission masks are the
first four bytes of the second word, one for each VMPL.  States: SEV-SNP firmware ABI (56860), page
states.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
#: Frames of a 2 MiB page; smaller in scaled-down worlds (see `hwemu.snp.rmp.Rmp`).
GROUP: Final = 512
VMPLS: Final = 4
GFN_BITS: Final = 39
ASID_BITS: Final = 10


class PageSize(enum.IntEnum):
    """``Page_Size`` of an entry and of the operands of instructions."""

    SIZE_4K = 0
    SIZE_2M = 1


class Permission(enum.IntFlag):
    """A VMPL permission mask (APM vol. 2, table 15-36; without supervisor shadow stacks)."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXECUTE_USER = 4
    EXECUTE_SUPERVISOR = 8


FULL: Final = 0xF
#: After RMPUPDATE (APM vol. 2, 15.36.7): everything for VMPL0, nothing for the others.
VMPL0_ONLY: Final = (FULL, 0, 0, 0)
NO_PERMISSIONS: Final = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Entry:
    """What the table says of one page.  ``gpa`` in bytes; ``size`` is `PageSize`."""

    assigned: bool = False
    size: int = PageSize.SIZE_4K
    immutable: bool = False
    gpa: int = 0
    asid: int = 0
    vmsa: bool = False
    validated: bool = False
    permissions: tuple[int, int, int, int] = NO_PERMISSIONS

    @property
    def large(self) -> bool:
        """Whether the page is one of 2 MiB."""
        return self.size == PageSize.SIZE_2M

    def __str__(self) -> str:
        if not self.assigned:
            return str(state_of(self))
        words = [
            f"{state_of(self)} asid {self.asid} gpa {self.gpa:#x} {'2M' if self.large else '4K'}"
        ]
        words += [f"vmpl{vmpl}={rwx(mask)}" for vmpl, mask in enumerate(self.permissions) if mask]
        return " ".join(words)


def rwx(mask: int) -> str:
    """Return a permission mask as four letters: read, write, execute user, execute supervisor."""
    return "".join(letter if mask >> bit & 1 else "-" for bit, letter in enumerate("rwus"))


#: (bit, width) of each field in the first word.
FIELDS: Final = {
    "assigned": (0, 1),
    "size": (1, 1),
    "immutable": (2, 1),
    "gpa": (12, GFN_BITS),
    "asid": (51, ASID_BITS),
    "vmsa": (61, 1),
    "validated": (62, 1),
}
_RAW: Final = struct.Struct("<Q4B4x")


def encode(entry: Entry) -> bytes:
    """Return the 16 bytes of an entry; ValueError if a field does not fit."""
    low = 0
    for name, (bit, width) in FIELDS.items():
        value = int(getattr(entry, name))
        if name == "gpa":
            value, rest = divmod(value, PAGE_SIZE)
            if rest:
                raise ValueError(f"RMP entry with gpa {entry.gpa:#x}: not a multiple of 4096")
        if not 0 <= value < 1 << width:
            raise ValueError(f"RMP entry with {name} {value:#x}: the field has {width} bits")
        low |= value << bit
    return _RAW.pack(low, *entry.permissions)


def decode(raw: bytes) -> Entry:
    """Return the entry that 16 bytes mean; ValueError for another length.

    Bits that are not fields (the count of small pages under a large one, the lock) are ignored.
    """
    if len(raw) != _RAW.size:
        raise ValueError(f"RMP entry of {len(raw)} bytes: an entry has 16")
    low, *masks = _RAW.unpack(raw)
    value = {name: low >> bit & (1 << width) - 1 for name, (bit, width) in FIELDS.items()}
    return Entry(
        assigned=bool(value["assigned"]),
        size=value["size"],
        immutable=bool(value["immutable"]),
        gpa=value["gpa"] << PAGE_SHIFT,
        asid=value["asid"],
        vmsa=bool(value["vmsa"]),
        validated=bool(value["validated"]),
        permissions=(masks[0], masks[1], masks[2], masks[3]),
    )


class PageState(enum.Enum):
    """What an entry means."""

    HYPERVISOR = "Hypervisor"
    HV_FIXED = "HV-Fixed"
    RECLAIM = "Reclaim"
    FIRMWARE = "Firmware"
    CONTEXT = "Context"
    METADATA = "Metadata"
    PRE_GUEST = "Pre-Guest"
    PRE_SWAP = "Pre-Swap"
    GUEST_INVALID = "Guest-Invalid"
    VMSA = "VMSA"
    GUEST_VALID = "Guest-Valid"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class StateRow:
    """The fields that make a state; None where it does not matter.

    ``guest`` is ASID > 0, ``gpa`` is GPA > 0.
    """

    state: PageState
    assigned: bool
    guest: bool
    immutable: bool
    validated: bool
    gpa: bool | None
    vmsa: bool | None
    meaning: str


_S = PageState
#: The first row that fits is the state.
STATES: Final = (
    StateRow(_S.HYPERVISOR, False, False, False, False, None, None, "the host's: shared memory"),
    StateRow(_S.HV_FIXED, False, False, True, False, None, None, "the host's for good"),
    StateRow(_S.RECLAIM, True, False, False, False, None, None, "given back by the AMD-SP"),
    StateRow(_S.FIRMWARE, True, False, True, False, False, False, "the AMD-SP's"),
    StateRow(_S.CONTEXT, True, False, True, False, False, True, "a guest's context page"),
    StateRow(_S.METADATA, True, False, True, False, True, None, "what is known of swapped pages"),
    StateRow(_S.PRE_GUEST, True, True, True, False, None, None, "lent to the AMD-SP to fill"),
    StateRow(_S.PRE_SWAP, True, True, True, True, None, None, "lent to the AMD-SP to move"),
    StateRow(_S.GUEST_INVALID, True, True, False, False, None, None, "a guest's, not accepted yet"),
    StateRow(_S.VMSA, True, True, False, True, None, True, "a vCPU's registers"),
    StateRow(_S.GUEST_VALID, True, True, False, True, None, False, "a guest's private memory"),
)


def state_of(entry: Entry) -> PageState:
    """Return what an entry means; ValueError if no row of `STATES` fits."""
    for row in STATES:
        if (
            row.assigned == entry.assigned
            and row.guest == (entry.asid > 0)
            and row.immutable == entry.immutable
            and row.validated == entry.validated
            and row.gpa in (None, entry.gpa > 0)
            and row.vmsa in (None, entry.vmsa)
        ):
            return row.state
    raise ValueError(f"RMP entry {encode(entry).hex()} is in no state")
