# SPDX-License-Identifier: GPL-2.0-or-later
"""What a TDX module would answer, said a second time, with dictionaries and strings.

Written from the tables of the module's manual (leaves, S-EPT states, status codes) and not from
`hwemu.tdx`, of which it imports nothing: the two must agree on every register of every answer.
It knows the leaves on a TD's memory, vCPU entry and the guest's ACCEPT; TDs are given ready.
"""

from __future__ import annotations

PAGE = 4096
OK = 0
INVALID = 0xC000010000000000
RANGE = 0xC000010100000000
BUSY = 0x8000020000000000
EPOCH_BUSY = 0x8000020100000000
METADATA = 0xC000030000000000
PAGES_EXIST = 0xC000040000000000
KEYS = 0x8000081000000000
LIFECYCLE = 0xC000060700000000
OPSTATE = 0xC000060800000000
WALK_FAILED = 0xC0000B0000000000
NOT_BLOCKED = 0xC0000B0600000000
ALREADY_BLOCKED = 0x00000B0700000000
NOT_TRACKED = 0xC0000B0800000000
PROMOTE_CONDITIONS = 0xC0000B0900000000
ALREADY_ACCEPTED = 0x00000B0A00000000
SIZE_MISMATCH = 0xC0000B0B00000000
ENTRY_STATE = 0xC0000B0D00000000
TABLE_IN_USE = 0xC0000B0E00000000
RESTARTABLE = 0x8000000400000000
RCX, RDX, R8, R9 = 1, 2, 8, 9

#: S-EPT states: public number, and the rights of a guest.
STATES = {
    "FREE": (0, ""), "REMOVED": (5, ""), "NL_MAPPED": (132, "rwx"), "NL_BLOCKED": (129, ""),
    "MAPPED": (4, "rwx"), "BLOCKED": (1, ""), "BLOCKEDW": (8, "rx"),
    "EXPORTED_BLOCKEDW": (9, "rx"), "EXPORTED_DIRTY": (11, "rwx"),
    "EXPORTED_DIRTY_BLOCKEDW": (12, "rx"), "PENDING": (2, ""), "PENDING_BLOCKED": (3, ""),
    "PENDING_BLOCKEDW": (16, ""), "PENDING_EXPORTED_BLOCKEDW": (17, ""),
    "PENDING_EXPORTED_DIRTY": (19, ""), "PENDING_EXPORTED_DIRTY_BLOCKEDW": (20, ""),
}  # fmt: skip
NOT_LEAVES = ("FREE", "REMOVED", "NL_MAPPED", "NL_BLOCKED")
BLOCK = {"NL_MAPPED": "NL_BLOCKED", "MAPPED": "BLOCKED", "BLOCKEDW": "BLOCKED",
         "PENDING": "PENDING_BLOCKED", "PENDING_BLOCKEDW": "PENDING_BLOCKED"}  # fmt: skip
UNBLOCK = {"NL_BLOCKED": "NL_MAPPED", "BLOCKED": "MAPPED", "PENDING_BLOCKED": "PENDING"}
ACCEPT = {"PENDING": "MAPPED", "PENDING_EXPORTED_DIRTY": "EXPORTED_DIRTY"}
#: Never in a TLB with more than the reader may have: no tracking before they change.
UNTRACKED = ("FREE", "REMOVED", "EXPORTED_BLOCKEDW", "PENDING_EXPORTED_BLOCKEDW")

#: Leaf → (entry states, operation states, lowest and highest level).
TABLE = {
    2: (("FREE",), (1,), 0, 0),
    3: (("FREE", "NL_MAPPED"), (1, 2, 3, 6, 7, 8, 9), 1, 3),
    5: (tuple(name for name in STATES if name not in NOT_LEAVES), (1, 2, 3, 4, 5, 8, 9), 0, 0),
    6: (("FREE", "REMOVED"), (1, 2, 3, 9), 0, 1),
    7: (tuple(BLOCK), (1, 2, 3, 4, 5, 8, 9), 0, 3),
    15: (("MAPPED", "BLOCKED", "PENDING", "PENDING_BLOCKED"), (1, 2, 3, 4, 5, 8, 9), 1, 2),
    23: (("NL_MAPPED", "NL_BLOCKED"), (1, 2, 3, 4, 5, 8, 9), 1, 2),
    25: (tuple(STATES), tuple(range(1, 11)), 0, 3),
    29: (("MAPPED", "BLOCKED", "BLOCKEDW", "PENDING", "PENDING_BLOCKED", "PENDING_BLOCKEDW"),
         (1, 2, 3, 4, 5, 8, 9, 10), 0, 2),
    30: (("NL_MAPPED", "NL_BLOCKED"), tuple(range(1, 11)), 1, 3),
    39: (tuple(UNBLOCK), (1, 2, 3, 4, 5, 8, 9), 0, 3),
}  # fmt: skip


