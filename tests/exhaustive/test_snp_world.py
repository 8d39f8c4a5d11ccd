# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that tries everything against two guests: every state of a world of two frames.

The frames are one page of "2M" or two small ones; guest 1 is being launched, guest 2 runs.  The
host assigns, remaps, smashes, lends and reclaims as it likes, in any order; the guests do what a
careful guest does: none validates an address that it believes to hold already.  What must hold then
is what SEV-SNP promises.  A rule switched off must be found: that is the test of this test.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Final

import pytest
from snp_machine import Nothing

from hwemu.snp import access, fwrules, guestops, hostops
from hwemu.snp.access import Granted, GuestAccess, HostAccess, Kind, guest_access, host_access
from hwemu.snp.firmware import Firmware
from hwemu.snp.fwstatus import FirmwareRefused
from hwemu.snp.guestcontext import Policy
from hwemu.snp.guestops import Leaf, Vcpu, pvalidate
from hwemu.snp.hostops import NewState, psmash, rmpupdate
from hwemu.snp.launch import PageType
from hwemu.snp.outcome import HostPageFault, Returned
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import PAGE_SIZE, Entry
from privfs.testing import Report, explore

pytestmark = pytest.mark.exhaustive

FRAMES: Final = (0, 1)
GCTX: Final = 2
#: The addresses that guests have: the first begins a page of "2M".
ADDRESSES: Final = {1: (0, 1), 2: (0,)}
Event = tuple[Hashable, ...]


def news() -> Iterator[tuple[int, int, int, int, bool]]:
    """What the host makes of a frame: (frame, asid, gfn, size, immutable); ASID 0 takes it back."""
    for frame in FRAMES:
        yield frame, 0, 0, 0, False
        for asid, addresses in ADDRESSES.items():
            for gfn in addresses:
                yield frame, asid, gfn, 0, False
        yield frame, 1, frame, 0, True
    for immutable in (False, True):
        yield 0, 1, 0, 1, immutable
    yield 0, 0, 0, 1, False


