# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's instructions on the reverse map table: PVALIDATE, RMPADJUST, RMPQUERY.

They reach a page through the guest's own tables and the nested ones, so their operand is a gpa and
where the second stage leads it (`Leaf`).  Sources: AMD APM vol. 3, the instructions' pages, and
vol. 2, 15.36.6, 15.36.7, table 15-40; the answers to a guest at another size are the kernel's
words for them in ``sev_handle_rmp_fault`` (``arch/x86/kvm/svm/sev.c``); *ours* closes what those
leave open, towards a refusal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from hwemu.snp.check import Check, Fault, failing
from hwemu.snp.outcome import GuestFault, GuestStatus, NpfError, Returned, guest_fault
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import FULL, PAGE_SIZE, VMPLS, PageSize


@dataclass(frozen=True, slots=True)
class Vcpu:
    """Who executes: the ASID and VMPL of the VMSA, and the CPL."""

    asid: int
    vmpl: int = 0
    cpl: int = 0


@dataclass(frozen=True, slots=True)
class Leaf:
    """Where the second stage leads ``gpa`` (bytes): to frame ``pfn``.

    ``level`` is that of the second-stage entry, 1 for 4 KiB, 2 for 2 MiB, 3 for 1 GiB, which counts
    as 2; None if the host maps with whatever size the table has, as one that is in step with it.
    """

    gpa: int
    pfn: int
    level: int | None = None

    def large(self, rmp: Rmp) -> bool:
        """Whether the second-stage entry is one of 2 MiB or more."""
        if self.level is None:
            return rmp.covered(self.pfn) and rmp.entry(self.pfn).large
        return self.level > 1


@dataclass(frozen=True, slots=True)
class Asked:
    """One of the three instructions in question; what it does not have is 0."""

    rmp: Rmp
    vcpu: Vcpu
    leaf: Leaf
    size: int = PageSize.SIZE_4K
    validate: bool = False
    target: int = 0
    permissions: int = 0
    vmsa: bool = False


_G = GuestStatus
_SIZES = "APM table 15-40"

#: Whose page it is: first of every access to private memory too.
OWNED: Final[tuple[Check[Asked], ...]] = (
    Check(
        "the frame has an entry",
        Fault.NPF,
        lambda a: a.rmp.covered(a.leaf.pfn),
        "APM 15.36.10 RMP-Covered",
    ),
    Check(
        "the page is assigned to this guest",
        Fault.NPF,
        lambda a: (entry := a.rmp.entry(a.leaf.pfn)).assigned and entry.asid == a.vcpu.asid,
        "APM 15.36.10 Guest-Owned",
    ),
    Check(
        "the page belongs at this gpa",
        Fault.NPF,
        lambda a: a.rmp.gpa(a.leaf.pfn) == a.leaf.gpa - a.leaf.gpa % PAGE_SIZE,
        "APM 15.36.10 Reverse-Map",
    ),
    Check(
        "the page is not immutable",
        Fault.NPF,
        lambda a: not a.rmp.entry(a.leaf.pfn).immutable,
        "APM 15.36.10 Mutable",
    ),
)
_KERNEL_ONLY: Final[Check[Asked]] = Check(
    "CPL is 0", Fault.GP, lambda a: a.vcpu.cpl == 0, "APM vol. 3"
)
_SIZE: Final[Check[Asked]] = Check(
    "the page size is 4K or 2M, and a page of 2M begins at one",
    _G.FAIL_INPUT,
    lambda a: a.size in (0, 1) and a.leaf.gpa % (a.rmp.pages(a.size) * PAGE_SIZE) < PAGE_SIZE,
    "APM vol. 3",
)
_NESTED: Final[Check[Asked]] = Check(
    "a page of 2M is mapped by one of 2M or more",
    _G.FAIL_SIZEMISMATCH,
    lambda a: a.size == 0 or a.leaf.level is None or a.leaf.level > 1,
    "APM 15.36.6",
)
_WHOLE: Final[Check[Asked]] = Check(
    "a page of 2M is one in the table",
    _G.FAIL_SIZEMISMATCH,
    lambda a: a.size == 0 or a.rmp.entry(a.leaf.pfn).large,
    _SIZES,
)
_PART: Final[Check[Asked]] = Check(
    "a page of 4K is no part of a larger one, in the table or in the second stage",
    Fault.NPF_SIZEM,
    lambda a: a.size == 1 or not (a.rmp.entry(a.leaf.pfn).large or a.leaf.large(a.rmp)),
    f"{_SIZES}; APM 15.36.6",
)

PVALIDATE: Final[tuple[Check[Asked], ...]] = (
    Check(
        "CPL and VMPL are 0",
        Fault.GP,
        lambda a: a.vcpu.cpl == 0 and a.vcpu.vmpl == 0,
        "APM vol. 3 PVALIDATE",
    ),
    _SIZE,
    _NESTED,
    *OWNED,
    Check(
        "the page is not in use by another processor",
        Fault.NPF,
        lambda a: not _held(a),
        "APM 15.36.10: to be tried again",
    ),
    _WHOLE,
    _PART,
    Check(
        "Validated changes",
        _G.FAIL_NOUPDATE,
        lambda a: a.rmp.entry(a.leaf.pfn).validated != a.validate,
        "APM vol. 3 PVALIDATE: CF; kernel PVALIDATE_FAIL_NOUPDATE",
    ),
)

