# SPDX-License-Identifier: GPL-2.0-or-later
"""What a hypervisor does about #NPF with the RMP bit.

The decision of ``sev_handle_rmp_fault`` (``arch/x86/kvm/svm/sev.c``) as a value; a fault of another
type than the page's attribute (C-bit against private) never comes here, it is a memory fault for
user space.
"""

from __future__ import annotations

import enum

from hwemu.snp.guestops import Leaf
from hwemu.snp.outcome import NpfError
from hwemu.snp.rmp import Rmp


class Remedy(enum.Enum):
    """What makes the guest go on, or that nothing need be done."""

    ASSIGN = "RMPUPDATE: the page is not assigned yet"
    SMASH = "PSMASH, then zap the second-stage leaf"
    ZAP = "zap the second-stage leaf: it is larger than the page"
    RETRY = "run again: another vCPU has dealt with it"
    WRONG_PAGE = "the page is another's, or another address's: no remedy"


def remedy(rmp: Rmp, leaf: Leaf, asid: int, error: NpfError) -> Remedy:
    """Return what to do about a fault at ``leaf`` of the guest with ``asid``."""
    if not rmp.covered(leaf.pfn):
        return Remedy.WRONG_PAGE
    entry = rmp.entry(leaf.pfn)
    if not entry.assigned:
        return Remedy.ASSIGN
    mine = entry.asid == asid and not entry.immutable
    if not mine or rmp.gpa(leaf.pfn) != leaf.gpa - leaf.gpa % 4096:
        return Remedy.WRONG_PAGE
    if entry.large and (error & NpfError.SIZEM or not leaf.large(rmp)):
        return Remedy.SMASH
    if not entry.large and leaf.large(rmp):
        return Remedy.ZAP
    return Remedy.RETRY
