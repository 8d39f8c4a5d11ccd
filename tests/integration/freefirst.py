# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs`` with its first rule broken: PUNCH frees before it invalidates."""

from __future__ import annotations

import sys
from typing import Any

from privfs.cli.main import main
from privfs.memfile import MemFile
from privfs.operation import STEPS, Kind, Step

_needless = MemFile._needless


def free_first() -> None:
    """Swap the steps of a punch, and invalidate although nothing is allocated any more."""

    def needless(self: MemFile, active: Any, step: Step) -> bool:
        if active.kind is Kind.PUNCH and step is Step.INVALIDATE:
            return False
        return _needless(self, active, step)

    STEPS[Kind.PUNCH] = (Step.FREE, Step.INVALIDATE)
    MemFile._needless = needless  # type: ignore[method-assign]


if __name__ == "__main__":
    free_first()
    sys.exit(main())
