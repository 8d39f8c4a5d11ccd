# SPDX-License-Identifier: GPL-2.0-or-later
"""What the fences of an emulator cost, each beside none.

No engine and no owner take part: between them a fault takes a hundred times as long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from model import Bench, Case, Measure, Placement, Sample, Unit
from spawn import latency, measure, probe

_KINDS = ("uffd", "mprotect")
_PARTS = {"grant": "a page granted, and touched", "punch": "a page zapped, and punched"}


def _round(kind: str, fence: str, bench: Bench, placement: Placement) -> dict[str, Sample]:
    """Measure a fence; the rows are those of ``kind``."""
    found = measure(probe("fence", fence, bench.counts.pages), placement.caller)
    return {f"{kind}_{part}": latency(found[part]) for part in _PARTS}


@contextlib.contextmanager
def _side(kind: str, fence: str, bench: Bench, placement: Placement) -> Iterator[Measure]:
    yield partial(_round, kind, fence, bench, placement)


CASES = tuple(
    Case(
        f"fence_{kind}", Unit.MICROSECONDS,
        {f"{kind}_{part}": f"{what}, behind {kind}" for part, what in _PARTS.items()},
        partial(_side, kind, kind), partial(_side, kind, "none"), "no fence", ("same",),
    )
    for kind in _KINDS
)  # fmt: skip
