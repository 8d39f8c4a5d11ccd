# SPDX-License-Identifier: GPL-2.0-or-later
"""The TDX model against a predictor that shares nothing with it but the manual.

First every leaf on every entry state, operation state, size and state of tracking; then long random
sequences of leaves, guests and interrupts on two TDs. Each register of each answer must agree, and
so must the pages and entries that are left.
"""

from __future__ import annotations

import copy
import random
from collections import Counter

import pytest
from tdx_machine import BASE, GIB, SIZE, SOURCE, Lab
from tdx_predictor import NOT_LEAVES, PAGE, STATES, TABLE, PredictedTd, Predictor

from hwemu.tdx.entry import SeptState, decode, encode
from hwemu.tdx.module import TdxModule
from hwemu.tdx.pamt import PageType, Tdmr
from hwemu.tdx.result import FlushTlb, TdExit, Translation, VirtualException
from hwemu.tdx.states import OpState
from hwemu.tdx.status import Status, name, split
from hwemu.tdx.td import ATTRIBUTE_SEPT_VE_DISABLE, TdParams

pytestmark = pytest.mark.exhaustive

OTHER = GIB  #: a TDMR of one page table's worth of pages, all the host's
GPA = {0: 0x40201000, 1: 0x40200000, 2: 0x40000000}


def copied(predictor: Predictor) -> Predictor:
    other = copy.copy(predictor)
    other.pages = dict(predictor.pages)
    other.tds = {}
    for tdr, td in predictor.tds.items():
        twin = copy.copy(td)
        twin.running, twin.entered = dict(td.running), dict(td.entered)
        twin.entries = {at: list(one) for at, one in td.entries.items()}
        twin.blocked_in = dict(td.blocked_in)
        other.tds[tdr] = twin
    return other


def described(module: TdxModule, predictor: Predictor) -> Predictor:
    """Fill a predictor with what the module holds: pages and entries."""
    for tdr, td in module.tds.items():
        predictor.pages[tdr] = ("TDR", 0, 0)
        for hpa, level, pt in module.pamt.owned(td.owner):
            predictor.pages[hpa] = (pt.name, tdr, level)
        ve = not td.params.attributes & ATTRIBUTE_SEPT_VE_DISABLE
        known = predictor.tds.setdefault(tdr, PredictedTd(tdr, int(td.op_state), ve=ve))
        known.entries = entries_of(module, tdr)
    return predictor


def entries_of(module: TdxModule, tdr: int) -> dict[tuple[int, int], list]:
    """Return every entry that is not FREE, read from the tables bit by bit."""
    tree = module.td(tdr).tree
    found: dict[tuple[int, int], list] = {}

    def below(hpa: int, level: int, base: int) -> None:
        for index, word in enumerate(tree.table(hpa).tolist()):
            if word == encode(SeptState.FREE):
                continue
            gpa, page = base + index * (PAGE << 9 * level), word & 0xFFFFFFFFFF000
            if word & 0x80:
                state = decode(word).name
                done = page >> 12 & 0x1FF if level == 1 and "PENDING" in state else 0
                found[level, gpa] = [state, page - done * PAGE, done]
            elif word == encode(SeptState.REMOVED):
                found[level, gpa] = ["REMOVED", 0, 0]
            else:
                found[level, gpa] = ["NL_MAPPED" if word & 7 else "NL_BLOCKED", page, 0]
                below(page, level - 1, gpa)

    below(tree.root, tree.top, 0)
    return found


def pages_of(module: TdxModule) -> dict[int, tuple[str, int, int]]:
    found = dict.fromkeys(module.tds, ("TDR", 0, 0))
    for tdr, td in module.tds.items():
        for hpa, level, pt in module.pamt.owned(td.owner):
            found[hpa] = (pt.name, tdr, level)
    return found


