# SPDX-License-Identifier: GPL-2.0-or-later
"""What an access meets once the page tables have let it through (AMD APM vol. 2, table 15-39).

The tables are asked after all checks of paging, in their order: VMPL last, Validated before it.
Reads of the host, and reads of a guest with C-bit 0, are never stopped: of a page that a guest owns
they return ciphertext.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final, TypeAlias

from hwemu.snp.check import Check, Fault, failing
from hwemu.snp.guestops import OWNED, Asked, Leaf, Vcpu
from hwemu.snp.outcome import (
    GuestFault,
    HostPageFault,
    NpfError,
    PfError,
    guest_fault,
)
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import Permission


class Kind(enum.Enum):
    """What an access is; a page-table access may write (accessed and dirty bits)."""

    READ = "data read"
    WRITE = "data write"
    FETCH = "fetch"
    WALK = "page table"


class Granted(enum.Enum):
    """What an access that nothing stops gets to see."""

    PLAIN = "the contents"
    CIPHERTEXT = "ciphertext"


@dataclass(frozen=True, slots=True)
class HostAccess:
    """An access of the host to frame ``pfn`` through a mapping of ``level`` (1 4 KiB, 2 2 MiB)."""

    rmp: Rmp
    pfn: int
    kind: Kind
    level: int = 1
    user: bool = False


@dataclass(frozen=True, slots=True)
class GuestAccess:
    """An access of a guest; ``snp`` False is a guest without SNP (plain, SEV, SEV-ES).

    ``private`` is the C-bit of a data access; fetches and page-table accesses of an SNP guest are
    always private.
    """

    rmp: Rmp
    vcpu: Vcpu
    leaf: Leaf
    kind: Kind
    private: bool = True
    snp: bool = True

    @property
    def encrypted(self) -> bool:
        """The effective C-bit."""
        return self.snp and (self.private or self.kind in (Kind.FETCH, Kind.WALK))


def _all_hypervisors(rmp: Rmp, pfn: int, large: bool) -> bool:
    if large:
        return not rmp.assigned(rmp.first(pfn), rmp.group)
    return not rmp.assigned(pfn)


_OWNED_BY_HYPERVISOR: Final = "the page, of the mapping's size, is the hypervisor's"

HOST_WRITE: Final[tuple[Check[HostAccess], ...]] = (
    Check(
        _OWNED_BY_HYPERVISOR,
        Fault.PF,
        lambda a: _all_hypervisors(a.rmp, a.pfn, a.level > 1),
        "APM table 15-39, Hypervisor-Owned",
    ),
)

#: Writes with C-bit 0, and all writes of guests without SNP.
SHARED_WRITE: Final[tuple[Check[GuestAccess], ...]] = (
    Check(
        _OWNED_BY_HYPERVISOR,
        Fault.NPF,
        lambda a: _all_hypervisors(a.rmp, a.leaf.pfn, a.leaf.large(a.rmp)),
        "APM table 15-39, Hypervisor-Owned",
    ),
)

#: What each kind of access needs in the mask of its VMPL; a page-table access reads and writes.
NEEDS: Final = {
    Kind.READ: Permission.READ,
    Kind.WRITE: Permission.READ | Permission.WRITE,
    Kind.WALK: Permission.READ | Permission.WRITE,
}


def _permitted(access: GuestAccess) -> bool:
    mask = access.rmp.entry(access.leaf.pfn).permissions[access.vcpu.vmpl]
    if access.kind is Kind.FETCH:
        user = access.vcpu.cpl == 3
        need = Permission.EXECUTE_USER if user else Permission.EXECUTE_SUPERVISOR
        return bool(mask & need)
    if mask & Permission.WRITE and not mask & Permission.READ:
        return False
    return mask & NEEDS[access.kind] == NEEDS[access.kind]


def _of_access(check: Check[Asked]) -> Check[GuestAccess]:
    """The same row, asked of an access."""

    def holds(access: GuestAccess) -> bool:
        return check.holds(Asked(access.rmp, access.vcpu, access.leaf))

    return Check(check.must, check.answer, holds, check.source)


#: Accesses of an SNP guest to private memory.
PRIVATE: Final[tuple[Check[GuestAccess], ...]] = (
    *map(_of_access, OWNED),
    Check(
        "the second stage and the table have the same page size",
        Fault.NPF,
        lambda a: a.leaf.large(a.rmp) == a.rmp.entry(a.leaf.pfn).large,
        "APM table 15-39, Page-Size",
    ),
    Check(
        "the page is validated",
        Fault.VC,
        lambda a: a.rmp.entry(a.leaf.pfn).validated,
        "APM table 15-39, Validate",
    ),
    Check(
        "the mask of the VMPL permits it; one to write but not to read permits no data access",
        Fault.NPF_VMPL,
        _permitted,
        "APM tables 15-39 and 15-36, VMPL",
    ),
)


HostOutcome: TypeAlias = Granted | HostPageFault
GuestOutcome: TypeAlias = Granted | GuestFault


def _seen(rmp: Rmp, pfn: int) -> Granted:
    """What is seen without a guest's key; contents are encrypted for the guest that owns them."""
    guests = rmp.covered(pfn) and rmp.entry(pfn).asid > 0
    return Granted.CIPHERTEXT if guests else Granted.PLAIN


def host_access(access: HostAccess) -> HostOutcome:
    """Return what an access of the host ends in."""
    writes = access.kind in (Kind.WRITE, Kind.WALK)
    refused = failing(HOST_WRITE, access) if writes else None
    if refused is None:
        return _seen(access.rmp, access.pfn)
    error = PfError.PRESENT | PfError.WRITE | PfError.RMP
    return HostPageFault(error | (PfError.USER if access.user else PfError(0)), refused.must)


def guest_access(access: GuestAccess) -> GuestOutcome:
    """Return what an access of a guest ends in."""
    if access.encrypted:
        refused = failing(PRIVATE, access)
        if refused is None:
            return Granted.PLAIN
    else:
        writes = access.kind is Kind.WRITE or access.kind is Kind.WALK
        refused = failing(SHARED_WRITE, access) if writes else None
        if refused is None:
            return _seen(access.rmp, access.leaf.pfn)
    assert isinstance(refused.answer, Fault)
    return guest_fault(refused.answer, refused.must, _bits(access))


def _bits(access: GuestAccess) -> NpfError:
    """Bits of EXITINFO1 that describe the access; nested accesses are user accesses (15.25.5)."""
    bits = NpfError.PRESENT | NpfError.USER
    bits |= NpfError.WALK if access.kind is Kind.WALK else NpfError.FINAL
    if access.kind in (Kind.WRITE, Kind.WALK):
        bits |= NpfError.WRITE
    if access.kind is Kind.FETCH:
        bits |= NpfError.FETCH
    if access.encrypted:
        bits |= NpfError.ENC
    return bits
