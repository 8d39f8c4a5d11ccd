# SPDX-License-Identifier: GPL-2.0-or-later
"""What leaves the Secure EPT of a TD, and what only changes its place.

A zap blocks (TDH.MEM.RANGE.BLOCK) and begins an epoch (TDH.MEM.TRACK); once no vCPU is left of the
epoch before, a page that goes is removed (TDH.MEM.PAGE.REMOVE). One that *moves* stays BLOCKED at
its old place until its owner has copied it, and is relocated then (TDH.MEM.PAGE.RELOCATE): the
guest's acceptance goes with it. RELOCATE takes 4 KiB alone, so a large leaf of which anything
moves, or a part goes, is split first (TDH.MEM.PAGE.DEMOTE).

KVM (arch/x86/kvm/vmx/tdx.c, v6.18) has tdx_sept_remove_private_spte() and tdx_track(), and no
relocation: it asks that nothing moves. Units: gfns in half-open ranges, hpas in bytes.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from hwemu.tdx import Status, TdxError, TdxModule
from hwemu.tdx.entry import STATES, SeptState, hpa_of
from hwemu.tdx.sept import Walk
from hwemu.tdx.td import Td
from kvmsim.attributes import Attributes
from kvmsim.confidential.encryption import GuestPages
from kvmsim.confidential.platform import HpaMemory
from kvmsim.uapi import PAGE_SHIFT

log = logging.getLogger(__name__)

_GONE: Final = frozenset((SeptState.FREE, SeptState.REMOVED))


class Fate(enum.IntEnum):
    """What becomes of a gfn's page; the greater wins."""

    STAYS = 0
    MOVES = 1
    GOES = 2


class Tables(Protocol):
    """Who has pages for S-EPT tables."""

    def take(self) -> int:
        """The hpa of a page; MemoryError."""

    def give(self, hpa: int) -> None:
        """Take it back."""


