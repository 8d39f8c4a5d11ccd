# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure privfs beside the least that C can do, and print both.  Started by scripts/bench.

Times prove nothing here: nothing is asserted, the status is 0 whenever a report could be printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import machine
import report
from cases import CASES
from model import FULL, QUICK, Bench, Placement, Row
from runner import run

_leaving: list[int] = []
_FLOORS = Path(__file__).parent / "build"


def _cpus(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    allowed = os.sched_getaffinity(0)
    if not 1 <= len(found) <= 2 or len(set(found)) != len(found) or not set(found) <= allowed:
        raise argparse.ArgumentTypeError(
            f"{text!r}: one or two of the CPUs {','.join(map(str, sorted(allowed)))}"
        )
    return found


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a number from 1")
    return int(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure privfs beside the least that C can do, case by case, and print both: "
        "docs/benchmarks.md. Takes minutes; the machine should have nothing else to do.",
        epilog=f"Cases: {', '.join(names)}.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer iterations: shows that all of it works")
    add("--only", action="append", metavar="CASE", choices=names,
        help="this case only; may be repeated")  # fmt: skip
    add("--cpus", type=_cpus, metavar="A,B",
        help="caller's CPU and the server's; with one CPU all is on it (default: the first two)"
    )  # fmt: skip
    add("--rounds", type=_positive, metavar="N",
        help=f"rounds of either side in turn ({FULL.rounds}, with --quick {QUICK.rounds})"
    )  # fmt: skip
    add("--json", metavar="FILE", help="write the report as JSON; -: to stdout, without the table")
    add("--floors", type=Path, default=_FLOORS, metavar="DIR", help="where the C programs are")
    return parser.parse_args(arguments)


def _placements(cpus: list[int]) -> list[Placement]:
    found = [Placement("same", cpus[0], cpus[0])]
    if len(cpus) == 2:
        found.append(Placement("split", cpus[0], cpus[1]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases, print the report."""
    options = _parse(arguments)
    placements = _placements(options.cpus or sorted(os.sched_getaffinity(0))[:2])
    counts = QUICK if options.quick else FULL
    if options.rounds:
        counts = replace(counts, rounds=options.rounds)
    chosen = [case for case in CASES if not options.only or case.name in options.only]
    facts = machine.look()
    human = sys.stdout if options.json != "-" else sys.stderr
    print(*report.header(facts, placements, counts), sep="\n", file=human)
    for warning in facts.warnings():
        print(f"warning: {warning}", file=human)
    if len(placements) == 1:
        print("warning: one CPU only: nothing is measured across CPUs", file=human)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="privfs-bench.") as scratch:
        bench = Bench(Path(scratch), options.floors.absolute(), counts, _leaving)
        for case in chosen:
            for placement in placements:
                if placement.name in case.placements:
                    _say(f"{case.name} ({placement.name}) …")
                    rows += run(case, placement, bench)
    _say("")
    if options.json != "-":
        print(*report.table(rows), sep="\n")
    if options.json:
        text = json.dumps(report.as_json(facts, placements, counts, rows), indent=1) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)
    return 0


def _say(text: str) -> None:
    """Show what is being measured, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _leave(number: int, frame: object) -> None:
    """Unwind, so that mounts and processes end."""
    _leaving.append(128 + number)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for _number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(_number, _leave)
    with contextlib.suppress(BrokenPipeError):
        try:
            sys.exit(main())
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