class Grid:
    """A TD with one entry of a level in any state; ``kind`` is none, leaf or table."""

    def __init__(self, level: int, kind: str) -> None:
        self.lab = Lab()
        if level == 2:
            self.lab.module = TdxModule([Tdmr(BASE, SIZE), Tdmr(8 * GIB, GIB)], self.lab.memory)
        module = self.lab.module
        self.tdr, self.vcpus = self.lab.runnable(2)
        self.gpa, self.level = GPA[level], level
        self.lab.tables(self.tdr, self.gpa, level)
        td = module.td(self.tdr)
        self.hpa = 0
        if kind == "leaf":
            self.hpa = 8 * GIB if level == 2 else self.lab.page(PAGE << 9 * level)
            module.pamt.assign(self.hpa, level, PageType.REG, td.owner)
            td.children += 512**level
            td.tree.walk(self.gpa, level).store(encode(SeptState.MAPPED, self.hpa))
        elif kind == "table":
            self.hpa = self.lab.page()
            module.mem_sept_add(self.tdr, self.gpa, level, self.hpa)
        self.kind = kind
        self.page = self.lab.page(2 << 20)
        self.page_level = level if kind == "leaf" else 0
        self.predictor = described(module, Predictor(BASE, SIZE))

    def arranged(self, state: str, op_state: int, tracking: str) -> tuple[TdxModule, Predictor]:
        module, predictor = self.lab.module.copy(), copied(self.predictor)
        td, known = module.td(self.tdr), predictor.tds[self.tdr]
        if tracking == "busy":  # a vCPU still runs in the epoch of the block
            module.vp_enter(self.vcpus[0], lp=0)
            known.running[self.vcpus[0]] = known.epoch
        if tracking != "no":
            td.epoch += 1
            known.epoch += 1
        if self.hpa:
            blocked = td.epoch - (tracking != "no")
            module.pamt.set_bepoch(self.hpa, self.page_level, blocked)
            known.blocked_in[self.hpa, self.page_level] = blocked
        td.op_state = OpState(op_state)
        known.op_state = op_state
        entry = td.tree.walk(self.gpa, self.level)
        entry.store(td.word(SeptState[state], self.hpa))
        if state == "FREE":
            known.entries.pop((self.level, self.gpa), None)
        else:
            known.entries[self.level, self.gpa] = [state, self.hpa, 0]
        return module, predictor

    def states(self) -> list[str]:
        kinds = {"none": ("FREE", "REMOVED"), "table": ("NL_MAPPED", "NL_BLOCKED")}
        leaves = tuple(one for one in STATES if one not in NOT_LEAVES)
        return list(kinds.get(self.kind, leaves))


def ask(module: TdxModule, predictor: Predictor, leaf: int, regs: dict[str, int]) -> int:
    """Run one leaf on both; every register must agree. Return RAX."""
    expected = predictor.seamcall(leaf, regs)
    got = module.seamcall(leaf, **regs)
    assert (got.status, got.rcx, got.rdx) == (*expected, 0, 0)[:3], (
        f"leaf {leaf} {regs}: {name(got.status)}, predicted {name(expected[0])}"
    )
    return got.status


@pytest.mark.parametrize(
    ("level", "kind"),
    [
        (level, kind)
        for level in (0, 1, 2)
        for kind in ("none", "leaf", "table")
        if (level, kind) != (0, "table")
    ],
)
def test_every_leaf_on_every_state(level: int, kind: str) -> None:
    grid = Grid(level, kind)
    seen: Counter[str] = Counter()
    for state in grid.states():
        for op_state in range(11):
            for tracking in ("no", "busy", "done") if kind != "none" else ("no",):
                module, predictor = grid.arranged(state, op_state, tracking)
                before = module.key()
                for leaf in (*TABLE, 38):
                    # TRACK has its TDR in RCX; ADD and AUG at their own level, the rest at 0 too
                    regs = {"rcx": grid.gpa | level, "rdx": grid.tdr, "r8": grid.page, "r9": SOURCE}
                    if leaf == 38:
                        regs = {"rcx": grid.tdr, "rdx": 0}
                    twin = copied(predictor)
                    if twin.seamcall(leaf, regs)[0] == 0:
                        after = module.copy()
                        status = ask(after, copied(predictor), leaf, regs)
                        assert pages_of(after) == twin.pages
                        assert entries_of(after, grid.tdr) == twin.tds[grid.tdr].entries
                    else:
                        status = ask(module, predictor, leaf, regs)
                    seen[split(status)[0].name] += 1
                assert module.key() == before  # refusals change nothing
    assert {"SUCCESS", "EPT_ENTRY_STATE_INCORRECT", "OP_STATE_INCORRECT"} <= set(seen)
    if kind != "none":
        assert {"GPA_RANGE_NOT_BLOCKED", "TLB_TRACKING_NOT_DONE"} <= set(seen)


