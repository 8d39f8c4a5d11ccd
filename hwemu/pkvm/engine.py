# SPDX-License-Identifier: GPL-2.0-or-later
"""How a row of the table is checked and performed.

Each check is made of the whole range before the next is begun, in the kernel's order: the VM, the
range, leaves of the guest, then states and guards of one side after the other.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from hwemu.pkvm.guest import Guest, VmTable
from hwemu.pkvm.state import Component, PageState, PkvmError
from hwemu.pkvm.transition import TRANSITIONS, Deed, Guard, Side, Transition, Vm
from hwemu.pkvm.vmemmap import Pages, Vmemmap
from hwemu.runs import equal_runs


class Machine(Protocol):
    """What is done to the machine, in the order of the calls: an entry goes, then what was cached
    of it, and only then contents or owners change.

    ``flush_*`` return when no CPU has a translation of the range left.
    """

    def zero(self, pfn: int, npages: int) -> None:
        """Clear pages (hyp_poison_page())."""
        ...

    def copy_pages(self, source: int, target: int, npages: int) -> None:
        """Copy contents; both are pfns."""
        ...

    def flush_host(self, pfn: int, npages: int) -> None:
        """Invalidate what is cached of the host's stage 2."""
        ...

    def flush_guest(self, handle: int, gfn: int, npages: int) -> None:
        """Invalidate what is cached of a guest's stage 2."""
        ...


def pfn_runs(pfns: Pages) -> Iterator[tuple[int, int]]:
    """(first, count) of neighbours, in the order given."""
    cuts = np.flatnonzero(np.diff(pfns) != 1) + 1
    for run in np.split(pfns, cuts):
        if len(run):
            yield int(run[0]), len(run)


def state_runs(states: npt.NDArray[np.uint8]) -> Iterator[tuple[int, int, PageState]]:
    """(start, end, state) of neighbours with one state."""
    for start, end in equal_runs(states):
        yield start, end, PageState(int(states[start]))


def refuse(number: int, why: str, first: int, bad: npt.NDArray[np.bool_]) -> None:
    """Raise `PkvmError` for the first page that is bad, if any; ``first`` numbers the pages."""
    if bad.any():
        raise PkvmError(number, f"{why} at page {first + int(bad.argmax()):#x}")


def require(
    operation: str,
    whose: str,
    first: int,
    states: npt.NDArray[np.uint8],
    allowed: Iterable[PageState],
) -> None:
    """EPERM for the first page whose state is none of ``allowed``."""
    bad = np.ones(len(states), dtype=np.bool_)  # isin() is ten times slower for a page
    for state in allowed:
        bad &= states != state
    if bad.any():
        at = int(bad.argmax())
        raise PkvmError(
            errno.EPERM,
            f"{operation}: {whose} {first + at:#x} is {PageState(int(states[at])).name}, not "
            f"{' or '.join(state.name for state in allowed)}",
        )


