# SPDX-License-Identifier: GPL-2.0-or-later
"""The round trip that every punch contains: a record to the user, its answer back.

Ours is the owner (trio) and the lane (a plain thread) with all their bookkeeping, without FUSE;
the rival sends 40 bytes to and fro over the same kind of socket.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from itertools import count

from model import Bench, Case, Measure, Placement, Sample, Unit
from spawn import ROUND_SECONDS, floor, latency, measure, probe, serving

_serial = count(1)


def _ours(bench: Bench, placement: Placement) -> dict[str, Sample]:
    name = f"owner{next(_serial)}"
    file, path = bench.scratch / name, bench.scratch / f"{name}.socket"
    file.touch()
    command = probe("owner", path, file, bench.counts.calls)
    with serving(command, placement.server, ready=True) as owner:
        with serving(probe("light_user", path, file), placement.caller, ready=True):
            line = owner.line(ROUND_SECONDS)
    file.unlink()
    path.unlink()
    return {"invalidation": latency(json.loads(line)["round_trip"])}


def _rival(bench: Bench, placement: Placement) -> dict[str, Sample]:
    path = bench.scratch / f"echo{next(_serial)}.socket"
    with serving(floor(bench.floors, "echo_floor", "serve", path), placement.caller, ready=True):
        command = floor(bench.floors, "echo_floor", "measure", path, bench.counts.calls)
        found = measure(command, placement.server)
    return {"invalidation": latency(found["round_trip"])}


@contextlib.contextmanager
def _ours_side(bench: Bench, placement: Placement) -> Iterator[Measure]:
    yield partial(_ours, bench, placement)


@contextlib.contextmanager
def _rival_side(bench: Bench, placement: Placement) -> Iterator[Measure]:
    floor(bench.floors, "echo_floor")
    yield partial(_rival, bench, placement)


CASES = (
    Case(
        "invalidation", Unit.MICROSECONDS,
        {"invalidation": "INVALIDATE to one user and its ACK, without FUSE"},
        _ours_side, _rival_side, "echo_floor",
    ),
)  # fmt: skip
