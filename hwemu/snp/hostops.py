# SPDX-License-Identifier: GPL-2.0-or-later
"""The hypervisor's instructions on the reverse map table: RMPUPDATE, PSMASH, RMPREAD.

Each is a table of checks in the order of the statuses, from the input to what is there already.
Sources: AMD APM vol. 3, the instructions' pages, and vol. 2, 15.36.5 and 15.36.11; *kernel* is
``arch/x86/virt/svm/sev.c``; *firmware* is how the AMD-SP tells its own pages apart (56860, page
states); *ours* closes what those leave open, towards a refusal.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Final

from hwemu.runs import equal_runs
from hwemu.snp.check import Check, failing
from hwemu.snp.outcome import PsmashStatus, Returned, RmpreadStatus, RmpupdateStatus
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import (
    GFN_BITS,
    NO_PERMISSIONS,
    PAGE_SHIFT,
    PAGE_SIZE,
    VMPL0_ONLY,
    Entry,
    PageSize,
)


@dataclass(frozen=True, slots=True)
class NewState:
    """The operand of RMPUPDATE (``struct rmp_state``): what a page shall be.  ``gpa`` in bytes."""

    assigned: bool = False
    size: int = PageSize.SIZE_4K
    immutable: bool = False
    gpa: int = 0
    asid: int = 0

    #: u64 gpa; u8 assigned, pagesize, immutable, rsvd; u32 asid.
    def pack(self) -> bytes:
        """Return the 16 bytes that RCX points at."""
        return _STATE.pack(self.gpa, self.assigned, self.size, self.immutable, self.asid)

    @classmethod
    def unpack(cls, raw: bytes) -> NewState:
        """Read the 16 bytes; ValueError for another length."""
        if len(raw) != _STATE.size:
            raise ValueError(f"RMPUPDATE operand of {len(raw)} bytes: it has 16")
        gpa, assigned, size, immutable, asid = _STATE.unpack(raw)
        return cls(bool(assigned & 1), size, bool(immutable & 1), gpa, asid)


_STATE: Final = struct.Struct("<QBBBxI")
HYPERVISOR: Final = NewState()


@dataclass(frozen=True, slots=True)
class Update:
    """An RMPUPDATE in question."""

    rmp: Rmp
    pfn: int
    new: NewState

    @property
    def npages(self) -> int:
        """Frames that the new page has."""
        return self.rmp.pages(self.new.size)

    @property
    def old(self) -> Entry:
        """What is written for the frame."""
        return self.rmp.raw(self.pfn)


_U = RmpupdateStatus
_RMPUPDATE = "APM vol. 3 RMPUPDATE"
RMPUPDATE: Final[tuple[Check[Update], ...]] = (
    Check(
        "the page size is 4K or 2M, and a page of 2M begins at one",
        _U.FAIL_INPUT,
        lambda u: u.new.size in (0, 1) and u.pfn % u.npages == 0,
        _RMPUPDATE,
    ),
    Check(
        "every frame of the page has an entry",
        _U.FAIL_INPUT,
        lambda u: u.rmp.covered(u.pfn, u.npages),
        "APM 15.36.4: others are the hypervisor's for good",
    ),
    Check(
        "the gpa is a multiple of the page size and below 2^51",
        _U.FAIL_INPUT,
        lambda u: (
            u.new.gpa % (u.npages * PAGE_SIZE) == 0
            and 0 <= u.new.gpa < 1 << (GFN_BITS + PAGE_SHIFT)
        ),
        _RMPUPDATE,
    ),
    Check(
        "the ASID exists",
        _U.FAIL_INPUT,
        lambda u: 0 <= u.new.asid <= u.rmp.max_asid,
        _RMPUPDATE,
    ),
    Check(
        "an unassigned page has ASID 0 and is not immutable",
        _U.FAIL_INPUT,
        lambda u: u.new.assigned or not (u.new.asid or u.new.immutable),
        "APM table 15-35; ours for the immutable bit",
    ),
    Check(
        "an assigned page with ASID 0 has gpa 0",
        _U.FAIL_INPUT,
        lambda u: not u.new.assigned or u.new.asid > 0 or u.new.gpa == 0,
        "ours: Metadata pages are made by the AMD-SP alone",
    ),
    Check(
        "the page is not immutable",
        _U.FAIL_PERMISSION,
        lambda u: not u.rmp.entry(u.pfn).immutable,
        "APM 15.36.5: ask the AMD-SP",
    ),
    Check(
        "no frame of the old or the new page is in use",
        _U.FAIL_INUSE,
        lambda u: not u.rmp.held(u.rmp.page(u.pfn), _span(u)),
        "APM 15.36.12: VMSA, VMCB and AVIC pages of a running vCPU",
    ),
    Check(
        "no assigned page of the other size overlaps",
        _U.FAIL_OVERLAP,
        lambda u: not u.rmp.other_size(u.pfn, u.new.size),
        "APM vol. 3 RMPUPDATE; kernel rmpupdate() asks again",
    ),
)


_STATES = (
    "56860, page states: RMPUPDATE makes Guest-Valid Pre-Swap. APM 15.36.6 clears Validated of a "
    "page that is assigned anew"
)
#: When all of it holds, nothing but Immutable changes, and RMPUPDATE clears nothing; the size is
#: as it was, for FAIL_OVERLAP would say otherwise.  We know of no sentence that says so; it is
#: implied by the states of the firmware ABI, as there is no other way to Pre-Swap, the state that
#: SNP_PAGE_MOVE and SNP_PAGE_SWAP_OUT want.  Published tools for attacks on SNP's encryption move
#: pages of running guests in this way, which costs these no validation.
KEPT: Final[tuple[Check[Update], ...]] = (
    Check("the page was a guest's before", _U.SUCCESS, lambda u: u.old.asid > 0, _STATES),
    Check("it was this guest's", _U.SUCCESS, lambda u: u.old.asid == u.new.asid, _STATES),
    Check("it belonged at this gpa", _U.SUCCESS, lambda u: u.old.gpa == u.new.gpa, _STATES),
)


def _span(update: Update) -> int:
    """Frames from the first of the old page to the last of the new and the old one."""
    rmp, page = update.rmp, update.rmp.page(update.pfn)
    return max(update.pfn + update.npages, page + rmp.pages(rmp.raw(page).size)) - page


def rmpupdate(rmp: Rmp, pfn: int, new: NewState) -> Returned:
    """Make a page what ``new`` says; a page that is assigned begins unvalidated.

    Success clears Validated, VMSA and every permission, and gives VMPL0 of a guest all of them
    (APM vol. 2, 15.36.6 and 15.36.7); but not where `KEPT` holds.
    """
    update = Update(rmp, pfn, new)
    refused = failing(RMPUPDATE, update)
    if refused:
        return Returned(RmpupdateStatus(refused.status), refused.must)
    kept = failing(KEPT, update) is None
    rmp.store(pfn, replace(update.old, immutable=new.immutable) if kept else _entry(new))
    return Returned(RmpupdateStatus.SUCCESS)


def _entry(new: NewState) -> Entry:
    if not new.assigned:
        return Entry()
    permissions = VMPL0_ONLY if new.asid else NO_PERMISSIONS
    return Entry(True, new.size, new.immutable, new.gpa, new.asid, permissions=permissions)


def rmpupdate_range(rmp: Rmp, pfn: int, npages: int, new: NewState) -> tuple[int, Returned]:
    """Make ``npages`` small pages what ``new`` says, with consecutive gpas for a guest.

    Returns how many are done and what stopped it.  What a loop of RMPUPDATE over the pages does,
    as a whole where nothing is in the way; ``new.size`` must be 4K (else ValueError).
    """
    if new.size != PageSize.SIZE_4K or npages < 0:
        raise ValueError(f"RMPUPDATE of {npages} pages at {pfn:#x}: of 4 KiB, and 0 or more")
    last = replace(new, gpa=new.gpa + (npages - 1) * PAGE_SIZE if new.asid else new.gpa)
    ends = ((pfn, new), (pfn + npages - 1, last))
    if rmp.plain(pfn, npages) and not any(failing(RMPUPDATE, Update(rmp, *end)) for end in ends):
        kept = rmp.holds(pfn, npages, new.asid, new.gpa)
        for start, end in equal_runs(kept):
            if kept[start]:
                rmp.freeze(pfn + start, end - start, immutable=new.immutable)
            else:
                gpa = new.gpa + start * PAGE_SIZE if new.asid else new.gpa
                rmp.store_run(pfn + start, end - start, _entry(replace(new, gpa=gpa)))
        return npages, Returned(RmpupdateStatus.SUCCESS)
    for done in range(npages):
        gpa = new.gpa + done * PAGE_SIZE if new.asid else new.gpa
        answer = rmpupdate(rmp, pfn + done, replace(new, gpa=gpa))
        if not answer.ok:
            return done, answer
    return npages, Returned(RmpupdateStatus.SUCCESS)


@dataclass(frozen=True, slots=True)
class Smash:
    """A PSMASH in question."""

    rmp: Rmp
    pfn: int


_P = PsmashStatus
_PSMASH = "APM vol. 3 PSMASH"
PSMASH: Final[tuple[Check[Smash], ...]] = (
    Check(
        "the address begins a page of 2M",
        _P.FAIL_INPUT,
        lambda s: s.pfn % s.rmp.group == 0,
        "APM 15.36.11",
    ),
    Check(
        "every frame of the page has an entry",
        _P.FAIL_INPUT,
        lambda s: s.rmp.covered(s.pfn, s.rmp.group),
        _PSMASH,
    ),
    Check(
        "the page is not immutable",
        _P.FAIL_PERMISSION,
        lambda s: not s.rmp.raw(s.pfn).immutable,
        _PSMASH,
    ),
    Check(
        "no frame of the page is in use",
        _P.FAIL_INUSE,
        lambda s: not s.rmp.held(s.pfn, s.rmp.group),
        "APM 15.36.12; kernel PSMASH_FAIL_INUSE",
    ),
    Check(
        "the page is assigned and of 2M",
        _P.FAIL_BADADDR,
        lambda s: s.rmp.raw(s.pfn).assigned and s.rmp.raw(s.pfn).large,
        _PSMASH,
    ),
)


def psmash(rmp: Rmp, pfn: int) -> Returned:
    """Break the page of 2 MiB at ``pfn`` into small ones; all else stays, Validated too."""
    refused = failing(PSMASH, Smash(rmp, pfn))
    if refused:
        return Returned(PsmashStatus(refused.status), refused.must)
    rmp.store_run(pfn, rmp.group, replace(rmp.raw(pfn), size=PageSize.SIZE_4K))
    return Returned(PsmashStatus.SUCCESS)


@dataclass(frozen=True, slots=True)
class Read:
    """What RMPREAD stores (``struct rmpentry`` in ``arch/x86/virt/svm/sev.c``).

    ``hpage_region``: an assigned page lies somewhere in the region of 2 MiB around the frame.
    """

    gpa: int
    assigned: bool
    size: int
    hpage_region: bool
    immutable: bool
    asid: int

    def pack(self) -> bytes:
        """Return the 16 bytes."""
        flags = self.size | self.hpage_region << 1
        return _STATE.pack(self.gpa, self.assigned, flags, self.immutable, self.asid)


RMPREAD: Final[tuple[Check[Smash], ...]] = (
    Check(
        "the frame has an entry",
        RmpreadStatus.FAIL_INPUT,
        lambda s: s.rmp.covered(s.pfn),
        "APM vol. 3 RMPREAD",
    ),
)


def rmpread(rmp: Rmp, pfn: int) -> Read | Returned:
    """Read the entry of a frame, that of a large page only at its first frame."""
    refused = failing(RMPREAD, Smash(rmp, pfn))
    if refused:
        return Returned(RmpreadStatus(refused.status), refused.must)
    entry = rmp.raw(pfn)
    region = rmp.assigned(rmp.first(pfn), rmp.group)
    return Read(entry.gpa, entry.assigned, entry.size, region, entry.immutable, entry.asid)