class World:
    """``held`` says which guest validated a frame at which gfn; ``believed`` what guests think."""

    def __init__(self) -> None:
        self.firmware = Firmware(Rmp(4, group=2, max_asid=2), Nothing())
        self.firmware.init()
        assert rmpupdate(self.firmware.rmp, GCTX, NewState(True, 0, True)).ok
        self.firmware.gctx_create(GCTX)
        self.firmware.launch_start(GCTX, int(Policy.MUST_BE_ONE | Policy.SMT))
        self.firmware.activate(GCTX, 1)
        self.life = "launch"
        self.held: dict[int, tuple[int, int]] = {}
        self.believed: frozenset[tuple[int, int]] = frozenset()

    def events(self) -> Iterator[Event]:
        for new in news():
            yield "rmpupdate", *new
        yield ("psmash",)
        for frame in FRAMES:
            for size in (0, 1):
                yield "reclaim", frame, size
                yield "launch", frame, size
        yield ("unsmash",)
        yield ("move",)
        yield ("finish",)
        yield ("teardown",)
        for asid, addresses in ADDRESSES.items():
            for frame in FRAMES:
                for gfn in addresses:
                    for validate in (True, False):
                        yield "pvalidate", asid, frame, gfn, 0, validate
        for validate in (True, False):
            yield "pvalidate", 1, 0, 0, 1, validate

    def step(self, event: Hashable) -> World | None:
        after = World.__new__(World)
        after.firmware, after.life = self.firmware.copy(), self.life
        after.held, after.believed = dict(self.held), self.believed
        assert isinstance(event, tuple)
        name, *rest = event
        try:
            done = getattr(after, f"_{name}")(*rest)
        except FirmwareRefused:
            done = False
        return after if done else None

    # -- the host and the AMD-SP

    def _rmpupdate(self, frame: int, asid: int, gfn: int, size: int, immutable: bool) -> bool:
        old = [page for page in FRAMES if page == frame or size]
        was = self.firmware.rmp.entry(frame)
        large = was.large
        new = NewState(asid > 0, size, immutable, gfn * PAGE_SIZE, asid)
        if not rmpupdate(self.firmware.rmp, frame, new).ok:
            return False
        if asid and (was.asid, was.gpa) == (new.asid, new.gpa):
            return True  # the guest's page as before, but perhaps lent
        for page in FRAMES if large else old:
            self.held.pop(page, None)
        return True

    def _psmash(self) -> bool:
        return psmash(self.firmware.rmp, 0).ok

    def _reclaim(self, frame: int, size: int) -> bool:
        self.firmware.page_reclaim(frame, size)
        return True

    def _launch(self, frame: int, size: int) -> bool:
        """Put a page of the image in, once an address: else the owner refuses the measurement."""
        gfn = self.firmware.rmp.gpa(frame) // PAGE_SIZE
        if {(1, gfn), (1, gfn + size)} & self.believed:
            return False
        self.firmware.launch_update(GCTX, frame, PageType.NORMAL, size)
        self._hold(frame, 1)
        return True

    def _unsmash(self) -> bool:
        self.firmware.page_unsmash(0)
        return True

    def _move(self) -> bool:
        self.firmware.page_move(GCTX, 0, 1)
        moved = self.held.pop(0, None)
        if moved:
            self.held[1] = moved
        return True

    def _finish(self) -> bool:
        self.firmware.launch_finish(GCTX)
        self.life = "running"
        return True

    def _teardown(self) -> bool:
        """Guest 1 is given up; its context page goes back."""
        if self.life == "gone":
            return False
        self.firmware.decommission(GCTX)
        self.firmware.page_reclaim(GCTX)
        self.life = "gone"
        return rmpupdate(self.firmware.rmp, GCTX, NewState()).ok

    # -- the guests

    def _hold(self, page: int, asid: int) -> None:
        rmp = self.firmware.rmp
        for frame in range(page, page + rmp.pages(rmp.raw(page).size)):
            gfn = rmp.gpa(frame) // PAGE_SIZE
            self.held[frame] = (asid, gfn)
            self.believed |= {(asid, gfn)}

    def _pvalidate(self, asid: int, frame: int, gfn: int, size: int, validate: bool) -> bool:
        if asid == 1 and self.life != "running":
            return False
        gfns = {(asid, gfn), (asid, gfn + size)}
        if (gfns & self.believed) if validate else not gfns <= self.believed:
            return False
        rmp = self.firmware.rmp
        found = pvalidate(rmp, Vcpu(asid), Leaf(gfn * PAGE_SIZE, frame), size, validate=validate)
        if not isinstance(found, Returned) or not found.ok:
            return False
        for step in range(size + 1):
            self.held.pop(frame + step, None)
            if validate:
                self.held[frame + step] = (asid, gfn + step)
        self.believed = self.believed | gfns if validate else self.believed - gfns
        return True

    # -- what SEV-SNP promises

    def violations(self) -> str | None:
        rmp = self.firmware.rmp
        for frame in FRAMES:
            entry = rmp.entry(frame)
            owner = (entry.asid, rmp.gpa(frame) // PAGE_SIZE)
            if entry.validated and self.held.get(frame) != owner:
                return f"frame {frame} is validated, but not by its guest at its address"
            if frame in self.held and not entry.validated:
                return f"what {self.held[frame]} validated in frame {frame} is lost"
            if entry.assigned and not isinstance(
                host_access(HostAccess(rmp, frame, Kind.WRITE)), HostPageFault
            ):
                return f"the host writes to frame {frame}, which is not its own"
            for asid, addresses in ADDRESSES.items():
                for gfn in addresses:
                    leaf = Leaf(gfn * PAGE_SIZE, frame)
                    found = guest_access(GuestAccess(rmp, Vcpu(asid), leaf, Kind.READ))
                    if found is Granted.PLAIN and self.held.get(frame) != (asid, gfn):
                        return f"guest {asid} reads frame {frame} at gfn {gfn} without consent"
                    shared = GuestAccess(rmp, Vcpu(asid), leaf, Kind.WRITE, private=False)
                    if entry.assigned and isinstance(guest_access(shared), Granted):
                        return f"guest {asid} writes to frame {frame} as to a shared one"
        if len(set(self.held.values())) < len(self.held):
            return f"two frames serve one address: {self.held}"
        return None

    def key(self) -> Hashable:
        held = tuple(sorted(self.held.items()))
        return self.firmware.rmp.key(), self.life, held, tuple(sorted(self.believed))


def fair(event: Hashable) -> bool:
    """What a host does that wants its memory back."""
    assert isinstance(event, tuple)
    name, *rest = event
    return name in ("reclaim", "teardown") or (name == "rmpupdate" and rest[1] == 0)


def explored() -> Report:
    return explore(
        World(),
        goal=lambda world: world.life == "gone" and not world.firmware.rmp.assigned(0, 4),
        fair=fair,
    )


def test_the_promises_hold_whatever_the_host_does() -> None:
    report = explored()
    assert report.problem is None, report.script()
    assert report.stuck == 0
    assert report.complete
    assert report.states > 500


@pytest.mark.parametrize(
    ("module", "table", "must"),
    [
        (hostops, "RMPUPDATE", "no assigned page of the other size overlaps"),
        (guestops, "PVALIDATE", "the page is assigned to this guest"),
        (guestops, "PVALIDATE", "the page belongs at this gpa"),
        (access, "HOST_WRITE", "the page, of the mapping's size, is the hypervisor's"),
        (access, "SHARED_WRITE", "the page, of the mapping's size, is the hypervisor's"),
        (access, "PRIVATE", "the page is assigned to this guest"),
        (access, "PRIVATE", "the page belongs at this gpa"),
        (access, "PRIVATE", "the page is validated"),
    ],
)
def test_a_rule_switched_off_is_found(
    monkeypatch: pytest.MonkeyPatch, module: object, table: str, must: str
) -> None:
    rows = getattr(module, table)
    left = tuple(row for row in rows if row.must != must)
    assert len(left) == len(rows) - 1
    monkeypatch.setattr(module, table, left)
    report = explored()
    assert report.problem is not None
    assert report.trace is not None


@pytest.mark.parametrize("must", ["it was this guest's", "it belonged at this gpa"])
def test_keeping_too_much_is_found(monkeypatch: pytest.MonkeyPatch, must: str) -> None:
    left = tuple(row for row in hostops.KEPT if row.must != must)
    assert len(left) == len(hostops.KEPT) - 1
    monkeypatch.setattr(hostops, "KEPT", left)
    report = explored()
    assert report.problem is not None


def test_keeping_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a guest validated is lost on its way to Pre-Swap."""
    none = replace(hostops.KEPT[0], holds=lambda update: False)
    monkeypatch.setattr(hostops, "KEPT", (none,))
    report = explored()
    assert report.problem is not None
    assert "lost" in report.problem


def test_a_reassignment_that_keeps_validated_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Rmp.store

    def keeps(self: Rmp, pfn: int, entry: Entry) -> None:
        old = self.raw(pfn)
        if old.validated and not entry.validated and entry.asid and entry.gpa != old.gpa:
            entry = replace(entry, validated=True)
        plain(self, pfn, entry)

    monkeypatch.setattr(Rmp, "store", keeps)
    report = explored()
    assert report.problem is not None
    assert "validated" in report.problem


def test_a_launch_into_a_page_of_another_guest_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    command = next(command for command in fwrules.COMMANDS if command.name == "SNP_LAUNCH_UPDATE")
    rows = fwrules.COMMANDS[command]
    left = tuple(row for row in rows if row.must not in (
        "the page is a Pre-Guest page", "the page is the guest's"))  # fmt: skip
    assert len(left) == len(rows) - 2
    monkeypatch.setitem(fwrules.COMMANDS, command, left)
    assert explored().problem is not None
