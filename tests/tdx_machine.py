# SPDX-License-Identifier: GPL-2.0-or-later
"""A small TDX machine for tests: pages of bytes, and a TD that is ready in one call."""

from __future__ import annotations

from hwemu.tdx import TdxModule
from hwemu.tdx.fields import pack_params
from hwemu.tdx.pamt import PAGE_SIZE, Tdmr
from hwemu.tdx.td import ATTRIBUTE_DEBUG, TdParams

MIB, GIB = 1 << 20, 1 << 30
BASE = 4 * GIB  #: of the TDMR
SIZE = 64 * MIB
PARAMS, SOURCE = 0x10000, 0x20000  #: pages of the host's, in no TDMR


class Pages:
    """A memory of bytearrays by page; what was never written reads as 0xAA, not as zeros."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}

    def page(self, hpa: int) -> bytearray:
        return self.pages.setdefault(hpa // PAGE_SIZE, bytearray(b"\xaa" * PAGE_SIZE))

    def copy(self, source: int, target: int) -> None:
        self.page(target)[:] = self.page(source)

    def zero(self, hpa: int, npages: int) -> None:
        for at in range(hpa, hpa + npages * PAGE_SIZE, PAGE_SIZE):
            self.page(at)[:] = bytes(PAGE_SIZE)

    def read(self, hpa: int, size: int) -> bytes:
        at = hpa % PAGE_SIZE
        assert at + size <= PAGE_SIZE
        return bytes(self.page(hpa)[at : at + size])

    def write(self, hpa: int, data: bytes) -> None:
        at = hpa % PAGE_SIZE
        assert at + len(data) <= PAGE_SIZE
        self.page(hpa)[at : at + len(data)] = data


class Lab:
    """A module over one TDMR with its memory, and a pool of its pages that no one has yet."""

    def __init__(self, size: int = SIZE, **config: object) -> None:
        self.memory = Pages()
        self.module = TdxModule([Tdmr(BASE, size)], self.memory, **config)
        self._next = BASE

    def page(self, size: int = PAGE_SIZE) -> int:
        """Return a fresh page of the TDMR, aligned to its size."""
        hpa = -(-self._next // size) * size
        self._next = hpa + size
        return hpa

    def created(self, hkid: int = 32) -> int:
        """Return the TDR of a new TD with its key configured."""
        tdr = self.page()
        self.module.mng_create(tdr, hkid)
        config = self.module.config
        for package in range(config.packages):
            self.module.mng_key_config(tdr, lp=package * config.lps // config.packages)
        return tdr

    def initialised(self, params: TdParams | None = None, hkid: int = 32) -> int:
        """Return the TDR of a TD with which PAGE.ADD may begin."""
        tdr = self.created(hkid)
        for _ in range(self.module.config.tdcs_pages):
            self.module.mng_addcx(tdr, self.page())
        self.memory.write(PARAMS, pack_params(params or TdParams(max_vcpus=4)))
        self.module.mng_init(tdr, PARAMS)
        return tdr

    def with_vcpu(self, tdr: int, lp: int = 0) -> int:
        """Return the TDVPR of a new vCPU of an initialised TD, of processor ``lp``."""
        tdvpr = self.page()
        self.module.vp_create(tdr, tdvpr)
        for _ in range(self.module.config.tdvps_pages - 1):
            self.module.vp_addcx(tdvpr, self.page())
        self.module.vp_init(tdvpr, lp=lp)
        return tdvpr

    def tables(self, tdr: int, gpa: int, level: int = 0) -> None:
        """Add the S-EPT tables above an entry of ``level`` that are missing."""
        tree = self.module.td(tdr).tree
        for at in range(tree.top, level, -1):
            span = PAGE_SIZE << 9 * at
            if tree.walk(gpa, at).word & 7 == 0:
                self.module.mem_sept_add(tdr, gpa // span * span, at, self.page())

    def runnable(
        self, vcpus: int = 1, attributes: int = 0, hkid: int = 32
    ) -> tuple[int, list[int]]:
        """Return TDR and TDVPRs of a TD that runs; vCPU n is of processor n."""
        tdr = self.initialised(TdParams(attributes, max_vcpus=max(vcpus, 1)), hkid)
        made = [self.with_vcpu(tdr, lp) for lp in range(vcpus)]
        self.module.mr_finalize(tdr)
        return tdr, made

    def torn_down(self, tdr: int) -> None:
        """Tear the TD down and give every page of it back."""
        module = self.module
        td = module.td(tdr)
        for tdvpr, vcpu in list(td.vcpus.items()):
            if vcpu.lp is not None:
                module.vp_flush(tdvpr, lp=vcpu.lp)
        module.mng_vpflushdone(tdr)
        for package in range(module.config.packages):
            module.phymem_cache_wb(lp=package * module.config.lps // module.config.packages)
        module.mng_key_freeid(tdr)
        for hpa, _, _ in list(module.pamt.owned(td.owner)):
            module.phymem_page_reclaim(hpa)
        module.phymem_page_reclaim(tdr)


DEBUG = ATTRIBUTE_DEBUG
