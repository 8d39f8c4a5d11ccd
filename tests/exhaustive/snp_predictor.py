# SPDX-License-Identifier: GPL-2.0-or-later
"""What SEV-SNP answers, written a second time from the manuals' prose.

Nothing is shared with hwemu.snp.  Here a *page* is an object of one or ``group`` frames; a frame
that no page holds is the hypervisor's.  Answers are words and numbers; a method changes something
only if it answers 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

ALL = 0b1111


@dataclass
class Page:
    first: int
    frames: int
    asid: int
    gfn: int
    immutable: bool = False
    valid: bool = False
    vmsa: bool = False
    masks: list[int] = field(default_factory=lambda: [ALL, 0, 0, 0])


class Predictor:
    def __init__(self, frames: int, group: int, max_asid: int) -> None:
        self.frames, self.group, self.max_asid = frames, group, max_asid
        self.pages: list[Page] = []
        self.busy: set[int] = set()

    def find(self, frame: int) -> Page | None:
        for page in self.pages:
            if page.first <= frame < page.first + page.frames:
                return page
        return None

    def around(self, frame: int) -> list[Page]:
        """Pages in the same 2 MiB."""
        return [p for p in self.pages if p.first // self.group == frame // self.group]

    # -- the host ---------------------------------------------------------------------------------

    def rmpupdate(
        self, frame: int, assigned: bool, size: int, immutable: bool, gfn: int, asid: int
    ) -> int:
        if size > 1:
            return 1
        count = self.group if size else 1
        if frame % count or gfn % count:
            return 1
        if frame < 0 or frame + count > self.frames or asid > self.max_asid:
            return 1
        if not assigned and (asid or immutable):
            return 1
        if assigned and not asid and gfn:
            return 1
        old = self.find(frame)
        if old and old.immutable:
            return 2
        touched = set(range(frame, frame + count))
        if old:
            touched |= set(range(old.first, old.first + old.frames))
        if touched & self.busy:
            return 3
        if any(page.frames != count for page in self.around(frame)):
            # a page of 2M covers this one, or small ones are in its way
            return 4
        if old and assigned and asid and (old.asid, old.gfn) == (asid, gfn):
            # the same page of the same guest: it is lent to the AMD-SP, or stays as it is
            old.immutable = immutable
            return 0
        if old:
            self.pages.remove(old)
        if assigned:
            masks = [ALL, 0, 0, 0] if asid else [0, 0, 0, 0]
            self.pages.append(Page(frame, count, asid, gfn, immutable, masks=masks))
        return 0

    def psmash(self, frame: int) -> int:
        if frame % self.group or frame < 0 or frame + self.group > self.frames:
            return 1
        page = self.find(frame)
        if page and page.immutable:
            return 2
        if self.busy & set(range(frame, frame + self.group)):
            return 3
        if not page or page.frames == 1:
            return 4
        self.pages.remove(page)
        for step in range(self.group):
            # the pages of the AMD-SP have no address
            part = replace(page, first=frame + step, frames=1, masks=list(page.masks))
            part.gfn = page.gfn + step if page.asid else 0
            self.pages.append(part)
        return 0

    # -- the guest --------------------------------------------------------------------------------

    def mine(self, asid: int, gfn: int, frame: int) -> Page | None:
        """The page, if this guest may know of it at this address."""
        page = self.find(frame) if 0 <= frame < self.frames else None
        if page is None or page.asid != asid or page.immutable:
            return None
        return page if page.gfn + frame - page.first == gfn else None

    def sized(self, page: Page, size: int, level: int) -> str | int:
        if size and page.frames == 1:
            return 6
        if not size and (page.frames > 1 or level > 1):
            return "npf sizem"
        return 0

    def pvalidate(
        self, asid: int, vmpl: int, cpl: int, gfn: int, frame: int, level: int, size: int, yes: bool
    ) -> str | int:
        if vmpl or cpl:
            return "gp"
        if size > 1 or (size and gfn % self.group):
            return 1
        if size and level == 1:
            return 6
        page = self.mine(asid, gfn, frame)
        if page is None or self.busy & set(range(page.first, page.first + page.frames)):
            return "npf"
        wrong = self.sized(page, size, level)
        if wrong:
            return wrong
        if page.valid == yes:
            return 255
        page.valid = yes
        return 0

    def rmpadjust(
        self, asid: int, vmpl: int, cpl: int, gfn: int, frame: int, level: int, size: int,
        target: int, mask: int, vmsa: bool,
    ) -> str | int:  # fmt: skip
        if cpl:
            return "gp"
        if size > 1 or (size and gfn % self.group) or target > 3 or mask > ALL:
            return 1
        if target <= vmpl:
            return 2
        if size and level == 1:
            return 6
        page = self.mine(asid, gfn, frame)
        if page is None:
            return "npf"
        wrong = self.sized(page, size, level)
        if wrong:
            return wrong
        if not page.valid:
            return "vc"
        if mask | page.masks[vmpl] != page.masks[vmpl]:
            return 2
        if self.busy & set(range(page.first, page.first + page.frames)):
            return 3
        page.masks[target] = mask
        if vmpl == 0:
            page.vmsa = vmsa
        return 0

    # -- accesses ---------------------------------------------------------------------------------

    def host(self, kind: str, frame: int, level: int) -> str:
        if kind in ("write", "walk"):
            span = self.around(frame) if level > 1 else [self.find(frame)]
            if any(span):
                return "pf"
        return self.seen(frame)

    def seen(self, frame: int) -> str:
        page = self.find(frame)
        return "ciphertext" if page and page.asid else "plain"

    def guest(
        self, kind: str, asid: int, vmpl: int, cpl: int, gfn: int, frame: int, level: int,
        private: bool, snp: bool,
    ) -> str:  # fmt: skip
        if not snp or not (private or kind in ("fetch", "walk")):
            shared = self.host(kind, frame, level)
            return "npf" if shared == "pf" else shared
        page = self.mine(asid, gfn, frame)
        if page is None or (page.frames > 1) != (level > 1):
            return "npf enc"
        if not page.valid:
            return "vc"
        may_read, may_write, may_user, may_kernel = (
            page.masks[vmpl] >> bit & 1 for bit in range(4)
        )
        if kind == "fetch":
            allowed = may_user if cpl == 3 else may_kernel
        elif kind == "read":
            allowed = may_read
        else:
            allowed = may_read and may_write
        return "plain" if allowed else "npf enc vmpl"