class Engine:
    """Pages, VMs and the machine, and what a transition does to them."""

    def __init__(
        self, machine: Machine, vmemmap: Vmemmap, vms: VmTable, block_pages: int, max_shares: int
    ) -> None:
        self.machine = machine
        self.vmemmap = vmemmap
        self.vms = vms
        self.block_pages = block_pages
        self.max_shares = max_shares

    # -- checks ----------------------------------------------------------------------------------

    def guest(self, deed: Deed, handle: int) -> Guest:
        """The VM of ``handle``; EINVAL unless it is what ``deed`` needs."""
        guest = self.vms.get(deed.value, handle)
        need = TRANSITIONS[deed].vm
        if not _VM_IS[need](guest):
            kind = "protected" if guest.protected else "not protected"
            raise PkvmError(
                errno.EINVAL,
                f"{deed.value}: VM {handle:#x} is {kind}{', dying' * guest.dying}; it must be "
                f"{need.value}",
            )
        return guest

    def memory_rows(self, operation: str, pfn: int, npages: int) -> Pages:
        """Rows of a range of pfns; EINVAL unless all of it is memory."""
        if not self.vmemmap.is_memory(pfn, npages):
            raise PkvmError(
                errno.EINVAL, f"{operation}: pfns {pfn:#x}+{npages:#x} are not all memory"
            )
        return self.vmemmap.rows(np.arange(pfn, pfn + npages, dtype=np.int64))

    def check_gfns(self, operation: str, guest: Guest, gfn: int, npages: int) -> None:
        """EINVAL unless a range lies in the guest-physical space."""
        if gfn < 0 or npages < 1 or gfn + npages > guest.npages:
            raise PkvmError(
                errno.EINVAL,
                f"{operation}: gfns {gfn:#x}+{npages:#x} are not within the {guest.npages:#x} "
                f"pages of VM {guest.handle:#x}",
            )

    def check_block(self, operation: str, pfn: int, gfn: int, npages: int, block: bool) -> None:
        """__guest_check_transition_size(); several pages of 4 KiB may go at once here."""
        size = self.block_pages
        if block and (npages != size or pfn % size or gfn % size):
            raise PkvmError(
                errno.EINVAL,
                f"{operation}: pfn {pfn:#x}, gfn {gfn:#x}, {npages:#x} pages: a block has "
                f"{size:#x} and is aligned to that",
            )

    def leaves(
        self, operation: str, guest: Guest, gfn: int, npages: int, block: bool | None
    ) -> None:
        """Every gfn is mapped, by blocks or pages as ``block`` says (get_valid_guest_pte())."""
        self.check_gfns(operation, guest, gfn, npages)
        where = f"{operation}: VM {guest.handle:#x}"
        refuse(errno.ENOENT, f"{where}: no leaf", gfn, ~guest.valid(gfn, npages))
        if block is not None:
            other = guest.blocks(gfn, npages) != block
            kind = "page" if block else "block"
            refuse(errno.E2BIG, f"{where}: mapped by a {kind}", gfn, other)

    def _check_guard(self, guard: Guard, operation: str, first: int, rows: Pages) -> None:
        columns = self.vmemmap
        counts = columns.share_count[rows]
        if guard is Guard.UNPINNED:
            refuse(errno.EBUSY, f"{operation}: referenced", first, columns.refcount[rows] != 0)
        elif guard is Guard.SHARED_WITH_GUESTS:
            shared = columns.host_state[rows] == PageState.SHARED_OWNED
            refuse(
                errno.EPERM, f"{operation}: shared, not with guests", first, shared & (counts == 0)
            )
        else:
            refuse(
                errno.EBUSY,
                f"{operation}: shared {self.max_shares} times",
                first,
                counts >= self.max_shares,
            )

    # -- transitions -----------------------------------------------------------------------------

    def map_guest(
        self, deed: Deed, handle: int, pfn: int, gfn: int, npages: int, block: bool
    ) -> None:
        """Transitions that put pages of the host into a guest."""
        guest = self.guest(deed, handle)
        self.check_block(deed.value, pfn, gfn, npages, block)
        rows = self.memory_rows(deed.value, pfn, npages)
        self.check_gfns(deed.value, guest, gfn, npages)
        self._check(deed, rows, guest, gfn)
        self._perform(deed, rows, guest, gfn, block=block)

    def guest_pages(
        self, deed: Deed, guest: Guest, gfn: int, npages: int, *, block: bool | None
    ) -> None:
        """Transitions of pages that the guest has mapped already."""
        self.leaves(deed.value, guest, gfn, npages, block)
        rows = self.vmemmap.rows(guest.pfns(gfn, npages))
        self._check(deed, rows, guest, gfn)
        self._perform(deed, rows, guest, gfn, block=False)

    def replace(
        self, deeds: Mapping[PageState, Deed], guest: Guest, gfn: int, rows: Pages, *, block: bool
    ) -> None:
        """Transitions that put ``rows`` in the place of what the guest has, each by its state."""
        operation = next(iter(deeds.values())).value
        self.leaves(operation, guest, gfn, len(rows), block)
        states = guest.states(gfn, len(rows))
        require(operation, "guest's page", gfn, states, deeds)
        parts = list(state_runs(states))
        self._check_side(deeds[parts[0][2]], TRANSITIONS[deeds[parts[0][2]]].initiator, rows)
        for start, end, state in parts:
            side = TRANSITIONS[deeds[state]].replaced
            assert side is not None
            old = self.vmemmap.rows(guest.pfns(gfn + start, end - start))
            self._check_side(deeds[state], side, old)
        for start, end, state in parts:
            self._replace(deeds[state], guest, gfn + start, rows[start:end], block)

    def _replace(self, deed: Deed, guest: Guest, gfn: int, rows: Pages, block: bool) -> None:
        """Nobody reaches the old pages or the new ones while contents are copied."""
        row, columns, machine = TRANSITIONS[deed], self.vmemmap, self.machine
        assert row.replaced is not None
        gfns = np.arange(gfn, gfn + len(rows), dtype=np.int64)
        old = columns.rows(guest.pfns(gfn, len(rows)))
        guest.unmap(gfn, len(rows))
        machine.flush_guest(guest.handle, gfn, len(rows))
        for those in (old, rows):
            columns.set_host(those, PageState.NOPAGE, Component.GUEST, guest.handle, gfns)
            for pfn, npages in pfn_runs(those + columns.first):
                machine.flush_host(pfn, npages)
        new = int(rows[0]) + columns.first
        for pfn, npages in pfn_runs(old + columns.first):
            machine.copy_pages(pfn, new, npages)
            new += npages
            if row.zeroed:
                machine.zero(pfn, npages)
        columns.set_host(old, row.replaced.after)
        if row.initiator.after is not PageState.NOPAGE:
            columns.set_host(rows, row.initiator.after)
        guest.map(gfn, rows + columns.first, row.completer.after, block=block)

    def host_pages(self, deed: Deed, pfn: int, npages: int) -> None:
        """Transitions between host and hypervisor."""
        rows = self.memory_rows(deed.value, pfn, npages)
        self._check(deed, rows, None, 0)
        self._perform(deed, rows, None, 0, block=False)

    def _states(
        self, who: Component, rows: Pages, guest: Guest | None, gfn: int
    ) -> npt.NDArray[np.uint8]:
        if who is Component.GUEST:
            assert guest is not None
            return guest.states(gfn, len(rows))
        columns = self.vmemmap
        return (columns.host_state if who is Component.HOST else columns.hyp_state)[rows]

    def _check(self, deed: Deed, rows: Pages, guest: Guest | None, gfn: int) -> None:
        for side in TRANSITIONS[deed].checked:
            self._check_side(deed, side, rows, guest, gfn)

    def _check_side(
        self, deed: Deed, side: Side, rows: Pages, guest: Guest | None = None, gfn: int = 0
    ) -> None:
        first = int(rows[0]) + self.vmemmap.first
        require(
            deed.value,
            f"{side.who.name.lower()}'s page",
            gfn if side.who is Component.GUEST else first,
            self._states(side.who, rows, guest, gfn),
            side.before,
        )
        for guard in side.guards:
            self._check_guard(guard, deed.value, first, rows)

    def _perform(
        self, deed: Deed, rows: Pages, guest: Guest | None, gfn: int, *, block: bool
    ) -> None:
        """Entries that go go first, with what is cached of them; then contents; then what comes."""
        row = TRANSITIONS[deed]
        pfns = rows + self.vmemmap.first
        for side in _losing(row):
            self._store(side, row, deed, rows, guest, gfn, block)
            if side.who is Component.HOST:
                for pfn, npages in pfn_runs(pfns):
                    self.machine.flush_host(pfn, npages)
            elif side.who is Component.GUEST and guest is not None:
                self.machine.flush_guest(guest.handle, gfn, len(rows))
        if row.zeroed:
            for pfn, npages in pfn_runs(pfns):
                self.machine.zero(pfn, npages)
        for side in (row.initiator, row.completer):
            if side.after is not PageState.NOPAGE:
                self._store(side, row, deed, rows, guest, gfn, block)

    def _store(
        self,
        side: Side,
        row: Transition,
        deed: Deed,
        rows: Pages,
        guest: Guest | None,
        gfn: int,
        block: bool,
    ) -> None:
        columns, gone = self.vmemmap, side.after is PageState.NOPAGE
        if side.who is Component.HYP:
            columns.set_hyp(rows, side.after)
        elif side.who is Component.GUEST:
            assert guest is not None
            if gone:
                guest.unmap(gfn, len(rows))
            else:
                guest.map(gfn, rows + columns.first, side.after, block=block)
        elif gone:
            other = row.completer if side is row.initiator else row.initiator
            gfns = np.arange(gfn, gfn + len(rows), dtype=np.int64)
            if guest is None:
                columns.set_host(rows, side.after, other.who)
            else:
                columns.set_host(rows, side.after, other.who, guest.handle, gfns)
        elif deed is Deed.HOST_UNSHARE_GUEST:
            np.subtract.at(columns.share_count, rows, np.uint32(1))
            columns.set_host(rows[columns.share_count[rows] == 0], side.after)
        else:
            columns.set_host(rows, side.after)
            if deed is Deed.HOST_SHARE_GUEST:
                columns.share_count[rows] += np.uint32(1)


def _losing(row: Transition) -> Iterator[Side]:
    """Sides that have no access any more."""
    return (side for side in (row.initiator, row.completer) if side.after is PageState.NOPAGE)


_VM_IS: Final[Mapping[Vm, Callable[[Guest], bool]]] = {
    Vm.NONE: lambda guest: True,
    Vm.PROTECTED: lambda guest: guest.protected and not guest.dying,
    Vm.ORDINARY: lambda guest: not guest.protected and not guest.dying,
    Vm.ORDINARY_ANY: lambda guest: not guest.protected,
    Vm.DYING: lambda guest: guest.dying,
}