class Refusal(Exception):
    pass


def no(status: int, rcx: int = 0, rdx: int = 0) -> Refusal:
    return Refusal(status, rcx, rdx)


class PredictedTd:
    def __init__(self, tdr: int, op_state: int, *, ve: bool = True) -> None:
        self.tdr = tdr
        self.op_state = op_state
        self.ve = ve
        self.epoch = 1
        self.running: dict[int, int] = {}  # vCPU → epoch
        self.entered: dict[int, int] = {}  # vCPU → epoch of its last entry
        self.entries: dict[tuple[int, int], list] = {}  # (level, gpa) → [state, hpa, accepted]
        self.blocked_in: dict[tuple[int, int], int] = {}  # (hpa, level) → epoch

    def entry(self, level: int, gpa: int) -> list:
        return self.entries.get((level, gpa), ["FREE", 0, 0])


class Predictor:
    def __init__(self, base: int, size: int) -> None:
        self.base, self.end = base, base + size
        self.pages: dict[int, tuple[str, int, int]] = {}  # hpa → (type, tdr, level)
        self.tds: dict[int, PredictedTd] = {}
        self.interrupt = False

    # -- pieces -----------------------------------------------------------------------------------

    def holder(self, hpa: int) -> tuple[str, int, int] | None:
        for level in (2, 1, 0):
            found = self.pages.get(hpa & -(PAGE << 9 * level))
            if found is not None and found[2] == level:
                return found
        return None

    def new_page(self, hpa: int, level: int, operand: int) -> None:
        size = PAGE << 9 * level
        if hpa % size or hpa >= 1 << 46:
            raise no(INVALID | operand)
        if not self.base <= hpa < self.end:
            raise no(RANGE | operand)
        if self.holder(hpa) is not None or hpa + size > self.end:
            raise no(METADATA | operand)
        if level and any(hpa <= other < hpa + size for other in self.pages):
            raise no(METADATA | operand)

    def find_td(self, tdr: int, operand: int) -> PredictedTd:
        if tdr % PAGE or tdr >= 1 << 46:
            raise no(INVALID | operand)
        if not self.base <= tdr < self.end:
            raise no(RANGE | operand)
        if tdr not in self.tds:
            raise no(METADATA | operand)
        return self.tds[tdr]

    @staticmethod
    def show(td: PredictedTd, level: int, gpa: int) -> tuple[int, int]:
        state, hpa, _ = td.entry(level, gpa)
        public, rights = STATES[state]
        if state == "FREE":
            rcx = 1 << 63
        else:
            rcx = sum({"r": 1, "w": 2, "x": 4}[one] for one in rights)
            if state not in NOT_LEAVES:
                rcx |= 0b11110000 | hpa  # write-back, TD memory, leaf
                if not (state in ACCEPT and td.ve):
                    rcx |= 1 << 63
        return rcx, level | public << 8

    @staticmethod
    def walk(td: PredictedTd, gpa: int, level: int) -> int:
        for at in (3, 2, 1, 0):
            if at == level or td.entry(at, gpa & -(PAGE << 9 * at))[0] != "NL_MAPPED":
                return at
        raise AssertionError

    def tracked(self, td: PredictedTd, state: str, hpa: int, level: int, where: tuple) -> None:
        if td.op_state not in (2, 3, 9) or state in UNTRACKED:
            return
        if state not in UNBLOCK:
            raise no(NOT_BLOCKED | RCX, *where)
        epoch = td.blocked_in.get((hpa, level), 0)
        if epoch >= td.epoch or (epoch == td.epoch - 1 and epoch in td.running.values()):
            raise no(NOT_TRACKED | RCX)

    # -- leaves -----------------------------------------------------------------------------------

    def seamcall(self, leaf: int, regs: dict[str, int]) -> tuple[int, int, int]:
        """Return RAX, RCX and RDX."""
        try:
            return (OK, *self._leaf(leaf, regs))
        except Refusal as refusal:
            return refusal.args

    def _leaf(self, leaf: int, regs: dict[str, int]) -> tuple[int, int]:
        if leaf == 38:
            return self._track(regs["rcx"])
        states, op_states, lowest, highest = TABLE[leaf]
        td = self.find_td(regs["rdx"], RDX)
        if leaf == 2 and td.running:
            raise no(BUSY | RDX)
        if td.op_state not in op_states:
            raise no(OPSTATE)
        info = regs["rcx"]
        level, gpa = info & 7, info & ~0xFFF
        size = PAGE << 9 * level
        if info >> 52 or info & 0xFF8 or not lowest <= level <= highest or gpa % size:
            raise no(INVALID | RCX)
        if gpa >= 1 << 47:
            raise no(INVALID | RCX)
        reached = self.walk(td, gpa, level)
        where = self.show(td, reached, gpa & -(PAGE << 9 * reached))
        if reached != level:
            raise no(WALK_FAILED | RCX, *where)
        state, hpa, _ = td.entry(level, gpa)
        if state not in states:
            if leaf == 7 and state in UNBLOCK:
                raise no(ALREADY_BLOCKED | RCX, *where)
            raise no(ENTRY_STATE | RCX, *where)
        page_level = 0 if state in NOT_LEAVES else level
        return getattr(self, f"_leaf_{leaf}")(td, regs, gpa, level, state, hpa, page_level, where)

    def _track(self, tdr: int) -> tuple[int, int]:
        td = self.find_td(tdr, RCX)
        if not 1 <= td.op_state <= 9:
            raise no(OPSTATE)
        if td.epoch - 1 in td.running.values():
            raise no(EPOCH_BUSY)
        td.epoch += 1
        return 0, 0

    def _use(self, td: PredictedTd, hpa: int, kind: str, level: int = 0) -> None:
        self.pages[hpa] = (kind, td.tdr, level)
        td.blocked_in.pop((hpa, level), None)

    def _leaf_2(self, td, regs, gpa, level, state, hpa, page_level, where):
        if regs["r9"] % PAGE or regs["r9"] >= 1 << 46:
            raise no(INVALID | R9)
        self.new_page(regs["r8"], 0, R8)
        self._use(td, regs["r8"], "REG")
        td.entries[0, gpa] = ["MAPPED", regs["r8"], 0]
        return 0, 0

    def _leaf_3(self, td, regs, gpa, level, state, hpa, page_level, where):
        if state != "FREE":
            raise no(ENTRY_STATE | RCX, *where)
        # bit 63 of the page is ignored
        page = regs["r8"] & ~(1 << 63)
        self.new_page(page, 0, R8)
        self._use(td, page, "EPT")
        td.entries[level, gpa] = ["NL_MAPPED", page, 0]
        return 0, 0

    def _leaf_5(self, td, regs, gpa, level, state, hpa, page_level, where):
        if regs["r8"] == hpa:
            raise no(INVALID | R8)
        self.tracked(td, state, hpa, 0, where)
        self.new_page(regs["r8"], 0, R8)
        del self.pages[hpa]
        self._use(td, regs["r8"], "REG")
        td.entries[0, gpa] = [UNBLOCK.get(state, state), regs["r8"], 0]
        return hpa, 0

    def _leaf_6(self, td, regs, gpa, level, state, hpa, page_level, where):
        self.new_page(regs["r8"], level, R8)
        self._use(td, regs["r8"], "REG", level)
        td.entries[level, gpa] = ["PENDING", regs["r8"], 0]
        return 0, 0

    def _leaf_7(self, td, regs, gpa, level, state, hpa, page_level, where):
        td.entries[level, gpa] = [BLOCK[state], hpa, 0]
        td.blocked_in[hpa, page_level] = td.epoch
        return 0, 0

    def _leaf_15(self, td, regs, gpa, level, state, hpa, page_level, where):
        self.tracked(td, state, hpa, level, where)
        self.new_page(regs["r8"], 0, R8)
        if self.interrupt:
            raise no(RESTARTABLE)
        self._use(td, regs["r8"], "EPT")
        del self.pages[hpa]
        step = PAGE << 9 * (level - 1)
        for number in range(512):
            self._use(td, hpa + number * step, "REG", level - 1)
            small = [UNBLOCK.get(state, state), hpa + number * step, 0]
            td.entries[level - 1, gpa + number * step] = small
        td.entries[level, gpa] = ["NL_MAPPED", regs["r8"], 0]
        return 0, 0

    def _leaf_23(self, td, regs, gpa, level, state, hpa, page_level, where):
        self.tracked(td, state, hpa, 0, where)
        step = PAGE << 9 * (level - 1)
        first = td.entry(level - 1, gpa)
        alike = first[0] in ("MAPPED", "PENDING") and first[1] % (step * 512) == 0
        for number in range(512):
            if not alike:
                break
            one = td.entry(level - 1, gpa + number * step)
            alike = one[0] == first[0] and one[1] == first[1] + number * step
        if not alike:
            raise no(PROMOTE_CONDITIONS | RCX, *where)
        if self.interrupt:
            raise no(RESTARTABLE)
        for number in range(512):
            del td.entries[level - 1, gpa + number * step]
            del self.pages[first[1] + number * step]
        del self.pages[hpa]
        self._use(td, first[1], "REG", level)
        td.entries[level, gpa] = [first[0], first[1], 0]
        return hpa, 0

    def _leaf_25(self, td, regs, gpa, level, state, hpa, page_level, where):
        return where

    def _leaf_29(self, td, regs, gpa, level, state, hpa, page_level, where):
        self.tracked(td, state, hpa, level, where)
        del self.pages[hpa]
        td.entries.pop((level, gpa))
        if td.op_state in (6, 7, 8, 9):
            td.entries[level, gpa] = ["REMOVED", 0, 0]
        return hpa, 0

    def _leaf_30(self, td, regs, gpa, level, state, hpa, page_level, where):
        self.tracked(td, state, hpa, 0, where)
        size = PAGE << 9 * level
        below = [at for deep, at in td.entries if deep == level - 1 and gpa <= at < gpa + size]
        if below:
            raise no(TABLE_IN_USE | RCX, *where)
        del self.pages[hpa]
        del td.entries[level, gpa]
        return hpa, 0

    def _leaf_39(self, td, regs, gpa, level, state, hpa, page_level, where):
        self.tracked(td, state, hpa, page_level, where)
        td.entries[level, gpa] = [UNBLOCK[state], hpa, 0]
        return 0, 0

    # -- vCPUs ------------------------------------------------------------------------------------

    def enter(self, td: PredictedTd, vcpu: int) -> tuple[int, bool]:
        """Return RAX, and whether the TLB must be flushed; the vCPU is of its processor."""
        if td.op_state not in (2, 3, 9):
            return OPSTATE, False
        if vcpu in td.running:
            return BUSY | RCX, False
        flush = td.entered.get(vcpu, 0) != td.epoch
        td.running[vcpu] = td.entered[vcpu] = td.epoch
        return OK, flush

    def exit(self, td: PredictedTd, vcpu: int) -> None:
        del td.running[vcpu]

    def accept(self, td: PredictedTd, vcpu: int, info: int, interrupt: int | None) -> int | str:
        """Return RAX, or "exit" where the vCPU leaves the TD instead."""
        level, gpa = info & 7, info & ~0xFFF
        if info >> 52 or info & 0xFF8 or level > 1 or gpa % (PAGE << 9 * level) or gpa >= 1 << 47:
            return INVALID | RCX
        reached = self.walk(td, gpa, level)
        at = gpa & -(PAGE << 9 * reached)
        entry = td.entry(reached, at)
        if reached == level and entry[0] in ("NL_MAPPED", "NL_BLOCKED"):
            return SIZE_MISMATCH | level
        if entry[0] not in NOT_LEAVES and STATES[entry[0]][1]:
            return ALREADY_ACCEPTED | reached
        if reached != level or entry[0] not in ACCEPT:
            del td.running[vcpu]
            return "exit"
        if level and interrupt is not None and entry[2] + max(interrupt, 1) < 512:
            entry[2] += max(interrupt, 1)
            return RESTARTABLE
        td.entries[level, gpa] = [ACCEPT[entry[0]], entry[1], 0]
        return OK

    def access(self, td: PredictedTd, vcpu: int, gpa: int, rights: str) -> int | str:
        """Return the address that is reached, or what comes instead: "exit", "ve"."""
        reached = self.walk(td, gpa, 0)
        size = PAGE << 9 * reached
        state, hpa, _ = td.entry(reached, gpa & -size)
        if state not in NOT_LEAVES and set(rights) <= set(STATES[state][1]):
            return hpa + gpa % size
        if state in ACCEPT and td.ve:
            return "ve"
        del td.running[vcpu]
        return "exit"
