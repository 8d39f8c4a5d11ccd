# SPDX-License-Identifier: GPL-2.0-or-later
"""What a private file is, whatever is under way on it: size, pages, extents, promises, quota.

:class:`~privfs.memfile.MemFile` adds the operations, and decides when pages and size change.

Units: pages of 4096 bytes in half-open ranges, except ``size`` (bytes).
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Hashable, Iterable, Iterator
from typing import Self

from pyroaring import BitMap

from privfs import seals
from privfs.budget import Budget
from privfs.personality import PAGE_SIZE, Personality, Refused


class HostView(enum.Enum):
    """What the host sees of a file that it may map."""

    NOTHING = "every touch is SIGBUS"
    PAGES = "the pages that guests have"


class FileState:
    """One private file, as it stands.

    ``size`` is in bytes, ``pages`` the bitmap of allocated pages, ``instances`` maps the index of
    a living extent to its instance number, which is never used again.  ``quota`` bounds the pages
    of this file, 0 is no bound of its own.  ``purpose`` is what its first user asked for,
    ``users`` counts those that it is promised to now.
    """

    __slots__ = ("_budget", "_next_instance", "dead", "host", "instances", "pages", "personality",
                 "purpose", "quota", "seals", "size", "users")  # fmt: skip

    def __init__(self, personality: Personality, budget: Budget, quota: int = 0) -> None:
        self.personality = personality
        self.quota = quota
        self.seals = seals.Seal(personality.seals or 0)
        self.purpose: seals.Purpose | None = None
        self.users = 0
        self.host: HostView | None = None
        self.size = 0
        self.pages = BitMap()
        self.instances: dict[int, int] = {}
        self.dead = False
        self._budget = budget
        self._next_instance = 1

    # --- promises -----------------------------------------------------------------------------

    def add_seals(self, mask: int, *, stores: bool) -> None:
        """Add seals, as F_ADD_SEALS; ``stores`` says whether a user may be storing.

        EINVAL for unknown seals or a file that has none, and for F_SEAL_WRITE where no user can
        be kept from storing; EPERM once sealed against more, EBUSY for F_SEAL_WRITE while there
        are users that may store (``mapping_deny_writable``).
        """
        what = f"add seals {mask:#x}"
        if self.personality.seals is None or mask & ~int(seals.ALL_SEALS):
            raise Refused(errno.EINVAL, f"{what}: not on files of {self.personality.name}")
        if mask & seals.Seal.WRITE and not self.personality.read_only_users:
            raise Refused(errno.EINVAL, f"{what}: descriptors of this memory are never read-only")
        seals.check(self.seals, seals.Deed.SEAL, what)
        if mask & seals.Seal.WRITE and not self.seals & seals.Seal.WRITE and stores:
            raise Refused(errno.EBUSY, f"{what}: users hold grants for stores; let them leave")
        self.seals |= seals.Seal(mask)

    def promise(self, wanted: int) -> None:
        """Bind the file to a purpose: the first user's counts, later ones must ask for it too."""
        what = f"register for purpose {wanted:#x}"
        if wanted & ~int(seals.ALL_PURPOSES):
            raise Refused(errno.EINVAL, f"{what}: unknown bits")
        asked = seals.Purpose(wanted) | seals.Purpose.USER_INACCESSIBLE
        if self.purpose is None:
            self.purpose = asked
        elif self.purpose != asked:
            held = "|".join(seals.names(self.purpose))
            raise Refused(errno.EINVAL, f"{what}: the file is bound to {held}")

    # --- the host -----------------------------------------------------------------------------

    @property
    def shared(self) -> bool:
        """Whether the host may touch pages, and so allocate them without asking."""
        return self.host is HostView.PAGES

    def adopt(self, runs: Iterable[tuple[int, int]]) -> None:
        """Count pages that the host has touched; there is no budget that could refuse them."""
        if self.dead:
            return
        before = len(self.pages)
        for start, end in runs:
            self.pages.add_range(start, min(end, self.size // PAGE_SIZE))
        self._budget.used += len(self.pages) - before

    # --- pages and extents --------------------------------------------------------------------

    @property
    def allocated(self) -> int:
        """Allocated pages."""
        return len(self.pages)

    def data_from(self, page: int) -> int | None:
        """Return the first allocated page at or after ``page``."""
        before = self.pages.rank(page - 1) if page else 0
        return self.pages[before] if before < len(self.pages) else None

    def holes(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the runs of pages of ``[start, end)`` that are not allocated, in order."""
        page = start
        while page < end:
            if page in self.pages:
                page = self.hole_from(page)
                continue
            data = self.data_from(page)
            last = end if data is None else min(data, end)
            yield page, last
            page = last

    def hole_from(self, page: int) -> int:
        """Return the first page at or after ``page`` that is not allocated."""
        if page not in self.pages:
            return page
        low, step = page + 1, 1  # [page, low) is allocated
        while self.pages.range_cardinality(low, low + step) == step:
            low, step = low + step, step * 2
        high = low + step  # somewhere in [low, high] is the first hole
        while low < high:
            middle = (low + high) // 2
            if self.pages.range_cardinality(low, middle + 1) == middle + 1 - low:
                low = middle + 1
            else:
                high = middle
        return low

    def living(self, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """List the extents that lie wholly in ``[start, end)``, as ``(index, instance)``."""
        inside = self.personality.layout.within(start, end)
        fewer = inside if len(inside) < len(self.instances) else sorted(self.instances)
        return tuple((i, self.instances[i]) for i in fewer if i in inside and i in self.instances)

    def renew(self, index: int) -> int:
        """Let a new extent be number ``index``; return its instance number."""
        new = self.instances[index] = self._next_instance
        self._next_instance += 1
        return new

    def hold(self, start: int, end: int) -> int:
        """Add pages and the extents that they need; return how many pages are new.

        Nothing is counted: they have been reserved.
        """
        added = end - start - self.pages.range_cardinality(start, end)
        self.pages.add_range(start, end)
        for index, _, _ in self.personality.layout.split(start, end):
            if index not in self.instances:
                self.renew(index)
        return added

    # --- room ---------------------------------------------------------------------------------

    def reserve(self, pages: int, growing: int) -> None:
        """Reserve pages of the file's quota and of the mount's budget, or change nothing.

        ``growing`` pages are reserved already by what is under way.
        """
        held = len(self.pages) + growing
        if self.quota and pages and held + pages > self.quota:
            raise Refused(
                errno.ENOSPC,
                f"{pages} pages wanted, the file holds {held} and may hold {self.quota}: "
                "punch holes in it, or mount with a larger -o quota=",
            )
        self._budget.reserve(pages)

    def reserve_copy(self, start: int, end: int) -> int:
        """Reserve room for a second copy of what an extent holds; no quota is asked.

        The file holds no more for it in the end, but for a while the mount does.
        """
        held = self.pages.range_cardinality(start, end)
        try:
            self._budget.reserve(held)
        except Refused as refused:
            raise Refused(
                refused.errno, f"{refused}; while an extent moves, the mount holds it twice"
            ) from None
        return held

    # --- as a value ---------------------------------------------------------------------------

    def key(self) -> Hashable:
        """Return the state as a hashable value."""
        return (
            self.size, tuple(self.pages), tuple(sorted(self.instances.items())), self.dead,
            self.seals, self.purpose, self.users, self.host,
        )  # fmt: skip

    def copy(self, budget: Budget) -> Self:
        """Return an independent copy that draws on ``budget``."""
        twin = type(self).__new__(type(self))
        twin.personality = self.personality
        twin.size = self.size
        twin.pages = self.pages.copy()
        twin.instances = self.instances.copy()
        twin.dead = self.dead
        twin.quota, twin.seals, twin.purpose = self.quota, self.seals, self.purpose
        twin.users = self.users
        twin.host = self.host
        twin._budget = budget
        twin._next_instance = self._next_instance
        return twin
