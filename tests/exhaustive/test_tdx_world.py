# SPDX-License-Identifier: GPL-2.0-or-later
"""Every order of leaves and guest accesses in small TDX worlds, with a TLB that never forgets.

The TLB of a vCPU keeps what it was filled with until the module says FlushTlb. What a vCPU that
runs holds must be what the S-EPT maps now, and belong to its TD; no page has two owners; and from
every state the host can get all pages back. Each rule of TLB tracking that is switched off must
be found: that is the test of these tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from tdx_machine import BASE, PARAMS, Pages

from hwemu.tdx import TdxError, TdxModule
from hwemu.tdx.checks import CHECKS
from hwemu.tdx.entry import LEAVES
from hwemu.tdx.fields import pack_params
from hwemu.tdx.leaves import Check
from hwemu.tdx.pamt import PAGE_SIZE, PageType, Tdmr
from hwemu.tdx.result import FlushTlb, NoMemory, Translation
from hwemu.tdx.states import LifeCycle
from hwemu.tdx.td import Td, TdParams
from privfs.testing import Report, explore

pytestmark = pytest.mark.exhaustive

GPA = 0x1000
Tlb = frozenset[tuple[int, int]]  # (gpa, hpa)


@dataclass(frozen=True)
class Shape:
    """How large a world is, and whether its TDs may be torn down."""

    tds: int
    vcpus: int
    pages: int
    teardown: bool = False
    sept: bool = False  # the table of 4 KiB entries may be blocked and removed too


@dataclass
class World:
    shape: Shape
    module: TdxModule
    tdrs: list[int]
    vcpus: list[tuple[int, int]]  # (TDVPR, TDR)
    pages: list[int]
    table: int
    tlb: dict[int, Tlb] = field(default_factory=dict)
    spare: TdxModule | None = None

    # -- events -----------------------------------------------------------------------------------

    def events(self) -> Iterator[tuple]:
        for tdr in self.tdrs:
            if tdr not in self.module.tds:
                continue
            td = self.module.td(tdr)
            if td.life_cycle is LifeCycle.KEYS_CONFIGURED:
                yield "block", tdr
                yield "unblock", tdr
                yield "remove", tdr
                yield "track", tdr
                for page in self.pages:
                    yield "aug", tdr, page
                    yield "relocate", tdr, page
                if self.shape.sept:
                    yield "block table", tdr
                    yield "unblock table", tdr
                    yield "remove table", tdr
                    yield "add table", tdr
            if self.shape.teardown:
                yield "vpflushdone", tdr
                yield "wb", tdr
                yield "freeid", tdr
                yield "reclaim", tdr
        for tdvpr, tdr in self.vcpus:
            if tdvpr not in self.module.vcpus:
                continue
            if self.module.vcpu(tdvpr).running:
                yield "exit", tdvpr, tdr
                yield "accept", tdvpr, tdr
                yield "store", tdvpr, tdr
            else:
                yield "enter", tdvpr, tdr
                if self.shape.teardown:
                    yield "flush", tdvpr, tdr

    def step(self, event: tuple) -> World | None:
        # a refused leaf changes nothing, so that its module serves for the next event
        module = self.spare or self.module.copy()
        after = replace(self, module=module, tlb=dict(self.tlb), spare=None)
        try:
            after.do(*event)
        except TdxError:
            self.spare = module
            return None
        self.spare = None
        return after

    def do(self, what: str, who: int, other: int = 0) -> None:
        module = self.module
        match what:
            case "block":
                module.mem_range_block(who, GPA)
            case "unblock":
                module.mem_range_unblock(who, GPA)
            case "remove":
                module.mem_page_remove(who, GPA)
            case "track":
                module.mem_track(who)
            case "aug":
                module.mem_page_aug(who, GPA, other)
            case "relocate":
                module.mem_page_relocate(who, GPA, other)
            case "block table":
                module.mem_range_block(who, 0, 1)
            case "unblock table":
                module.mem_range_unblock(who, 0, 1)
            case "remove table":
                module.mem_sept_remove(who, 0, 1)
            case "add table":
                module.mem_sept_add(who, 0, 1, self.table)
            case "vpflushdone":
                module.mng_vpflushdone(who)
            case "wb":
                module.phymem_cache_wb()
            case "freeid":
                module.mng_key_freeid(who)
            case "reclaim":
                owned = list(module.pamt.owned(who >> 12))
                module.phymem_page_reclaim(owned[0][0] if owned else who)
            case "enter":
                self.flushed(module.vp_enter(who).effects)
            case "flush":
                self.flushed(module.vp_flush(who).effects)
            case "exit":
                module.td_exit(who)
            case "accept":
                module.tdcall(who, 6, rcx=GPA)
            case "store":
                found = module.access(who, GPA, 2)
                module.vcpu(who).ve_info = None  # as if the guest had asked
                if isinstance(found, Translation):
                    self.tlb[who] = self.tlb.get(who, frozenset()) | {(GPA, found.hpa)}

    def flushed(self, effects: tuple) -> None:
        for effect in effects:
            assert isinstance(effect, FlushTlb)
            self.tlb.pop(effect.vcpu, None)

    # -- what must hold ---------------------------------------------------------------------------

    def key(self) -> tuple:
        return self.module.key(), tuple(sorted((who, one) for who, one in self.tlb.items() if one))

    def violations(self) -> str | None:
        module = self.module
        for tdvpr, tdr in self.vcpus:
            if tdvpr not in module.vcpus or not module.vcpu(tdvpr).running:
                continue
            for gpa, hpa in self.tlb.get(tdvpr, ()):
                page = module.pamt.walk(hpa)
                if (page.pt, page.owner) != (PageType.REG, tdr >> 12):
                    return f"vCPU {tdvpr:#x} reaches {hpa:#x}: {page}"
                at = entry(module, tdr, gpa)
                if at != hpa:
                    return f"vCPU {tdvpr:#x} reaches {hpa:#x} at {gpa:#x}, the S-EPT maps {at}"
        return self.books()

    def books(self) -> str | None:
        """S-EPT and PAMT agree: what is mapped is its TD's, and each TD's pages are counted."""
        module = self.module
        for tdr, td in module.tds.items():
            owned = {hpa: pt for hpa, _, pt in module.pamt.owned(td.owner)}
            if len(owned) != td.children:
                return f"TD {tdr:#x} counts {td.children} pages and has {len(owned)}"
            if td.sept is None:
                continue
            mapped = [hpa for _, _, hpa, state in td.sept.leaves() if state in LEAVES]
            if sorted(mapped) != sorted(hpa for hpa, pt in owned.items() if pt is PageType.REG):
                return f"TD {tdr:#x} maps {mapped}, the PAMT says {owned}"
            tables = set(td.sept.pages()) - {td.sept.root}
            if tables != {hpa for hpa, pt in owned.items() if pt is PageType.EPT}:
                return f"TD {tdr:#x} has tables {tables}, the PAMT says {owned}"
        return None


def entry(module: TdxModule, tdr: int, gpa: int) -> int | None:
    """Return what the S-EPT maps at ``gpa``, blocked or not."""
    tree = module.td(tdr).sept
    found = [hpa for at, _, hpa, state in tree.leaves() if at == gpa and state in LEAVES]
    return found[0] if found else None


def world(shape: Shape) -> World:
    memory = Pages()
    module = TdxModule([Tdmr(BASE, 64 * PAGE_SIZE)], memory, tdcs_pages=4, tdvps_pages=1,
                       hkids=range(32, 34), lps=1)  # fmt: skip
    fresh = iter(range(BASE, BASE + 64 * PAGE_SIZE, PAGE_SIZE))
    memory.write(PARAMS, pack_params(TdParams(max_vcpus=shape.vcpus)))
    tdrs, vcpus = [], []
    for number in range(shape.tds):
        tdr = next(fresh)
        tdrs.append(tdr)
        module.mng_create(tdr, 32 + number)
        module.mng_key_config(tdr)
        for _ in range(4):
            module.mng_addcx(tdr, next(fresh))
        module.mng_init(tdr, PARAMS)
        for _ in range(shape.vcpus):
            tdvpr = next(fresh)
            module.vp_create(tdr, tdvpr)
            module.vp_init(tdvpr)
            vcpus.append((tdvpr, tdr))
        for level in (3, 2, 1):
            module.mem_sept_add(tdr, 0, level, next(fresh))
        module.mr_finalize(tdr)
    pages = [next(fresh) for _ in range(shape.pages)]
    module.memory = NoMemory()
    return World(shape, module, tdrs, vcpus, pages, next(fresh))


def gone(state: World) -> bool:
    return not state.module.tds and not state.module.pamt.counts()


def quiet(state: World) -> bool:
    """Whether no data page is anyone's, and no vCPU runs."""
    counts = state.module.pamt.counts()
    return not counts.get(PageType.REG) and not any(td.running for td in state.module.tds.values())


