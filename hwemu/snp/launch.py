# SPDX-License-Identifier: GPL-2.0-or-later
"""How a launch is measured: page types, PAGE_INFO and the launch digest.

The digest is a chain: SHA-384 over a PAGE_INFO that holds the digest so far (SEV-SNP firmware ABI
56860, SNP_LAUNCH_UPDATE, "PAGE_INFO structure").  A page of 2 MiB is measured as 512 small ones.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from hwemu.snp.rmpentry import PAGE_SIZE

DIGEST_SIZE: Final = 48
NO_DIGEST: Final = bytes(DIGEST_SIZE)
PAGE_INFO_SIZE: Final = 0x70
#: Where KVM says that a VMSA lies (``INITIAL_VMSA_GPA``); a matter of measurement, not of mapping.
VMSA_GPA: Final = 0xFFFF_FFFF_F000


class PageType(enum.IntEnum):
    """``PAGE_TYPE`` of SNP_LAUNCH_UPDATE; KVM_SEV_SNP_PAGE_TYPE_* has the same numbers."""

    NORMAL = 1
    VMSA = 2
    ZERO = 3
    UNMEASURED = 4
    SECRETS = 5
    CPUID = 6


@dataclass(frozen=True, slots=True)
class TypeRow:
    """What a page type means: what is hashed, what is left in the page, whether it may be 2 MiB."""

    hashed: bool
    leaves: str
    large: bool
    source: str = "56860 SNP_LAUNCH_UPDATE"


#: One row a type.
TYPES: Final = {
    PageType.NORMAL: TypeRow(True, "the contents, encrypted", True),
    PageType.VMSA: TypeRow(True, "the contents, encrypted; the VMSA bit", False),
    PageType.ZERO: TypeRow(False, "zeroes", True),
    PageType.UNMEASURED: TypeRow(False, "the contents, encrypted", True),
    PageType.SECRETS: TypeRow(False, "keys for guest messages", False),
    PageType.CPUID: TypeRow(False, "the CPUID table, if the AMD-SP agrees with it", False),
}

#: DIGEST_CUR, CONTENTS, LENGTH, PAGE_TYPE, IMI_PAGE, VMPL3..VMPL1 permissions, reserved, GPA.
_PAGE_INFO: Final = struct.Struct("<48s48sHBBBBBxQ")


@dataclass(frozen=True, slots=True)
class PageInfo:
    """A PAGE_INFO structure: what is hashed for one page of 4 KiB.  ``gpa`` in bytes."""

    digest: bytes
    contents: bytes
    page_type: int
    gpa: int
    imi: bool = False
    vmpl1: int = 0
    vmpl2: int = 0
    vmpl3: int = 0

    def pack(self) -> bytes:
        """Return the 0x70 bytes."""
        return _PAGE_INFO.pack(
            self.digest, self.contents, PAGE_INFO_SIZE, self.page_type, self.imi,
            self.vmpl3, self.vmpl2, self.vmpl1, self.gpa,
        )  # fmt: skip

    def extended(self) -> bytes:
        """Return the launch digest after this page, 48 bytes."""
        return hashlib.sha384(self.pack()).digest()


def contents_digest(page_type: PageType, page: bytes) -> bytes:
    """Return CONTENTS of a page of this type: its SHA-384, or zeroes if it is not hashed.

    A VMSA is hashed as if GUEST_TSC_SCALE and GUEST_TSC_OFFSET (at 0x2f0 and 0x2f8) were 0.
    """
    if len(page) != PAGE_SIZE:
        raise ValueError(f"launch digest of {len(page)} bytes: a page has {PAGE_SIZE}")
    if not TYPES[page_type].hashed:
        return NO_DIGEST
    if page_type is PageType.VMSA:
        page = page[:0x2F0] + bytes(16) + page[0x300:]
    return hashlib.sha384(page).digest()