class Walkers:
    """Random leaves on two TDs, on the module and on the predictor."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lab = Lab()
        self.module = self.lab.module
        self.tdrs: list[int] = []
        self.vcpus: list[tuple[int, int, int]] = []  # TDR, TDVPR, processor
        for number, attributes in enumerate((0, ATTRIBUTE_SEPT_VE_DISABLE)):
            tdr = self.lab.initialised(TdParams(attributes, max_vcpus=2), hkid=40 + number)
            self.tdrs.append(tdr)
            for lp in (2 * number, 2 * number + 1):
                self.vcpus.append((tdr, self.lab.with_vcpu(tdr, lp), lp))
            self.lab.tables(tdr, 0, 1)
        self.predictor = described(self.module, Predictor(BASE, SIZE))
        start = self.lab.page(2 << 20)
        self.small = [start + number * PAGE for number in range(24)]
        self.large = [start + (number << 21) for number in range(1, 4)]
        inside = self.large[0] + 5 * PAGE
        self.odd = [start + 7, OTHER, 1 << 46, inside, self.tdrs[0], 1 << 63]
        self.gpas = [0, PAGE, 5 * PAGE, 2 << 20, (2 << 20) + PAGE, 4 << 20, GIB]
        self.seen: Counter[str] = Counter()

    def page(self, level: int) -> int:
        roll = self.random.random()
        if roll < 0.08:
            return self.random.choice(self.odd)
        return self.random.choice(self.large if level == 1 and roll < 0.9 else self.small)

    def info(self, levels: tuple[int, ...]) -> int:
        level = self.random.choice(levels)
        gpa = self.random.choice(self.gpas)
        roll = self.random.random()
        if roll > 0.06:
            return (gpa & -(PAGE << 9 * level)) | level
        return self.random.choice((gpa | 5, gpa | level | 8, gpa | level, 1 << 47, 1 << 52 | gpa))

    def step(self) -> None:
        roll = self.random.random()
        if roll < 0.64:
            self.leaf()
        elif roll < 0.97:
            self.guest()
        elif roll < 0.985:
            self.elsewhere()
        else:
            interrupt = not self.predictor.interrupt
            self.predictor.interrupt = self.module.host_interrupt = interrupt

    def leaf(self) -> None:
        leaf = self.random.choice((2, 3, 3, 3, 3, 5, 6, 6, 6, 6, 7, 7, 7, 15, 15, 23, 25, 29, 29,
                                   29, 30, 38, 38, 38, 39, 39))  # fmt: skip
        tdr = self.random.choice(self.tdrs)
        if leaf == 38:
            regs = {"rcx": tdr, "rdx": 0}
        else:
            levels = {2: (0, 0, 1), 3: (1, 1, 2, 3), 5: (0, 0, 0, 1), 6: (0, 0, 1), 15: (1, 2),
                      23: (1, 1, 2), 30: (1, 1, 1, 1, 2)}.get(leaf, (0, 0, 0, 1, 1, 2))  # fmt: skip
            info = self.info(levels)
            if leaf == 3 and self.random.random() < 0.7:
                # mostly the table that is missing, or little else would ever be reached
                gpa = self.random.choice(self.gpas)
                level = max(self.predictor.walk(self.predictor.tds[tdr], gpa, 0), 1)
                info = gpa & -(PAGE << 9 * level) | level
            regs = {"rcx": info, "rdx": tdr, "r8": self.page(info & 7 if leaf == 6 else 0),
                    "r9": SOURCE + (self.random.random() < 0.05)}  # fmt: skip
        if self.random.random() < 0.02:
            regs["rcx" if leaf == 38 else "rdx"] = self.random.choice(self.odd)
        self.seen[split(ask(self.module, self.predictor, leaf, regs))[0].name] += 1

    def guest(self) -> None:
        tdr, tdvpr, lp = self.random.choice(self.vcpus)
        td = self.predictor.tds[tdr]
        if tdvpr not in td.running:
            expected, flush = self.predictor.enter(td, tdvpr)
            got = self.module.seamcall(0, lp=lp, rcx=tdvpr)
            assert got.status == expected
            assert [type(one) for one in got.effects] == [FlushTlb] * flush
            return
        roll = self.random.random()
        if roll < 0.25:
            self.predictor.exit(td, tdvpr)
            self.module.td_exit(tdvpr)
        elif roll < 0.7:
            info = self.info((0, 0, 1))
            interrupt = self.random.choice((None, None, 100, 511, 512))
            expected = self.predictor.accept(td, tdvpr, info, interrupt)
            got = self.module.tdcall(tdvpr, 6, rcx=info, interrupt_after=interrupt)
            exits = [type(one) for one in got.effects]
            assert (exits if exits else got.status) == (
                [TdExit] if expected == "exit" else expected
            ), f"ACCEPT {info:#x}: {name(got.status)}"
            self.seen["ACCEPT " + split(got.status)[0].name] += 1
        else:
            gpa = self.random.choice(self.gpas) + self.random.randrange(PAGE)
            rights = self.random.choice(("r", "w", "x", "rw"))
            self.module.vcpu(tdvpr).ve_info = None  # as if the guest had asked for the last one
            expected = self.predictor.access(td, tdvpr, gpa, rights)
            mask = sum({"r": 1, "w": 2, "x": 4}[one] for one in rights)
            got = self.module.access(tdvpr, gpa, mask)
            kinds = {TdExit: "exit", VirtualException: "ve"}
            assert (got.hpa if isinstance(got, Translation) else kinds[type(got)]) == expected

    def elsewhere(self) -> None:
        """Move a TD by what is not modelled: finalisation early, or a migration."""
        tdr = self.random.choice(self.tdrs)
        td, known = self.module.td(tdr), self.predictor.tds[tdr]
        if self.random.random() < 0.6:
            if not known.running:
                known.op_state = self.random.choice((1, 1, 2, 2, 2, 2, 3, 4, 5, 6, 8, 9, 10))
                td.op_state = OpState(known.op_state)
            return
        leaves = [at for at, one in known.entries.items() if one[0] not in NOT_LEAVES]
        if leaves:
            level, gpa = self.random.choice(leaves)
            hpa = known.entries[level, gpa][1]
            state = self.random.choice([one for one in STATES if one not in NOT_LEAVES])
            at = td.tree.walk(gpa, level)
            if at.level == level:  # not under a table that is blocked
                known.entries[level, gpa] = [state, hpa, 0]
                at.store(td.word(SeptState[state], hpa))

    def compare(self) -> None:
        assert pages_of(self.module) == self.predictor.pages
        for tdr in self.tdrs:
            assert entries_of(self.module, tdr) == self.predictor.tds[tdr].entries
            owned = self.module.pamt.owned(self.module.td(tdr).owner)
            assert sum(512**level for _, level, _ in owned) == self.module.td(tdr).children


def run(seed: int, steps: int) -> Counter[str]:
    walkers = Walkers(seed)
    for number in range(steps):
        walkers.step()
        if number % 1000 == 0:
            walkers.compare()
    walkers.compare()
    return walkers.seen


def test_random_leaves() -> None:
    seen = run(1, 5_000)
    assert {"SUCCESS", "EPT_WALK_FAILED", "PAGE_METADATA_INCORRECT", "OPERAND_INVALID",
            "OPERAND_ADDR_RANGE_ERROR", "PREVIOUS_TLB_EPOCH_BUSY", "OP_STATE_INCORRECT",
            "ACCEPT SUCCESS", "ACCEPT PAGE_ALREADY_ACCEPTED"} <= set(seen)  # fmt: skip


@pytest.mark.timeout(600)
def test_many_random_leaves() -> None:
    seen = run(3, 100_000)
    wanted = {code.name for code in (
        Status.EPT_INVALID_PROMOTE_CONDITIONS, Status.EPT_PAGE_NOT_FREE,
        Status.INTERRUPTED_RESTARTABLE, Status.GPA_RANGE_ALREADY_BLOCKED,
        Status.TLB_TRACKING_NOT_DONE, Status.GPA_RANGE_NOT_BLOCKED,
    )}  # fmt: skip
    assert wanted | {"ACCEPT PAGE_SIZE_MISMATCH", "ACCEPT INTERRUPTED_RESTARTABLE"} <= set(seen)
