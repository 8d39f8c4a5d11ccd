# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs`` that looks for touches of freed memory: ``watchful.py [--free-first] ARGUMENTS``.

Memory freed in a memfd comes back when a stale translation touches it, and disappears from the
audit's view once its page is allocated again.  So every allocation is watched: it must add
exactly the pages that the bitmap does not have.

``--free-first`` breaks the contract: PUNCH frees before it invalidates.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from privfs.cli.main import main
from privfs.memfile import MemFile
from privfs.notifier.effects import Work
from privfs.operation import STEPS, Kind, Step
from privfs.service import Call, Service

log = logging.getLogger("watchful")
FOUND = "freed memory was touched"

_perform = Service._perform
_needless = MemFile._needless


def perform(self: Service, work: Work, call: Call | None) -> tuple[int, int | None]:
    """Perform a step; after an allocation compare what it added with what was missing."""
    ino, (_, step, _, start, end, _) = work
    if step is not Step.ALLOCATE or call is not None:  # in a thread, others run beside it
        return _perform(self, work, call)
    missing = end - start - self.owner.files[ino].pages.range_cardinality(start, end)
    before = self.backing.blocks(ino)
    done = _perform(self, work, call)
    added = (self.backing.blocks(ino) - before) // 8
    if not done[0] and added != missing:
        log.warning("%s: pages [%#x, %#x): %d missing, %d added", FOUND, start, end, missing, added)
    return done


def free_first() -> None:
    """Swap the steps of a punch, and invalidate although nothing is allocated any more."""

    def needless(self: MemFile, active: Any, step: Step) -> bool:
        if active.kind is Kind.PUNCH and step is Step.INVALIDATE:
            return False
        return _needless(self, active, step)

    STEPS[Kind.PUNCH] = (Step.FREE, Step.INVALIDATE)
    MemFile._needless = needless  # type: ignore[method-assign]


if __name__ == "__main__":
    if "--free-first" in sys.argv:
        sys.argv.remove("--free-first")
        free_first()
    Service._perform = perform  # type: ignore[method-assign]
    sys.exit(main())