class Leaving:
    """The entries of one TD that are blocked, and why (lock of VM and platform held).

    ``unmap(gpa, npages)`` clears leaves of the second stage.
    """

    def __init__(
        self,
        module: TdxModule,
        tdr: int,
        memory: HpaMemory,
        pages: GuestPages,
        tables: Tables,
        unmap: Callable[[int, int], object],
    ) -> None:
        self._module = module
        self._tdr = tdr
        self._memory = memory
        self._pages = pages
        self._tables = tables
        self._unmap = unmap
        self._fate = Attributes()
        self._blocked: set[tuple[int, int]] = set()  #: (gpa, level) that are not done with

    def zap(self, gfn: int, npages: int, *, moving: bool) -> None:
        """Block what is mapped there; what it is that moves, or goes.

        A large leaf that reaches out of the range is blocked as a whole, to be split; its shadow
        goes, and what of it stays the guest's is found again by the next fault.
        """
        blocked = False
        for gpa, level, state in self._leaves(gfn, gfn + npages):
            first, span = gpa >> PAGE_SHIFT, 1 << 9 * level
            inside = max(gfn, first), min(gfn + npages, first + span)
            if STATES[state].blocked is not None:
                self._module.mem_range_block(self._tdr, gpa, level)
                blocked = True
                if inside[1] - inside[0] < span:
                    self._unmap(gpa, span)
            self._doom(*inside, Fate.MOVES if moving else Fate.GOES)
            self._blocked.add((gpa, level))
        if blocked:
            self._track()

    def settle(self) -> bool:
        """Remove or split what is tracked; whether another flush has to be proven first."""
        for gpa, level in list(self._blocked):
            first, span = gpa >> PAGE_SHIFT, 1 << 9 * level
            at = self._td.tree.walk(gpa, level)
            page = hpa_of(at.word, at.level)
            if not self._td.tracked(self._module.pamt.bepoch(page, level)):
                continue
            fates = {run.value for run in self._fate.runs(first, first + span)}
            if fates == {Fate.GOES}:
                self._module.mem_page_remove(self._tdr, gpa, level)
                self._pages.forget(page, span)
                self._fate.set(first, first + span, Fate.STAYS)
            elif level:
                self._split(gpa, level)
            self._blocked.remove((gpa, level))
        if self._blocked:
            self._track()
        return bool(self._blocked)

    def moves(self, gfn: int) -> bool:
        """Whether the page of ``gfn`` is still where its owner has it no more."""
        return self._fate.get(gfn) == Fate.MOVES

    def relocate(self, gfn: int, npages: int, old: int, new: int) -> None:
        """Let entries that wait at hpa ``old`` lead to ``new``, where the contents are.

        What the module refuses stays blocked where it is, and is the guest's to lose alone.
        """
        for run in list(self._fate.runs(gfn, gfn + npages)):
            if run.value != Fate.MOVES:
                continue
            offset = run.start - gfn << PAGE_SHIFT
            done = self._relocate(run.start, run.end, old + offset, new + offset)
            if done > run.start:
                self._fate.set(run.start, done, Fate.STAYS)

    def _relocate(self, start: int, end: int, old: int, new: int) -> int:
        """The first gfn of [start, end) that was refused, ``end`` if none was."""
        gfn = start
        with self._memory.copied(old, new, end - start):
            try:
                for gfn in range(start, end):
                    offset = gfn - start << PAGE_SHIFT
                    gpa = gfn << PAGE_SHIFT
                    at = self._td.tree.walk(gpa, 0)
                    if (at.level, hpa_of(at.word, at.level)) != (0, old + offset):
                        raise RuntimeError(_lost(gpa, at, old + offset))
                    self._module.mem_page_relocate(self._tdr, gpa, new + offset)
                gfn = end
            except TdxError as error:
                log.warning("gpa %#x stays blocked at hpa %#x: %s", gfn << PAGE_SHIFT,
                            old + (gfn - start << PAGE_SHIFT), error)  # fmt: skip
        self._pages.moved(old, new, gfn - start)
        return gfn

    @property
    def _td(self) -> Td:
        return self._module.td(self._tdr)

    def _doom(self, start: int, end: int, fate: Fate) -> None:
        for run in list(self._fate.runs(start, end)):
            if run.value < fate:
                self._fate.set(run.start, run.end, fate)

    def _split(self, gpa: int, level: int) -> None:
        """TDH.MEM.PAGE.DEMOTE: 512 leaves, none of them blocked; block those that do not stay."""
        table = self._tables.take()
        try:
            self._module.mem_page_demote(self._tdr, gpa, level, table)
        except BaseException:
            self._tables.give(table)
            raise
        first, below = gpa >> PAGE_SHIFT, level - 1
        span = 1 << 9 * below
        for run in self._fate.runs(first, first + (span << 9)):
            if run.value == Fate.STAYS:
                continue
            for gfn in range(run.start & -span, run.end, span):
                if (gfn << PAGE_SHIFT, below) not in self._blocked:
                    self._module.mem_range_block(self._tdr, gfn << PAGE_SHIFT, below)
                    self._blocked.add((gfn << PAGE_SHIFT, below))

    def _track(self) -> None:
        """TDH.MEM.TRACK; while a vCPU of the epoch before the last runs it has to wait."""
        try:
            self._module.mem_track(self._tdr)
        except TdxError as error:
            if error.code is not Status.PREVIOUS_TLB_EPOCH_BUSY:
                raise

    def _leaves(self, start: int, end: int) -> Iterator[tuple[int, int, SeptState]]:
        """Leaves (gpa, level, state) that map any of gfns [start, end)."""
        gfn = start
        while gfn < end:
            at = self._td.tree.walk(gfn << PAGE_SHIFT, 0)
            gfn &= -(1 << 9 * at.level)
            if at.state not in _GONE:
                yield gfn << PAGE_SHIFT, at.level, at.state
            gfn += 1 << 9 * at.level


def _lost(gpa: int, at: Walk, hpa: int) -> str:
    where = hpa_of(at.word, at.level)
    return (
        f"gpa {gpa:#x} waits at hpa {hpa:#x} to be relocated, and its entry is {at.state.name} of "
        f"hpa {where:#x}, level {at.level}"
    )