RMPADJUST: Final[tuple[Check[Asked], ...]] = (
    _KERNEL_ONLY,
    _SIZE,
    Check(
        "the target VMPL exists",
        _G.FAIL_INPUT,
        lambda a: 0 <= a.target < VMPLS,
        "APM vol. 3 RMPADJUST",
    ),
    Check(
        "the mask has no reserved bits",
        _G.FAIL_INPUT,
        lambda a: 0 <= a.permissions <= FULL,
        "APM table 15-36",
    ),
    Check(
        "the target VMPL is less privileged",
        _G.FAIL_PERMISSION,
        lambda a: a.target > a.vcpu.vmpl,
        "APM 15.36.7",
    ),
    _NESTED,
    *OWNED,
    _WHOLE,
    _PART,
    Check(
        "the page is validated",
        Fault.VC,
        lambda a: a.rmp.entry(a.leaf.pfn).validated,
        "APM 15.36.6",
    ),
    Check(
        "no permission is granted that this VMPL has not",
        _G.FAIL_PERMISSION,
        lambda a: not a.permissions & ~a.rmp.entry(a.leaf.pfn).permissions[a.vcpu.vmpl],
        "APM 15.36.7",
    ),
    Check(
        "the page is not in use",
        _G.FAIL_INUSE,
        lambda a: not _held(a),
        "APM 15.36.12: the VMSA of a running vCPU",
    ),
)

RMPQUERY: Final[tuple[Check[Asked], ...]] = (
    _KERNEL_ONLY,
    Check(
        "the target VMPL exists",
        _G.FAIL_INPUT,
        lambda a: 0 <= a.target < VMPLS,
        "APM vol. 3 RMPQUERY",
    ),
    Check(
        "the target VMPL is this one or less privileged",
        _G.FAIL_PERMISSION,
        lambda a: a.target >= a.vcpu.vmpl,
        "APM vol. 3 RMPQUERY",
    ),
    *OWNED,
)

#: What an instruction's own access is like: to a user page of the second stage, private.
_BITS: Final = NpfError.PRESENT | NpfError.USER | NpfError.FINAL | NpfError.ENC


def _held(asked: Asked) -> bool:
    rmp, pfn = asked.rmp, asked.rmp.page(asked.leaf.pfn)
    return rmp.held(pfn, rmp.pages(rmp.raw(pfn).size))


def _refusal(check: Check[Asked]) -> Returned | GuestFault:
    if isinstance(check.answer, Fault):
        return guest_fault(check.answer, check.must, _BITS)
    return Returned(GuestStatus(check.status), check.must)


def pvalidate(
    rmp: Rmp, vcpu: Vcpu, leaf: Leaf, size: int, *, validate: bool
) -> Returned | GuestFault:
    """Accept a page that the host has assigned, or take that back (``validate`` False)."""
    refused = failing(PVALIDATE, Asked(rmp, vcpu, leaf, size, validate))
    if refused:
        return _refusal(refused)
    page = rmp.page(leaf.pfn)
    rmp.store(page, replace(rmp.raw(page), validated=validate))
    return Returned(GuestStatus.SUCCESS)


def rmpadjust(
    rmp: Rmp,
    vcpu: Vcpu,
    leaf: Leaf,
    size: int,
    *,
    target: int,
    permissions: int,
    vmsa: bool = False,
) -> Returned | GuestFault:
    """Set the permissions of VMPL ``target``, and at VMPL0 whether the page is a VMSA.

    At another VMPL ``vmsa`` is ignored, as by hardware (``snp_set_vmsa`` in ``arch/x86/coco/sev``).
    """
    asked = Asked(rmp, vcpu, leaf, size, target=target, permissions=permissions, vmsa=vmsa)
    refused = failing(RMPADJUST, asked)
    if refused:
        return _refusal(refused)
    page = rmp.page(leaf.pfn)
    old = rmp.raw(page)
    masks = list(old.permissions)
    masks[target] = permissions
    zero, one, two, three = masks
    vmsa = vmsa if vcpu.vmpl == 0 else old.vmsa
    rmp.store(page, replace(old, permissions=(zero, one, two, three), vmsa=vmsa))
    return Returned(GuestStatus.SUCCESS)


@dataclass(frozen=True, slots=True)
class Query:
    """What RMPQUERY tells of a page: its size, and the target VMPL's permissions."""

    size: int
    permissions: int
    vmsa: bool


def rmpquery(rmp: Rmp, vcpu: Vcpu, leaf: Leaf, *, target: int) -> Query | Returned | GuestFault:
    """Read the permissions of VMPL ``target``."""
    refused = failing(RMPQUERY, Asked(rmp, vcpu, leaf, target=target))
    if refused:
        return _refusal(refused)
    entry = rmp.entry(leaf.pfn)
    return Query(entry.size, entry.permissions[target], entry.vmsa)


@dataclass(frozen=True, slots=True)
class PvalidateRegisters:
    """RCX and RDX of PVALIDATE."""

    size: int
    validate: bool

    @classmethod
    def decode(cls, rcx: int, rdx: int) -> PvalidateRegisters:
        """Read the registers; a size that does not exist stays, for FAIL_INPUT."""
        return cls(rcx & 0xFFFF_FFFF, bool(rdx & 1))


@dataclass(frozen=True, slots=True)
class RmpadjustRegisters:
    """RCX and RDX of RMPADJUST: VMPL in bits 7:0, mask in 15:8, VMSA in bit 16."""

    size: int
    target: int
    permissions: int
    vmsa: bool

    @classmethod
    def decode(cls, rcx: int, rdx: int) -> RmpadjustRegisters:
        """Read the registers."""
        return cls(rcx & 0xFFFF_FFFF, rdx & 0xFF, rdx >> 8 & 0xFF, bool(rdx >> 16 & 1))
