# SPDX-License-Identifier: GPL-2.0-or-later
"""What the AMD-SP answers, written a second time from the prose of its ABI.

Statuses are numbers of the ABI, 0 for success; a command changes something only if it answers 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from snp_predictor import ALL, Page, Predictor


@dataclass
class Guest:
    life: str = "init"
    asid: int = 0


class FirmwarePredictor(Predictor):
    def __init__(self, frames: int, group: int, max_asid: int) -> None:
        super().__init__(frames, group, max_asid)
        self.guests: dict[int, Guest] = {}
        self.dirty: dict[int, str] = {}  # ASIDs of guests that are gone: "caches", then "fabric"

    def at(self, frame: int) -> Page | None:
        """The page that begins here."""
        page = self.find(frame)
        return page if page and page.first == frame else None

    def psps(self, frame: int) -> bool:
        """Whether a Firmware page begins here, of which nothing has been made."""
        page = self.at(frame)
        return bool(page and page.immutable and not (page.asid or page.gfn or page.vmsa))

    def who(self, context: int, *lives: str) -> Guest | int:
        guest = self.guests.get(context)
        if guest is None:
            return 0x10
        return guest if guest.life in lives or not lives else 0x02

    def lent(self, frame: int) -> Page | None:
        page = self.at(frame)
        return page if page and page.immutable and page.asid else None

    # -- guests

    def gctx_create(self, frame: int) -> int:
        page = self.at(frame)
        if not self.psps(frame) or page is None:
            return 0x1A
        if page.frames > 1:
            return 0x19
        page.vmsa = True
        self.guests[frame] = Guest()
        return 0

    def launch_start(self, context: int) -> int:
        guest = self.who(context, "init")
        if isinstance(guest, int):
            return guest
        guest.life = "launch"
        return 0

    def activate(self, context: int, asid: int) -> int:
        guest = self.who(context, "launch", "running")
        if isinstance(guest, int):
            return guest
        if guest.asid:
            return 0x12
        if not 1 <= asid <= self.max_asid:
            return 0x0D
        if any(other.asid == asid for other in self.guests.values()):
            return 0x0C
        if asid in self.dirty:
            return 0x0F
        if any(page.asid == asid for page in self.pages):
            return 0x0C
        guest.asid = asid
        return 0

    def launch_update(self, context: int, frame: int, kind: int, size: int) -> int:
        found = self.who(context)
        if isinstance(found, int):
            return found
        page = self.lent(frame)
        if page is None or page.valid:
            return 0x1A
        if (page.frames > 1) != bool(size):
            return 0x19
        if not 1 <= kind <= 6:
            return 0x16
        if size and kind in (2, 5, 6):
            return 0x19
        if found.life != "launch":
            return 0x02
        if not found.asid:
            return 0x08
        if page.asid != found.asid:
            return 0x1C
        page.immutable, page.valid, page.vmsa = False, True, kind == 2
        page.masks = [ALL, 0, 0, 0]
        return 0

    def launch_finish(self, context: int) -> int:
        guest = self.who(context, "launch")
        if isinstance(guest, int):
            return guest
        guest.life = "running"
        return 0

    def decommission(self, context: int) -> int:
        guest = self.who(context)
        if isinstance(guest, int):
            return guest
        if guest.asid:
            self.dirty[guest.asid] = "caches"
        del self.guests[context]
        page = self.at(context)
        assert page is not None
        page.vmsa = False
        return 0

    def wbinvd(self) -> int:
        self.dirty = dict.fromkeys(self.dirty, "fabric")
        return 0

    def df_flush(self) -> int:
        if "caches" in self.dirty.values():
            return 0x0E
        self.dirty = {}
        return 0

    # -- pages

    def md_init(self, context: int, frame: int) -> int:
        found = self.who(context)
        if isinstance(found, int):
            return found
        if not self.psps(frame):
            return 0x1A
        if found.life == "init":
            return 0x02
        page = self.at(frame)
        assert page is not None
        page.gfn = context
        return 0

    def page_reclaim(self, frame: int, size: int) -> int:
        if not 0 <= frame < self.frames:
            return 0x09
        page = self.at(frame)
        if (page is not None and page.frames > 1) != bool(size):
            return 0x19
        if page is None or not page.immutable:
            return 0
        if frame in self.guests:
            return 0x1A
        page.immutable = False
        return 0

    def page_unsmash(self, frame: int) -> int:
        if frame % self.group:
            return 0x16
        pages = [self.lent(frame + step) for step in range(self.group)]
        first = pages[0]
        if first is None or first.gfn % self.group:
            return 0x1A
        for step, page in enumerate(pages):
            if page is None or page.frames > 1 or page.vmsa or page.gfn != first.gfn + step:
                return 0x1A
            if (page.asid, page.valid, page.masks) != (first.asid, first.valid, first.masks):
                return 0x1A
        for page in pages[1:]:
            assert page is not None
            self.pages.remove(page)
        first.frames = self.group
        return 0

    def page_move(self, context: int, source: int, target: int, size: int) -> int:
        found = self.who(context)
        if isinstance(found, int):
            return found
        for frame in (source, target):
            page = self.at(frame)
            if not 0 <= frame < self.frames or (page is not None and page.frames > 1) != bool(size):
                return 0x19
        if found.life == "init":
            return 0x02
        if not found.asid:
            return 0x08
        old, new = self.at(source), self.at(target)
        if old is None or new is None or old is new:
            return 0x1A
        if old.immutable and not old.asid and old.gfn:
            if not self.psps(target):
                return 0x1A
            if old.gfn != context:
                return 0x1C
            old.gfn, new.gfn, old.vmsa = 0, old.gfn, False
            return 0
        if not self.lent(source) or not self.lent(target) or new.valid:
            return 0x1A
        if old.asid != found.asid or new.asid != found.asid:
            return 0x1C
        new.gfn, new.vmsa, new.masks, new.valid = old.gfn, old.vmsa, list(old.masks), old.valid
        old.valid = old.immutable = new.immutable = False
        return 0
