# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest instructions a second on the emulated vCPU, and the same loops on the processor itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from model import Bench, Case, Measure, Placement, Sample, Unit
from spawn import floor, measure, probe

_ROWS = {"count": "dec, jnz", "memory": "load, add, store, dec, jnz"}


def _ours(loop: str, bench: Bench, placement: Placement) -> dict[str, Sample]:
    command = probe("instructions", loop, bench.counts.guest_iterations)
    return {f"guest_{loop}": Sample(measure(command, placement.caller)["instructions_per_second"])}


def _rival(loop: str, bench: Bench, placement: Placement) -> dict[str, Sample]:
    command = floor(bench.floors, "cpu_floor", bench.counts.native_iterations, 1)
    return {f"guest_{loop}": Sample(measure(command, placement.caller)[f"{loop}_mips"] * 1e6)}


@contextlib.contextmanager
def _ours_side(loop: str, bench: Bench, placement: Placement) -> Iterator[Measure]:
    yield partial(_ours, loop, bench, placement)


@contextlib.contextmanager
def _rival_side(loop: str, bench: Bench, placement: Placement) -> Iterator[Measure]:
    floor(bench.floors, "cpu_floor")
    yield partial(_rival, loop, bench, placement)


CASES = tuple(
    Case(
        f"guest_{loop}", Unit.INSTRUCTIONS, {f"guest_{loop}": what},
        partial(_ours_side, loop), partial(_rival_side, loop), "cpu_floor", ("same",),
    )
    for loop, what in _ROWS.items()
)  # fmt: skip
