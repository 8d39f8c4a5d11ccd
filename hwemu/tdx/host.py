# SPDX-License-Identifier: GPL-2.0-or-later
"""The leaves of SEAMCALL by name: arguments into registers, nothing else.

Each returns the `Result` or raises `TdxError`, with nothing changed. ``tdr`` and ``tdvpr`` are the
addresses of a TD's and a vCPU's root page, ``hpa`` of another page; ``level`` is 0 for 4 KiB, 1
for 2 MiB, 2 for 1 GiB.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from hwemu.tdx.leaves import NUMBERS
from hwemu.tdx.result import Result


class Host(ABC):
    """Named leaves over `call`."""

    @abstractmethod
    def call(self, rax: int, *, lp: int = 0, **registers: int) -> Result:
        """Run a leaf by its registers."""

    def _leaf(self, name: str, **registers: int) -> Result:
        return self.call(NUMBERS[name], **registers)

    # -- life of a TD -----------------------------------------------------------------------------

    def mng_create(self, tdr: int, hkid: int) -> Result:
        """TDH.MNG.CREATE: the page ``tdr`` is a TD's root, its key is that of ``hkid``."""
        return self._leaf("TDH.MNG.CREATE", rcx=tdr, rdx=hkid)

    def mng_key_config(self, tdr: int, *, lp: int = 0) -> Result:
        """TDH.MNG.KEY.CONFIG on the package of ``lp``."""
        return self._leaf("TDH.MNG.KEY.CONFIG", rcx=tdr, lp=lp)

    def mng_addcx(self, tdr: int, hpa: int) -> Result:
        """TDH.MNG.ADDCX: one more page of the TD's control structure."""
        return self._leaf("TDH.MNG.ADDCX", rcx=hpa, rdx=tdr)

    def mng_init(self, tdr: int, params: int) -> Result:
        """TDH.MNG.INIT with the TD_PARAMS at ``params`` (see `hwemu.tdx.fields.pack_params`)."""
        return self._leaf("TDH.MNG.INIT", rcx=tdr, rdx=params)

    def mng_rd(self, tdr: int, field: int) -> Result:
        """TDH.MNG.RD: the field with id ``field`` in R8."""
        return self._leaf("TDH.MNG.RD", rcx=tdr, rdx=field)

    def mng_vpflushdone(self, tdr: int) -> Result:
        """TDH.MNG.VPFLUSHDONE: no vCPU may run any more."""
        return self._leaf("TDH.MNG.VPFLUSHDONE", rcx=tdr)

    def mng_key_freeid(self, tdr: int) -> Result:
        """TDH.MNG.KEY.FREEID: the TD is torn down, its HKID free."""
        return self._leaf("TDH.MNG.KEY.FREEID", rcx=tdr)

    def mr_extend(self, tdr: int, gpa: int) -> Result:
        """TDH.MR.EXTEND: measure the 256 bytes at ``gpa``."""
        return self._leaf("TDH.MR.EXTEND", rcx=gpa, rdx=tdr)

    def mr_finalize(self, tdr: int) -> Result:
        """TDH.MR.FINALIZE: the TD may run."""
        return self._leaf("TDH.MR.FINALIZE", rcx=tdr)

    # -- vCPUs ------------------------------------------------------------------------------------

    def vp_create(self, tdr: int, tdvpr: int) -> Result:
        """TDH.VP.CREATE: the page ``tdvpr`` is a vCPU's root."""
        return self._leaf("TDH.VP.CREATE", rcx=tdvpr, rdx=tdr)

    def vp_addcx(self, tdvpr: int, hpa: int) -> Result:
        """TDH.VP.ADDCX: one more page of the vCPU's control structure."""
        return self._leaf("TDH.VP.ADDCX", rcx=hpa, rdx=tdvpr)

    def vp_init(self, tdvpr: int, rcx: int = 0, *, lp: int = 0) -> Result:
        """TDH.VP.INIT; ``rcx`` is what the guest finds in RCX and R8."""
        return self._leaf("TDH.VP.INIT", rcx=tdvpr, rdx=rcx, lp=lp)

    def vp_enter(self, tdvpr: int, *, lp: int = 0) -> Result:
        """TDH.VP.ENTER: the vCPU runs on ``lp`` from here on."""
        return self._leaf("TDH.VP.ENTER", rcx=tdvpr, lp=lp)

    def vp_flush(self, tdvpr: int, *, lp: int = 0) -> Result:
        """TDH.VP.FLUSH on the processor that the vCPU is associated with."""
        return self._leaf("TDH.VP.FLUSH", rcx=tdvpr, lp=lp)

    # -- memory of a TD ---------------------------------------------------------------------------

    def mem_sept_add(self, tdr: int, gpa: int, level: int, hpa: int) -> Result:
        """TDH.MEM.SEPT.ADD: the page ``hpa`` is the table that the entry of ``level`` points to."""
        return self._leaf("TDH.MEM.SEPT.ADD", rcx=gpa | level, rdx=tdr, r8=hpa)

    def mem_sept_remove(self, tdr: int, gpa: int, level: int) -> Result:
        """TDH.MEM.SEPT.REMOVE; RCX = the page that was the table."""
        return self._leaf("TDH.MEM.SEPT.REMOVE", rcx=gpa | level, rdx=tdr)

    def mem_sept_rd(self, tdr: int, gpa: int, level: int) -> Result:
        """TDH.MEM.SEPT.RD; RCX and RDX = the entry, as errors show it."""
        return self._leaf("TDH.MEM.SEPT.RD", rcx=gpa | level, rdx=tdr)

    def mem_page_add(self, tdr: int, gpa: int, hpa: int, source: int) -> Result:
        """TDH.MEM.PAGE.ADD: ``hpa`` takes the content of the host's page ``source``."""
        return self._leaf("TDH.MEM.PAGE.ADD", rcx=gpa, rdx=tdr, r8=hpa, r9=source)

    def mem_page_aug(self, tdr: int, gpa: int, hpa: int, level: int = 0) -> Result:
        """TDH.MEM.PAGE.AUG: the guest may accept ``hpa`` at ``gpa``."""
        return self._leaf("TDH.MEM.PAGE.AUG", rcx=gpa | level, rdx=tdr, r8=hpa)

    def mem_page_remove(self, tdr: int, gpa: int, level: int = 0) -> Result:
        """TDH.MEM.PAGE.REMOVE; RCX = the page."""
        return self._leaf("TDH.MEM.PAGE.REMOVE", rcx=gpa | level, rdx=tdr)

    def mem_page_relocate(self, tdr: int, gpa: int, hpa: int) -> Result:
        """TDH.MEM.PAGE.RELOCATE to ``hpa``; RCX = the page it was in."""
        return self._leaf("TDH.MEM.PAGE.RELOCATE", rcx=gpa, rdx=tdr, r8=hpa)

    def mem_page_demote(self, tdr: int, gpa: int, level: int, hpa: int) -> Result:
        """TDH.MEM.PAGE.DEMOTE of a leaf of ``level``; ``hpa`` becomes the table of the 512."""
        return self._leaf("TDH.MEM.PAGE.DEMOTE", rcx=gpa | level, rdx=tdr, r8=hpa)

    def mem_page_promote(self, tdr: int, gpa: int, level: int) -> Result:
        """TDH.MEM.PAGE.PROMOTE to a leaf of ``level``; RCX = the page that was the table."""
        return self._leaf("TDH.MEM.PAGE.PROMOTE", rcx=gpa | level, rdx=tdr)

    def mem_range_block(self, tdr: int, gpa: int, level: int = 0) -> Result:
        """TDH.MEM.RANGE.BLOCK: no new translation through this entry."""
        return self._leaf("TDH.MEM.RANGE.BLOCK", rcx=gpa | level, rdx=tdr)

    def mem_range_unblock(self, tdr: int, gpa: int, level: int = 0) -> Result:
        """TDH.MEM.RANGE.UNBLOCK, once tracked."""
        return self._leaf("TDH.MEM.RANGE.UNBLOCK", rcx=gpa | level, rdx=tdr)

    def mem_track(self, tdr: int) -> Result:
        """TDH.MEM.TRACK: a new TLB epoch of the TD."""
        return self._leaf("TDH.MEM.TRACK", rcx=tdr)

    def mem_rd(self, tdr: int, gpa: int) -> Result:
        """TDH.MEM.RD of a debug TD; R8 = the 8 bytes."""
        return self._leaf("TDH.MEM.RD", rcx=gpa, rdx=tdr)

    def mem_wr(self, tdr: int, gpa: int, value: int) -> Result:
        """TDH.MEM.WR into a debug TD; R8 = the 8 bytes that were there."""
        return self._leaf("TDH.MEM.WR", rcx=gpa, rdx=tdr, r8=value)

    # -- physical memory --------------------------------------------------------------------------

    def phymem_page_reclaim(self, hpa: int) -> Result:
        """TDH.PHYMEM.PAGE.RECLAIM of a page of a TD in teardown."""
        return self._leaf("TDH.PHYMEM.PAGE.RECLAIM", rcx=hpa)

    def phymem_page_rdmd(self, hpa: int) -> Result:
        """TDH.PHYMEM.PAGE.RDMD: RCX = type, RDX = TDR, R8 = level, R9 = BEPOCH."""
        return self._leaf("TDH.PHYMEM.PAGE.RDMD", rcx=hpa)

    def phymem_page_wbinvd(self, hpa: int) -> Result:
        """TDH.PHYMEM.PAGE.WBINVD of a page that is free."""
        return self._leaf("TDH.PHYMEM.PAGE.WBINVD", rcx=hpa)

    def phymem_cache_wb(self, *, resume: bool = False, lp: int = 0) -> Result:
        """TDH.PHYMEM.CACHE.WB on the package of ``lp``."""
        return self._leaf("TDH.PHYMEM.CACHE.WB", rcx=int(resume), lp=lp)