SHAPES = {
    "two vCPUs": Shape(tds=1, vcpus=2, pages=1),
    "two pages": Shape(tds=1, vcpus=1, pages=2),
    "two TDs": Shape(tds=2, vcpus=1, pages=1),
    "tables": Shape(tds=1, vcpus=1, pages=1, sept=True),
    "teardown": Shape(tds=1, vcpus=1, pages=1, teardown=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_goes_wrong(name: str) -> None:
    report = explore(world(SHAPES[name]), goal=gone if SHAPES[name].teardown else quiet)
    assert report.problem is None, str(report)
    assert report.complete
    assert report.goals


def broken() -> Report:
    return explore(world(Shape(tds=1, vcpus=1, pages=1)))


def test_removal_without_tracking_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Td, "tracked", lambda td, bepoch: True)
    assert "reaches" in str(broken().problem)


def test_a_tracker_that_waits_for_nobody_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, Check.EPOCH, lambda machine, call: None)
    assert "reaches" in str(broken().problem)


def test_an_entry_without_flush_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    enter = Td.enter

    def forgetful(td: Td, vcpu: object) -> bool:
        enter(td, vcpu)
        return False

    monkeypatch.setattr(Td, "enter", forgetful)
    assert "reaches" in str(broken().problem)


def test_an_epoch_that_is_not_noted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwemu.tdx.pamt.Pamt.set_bepoch", lambda *all_of_it: None)
    assert "reaches" in str(broken().problem)
