# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m privfs.testing.conformance``: list, run, differences."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from privfs.testing.conformance import apart, model, report
from privfs.testing.conformance.catalogue import ROWS
from privfs.testing.conformance.row import COLUMNS, REFERENCE, Mode, Outcome, Row, Start
from privfs.testing.conformance.runner import SKIPPED, run
from privfs.testing.conformance.targets import Directory, GuestMemfd, Memfd, Target

_PAGE = "docs/differences.md"


def main() -> int:
    """Run the command line; 1 if an outcome is not the expected one."""
    parser = argparse.ArgumentParser(prog="scripts/conformance", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="show the rows and what is expected")
    listing.add_argument("pattern", nargs="?", default="*", help="of row names, as in a shell")
    running = commands.add_parser("run", help="run rows on a target", description=apart.__doc__)
    running.add_argument("target", help="a target or a directory for fresh files")
    running.add_argument(
        "--against",
        choices=COLUMNS,
        default="memfd",
        help="what files in a directory are compared with (memfd)",
    )
    running.add_argument("--rows", default="*", metavar="PATTERN")
    running.add_argument("--vast", action="store_true", help="also rows that may take a terabyte")
    running.add_argument("--personality", choices=REFERENCE, help=argparse.SUPPRESS)
    running.add_argument("--mode", choices=[mode.value for mode in Mode], help=argparse.SUPPRESS)
    running.add_argument("--json", action="store_true", help="row names and outcomes, for scripts")
    drawing = commands.add_parser("differences", help=f"draw {_PAGE} from runs of mounts")
    drawing.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args()
    if options.command == "list":
        return _list(options.pattern)
    if options.command == "differences":
        return _differences(options.check)
    return _run(options)


def _list(pattern: str) -> int:
    for row in _rows(pattern):
        print(f"{row.name}  ({row.start.value}; {row.source})")
        for column, answer in row.want.items():
            print(f"    {column:10} {answer}")
    return 0


def _rows(pattern: str) -> list[Row]:
    return [row for row in ROWS if fnmatch.fnmatchcase(row.name, pattern)]


def _run(options: argparse.Namespace) -> int:
    rows = _rows(options.rows)
    try:
        found, expected = _outcomes(options, rows)
    except apart.Unable as missing:
        if options.json:
            print(json.dumps({"unable": str(missing)}))
            return 0
        print(f"{options.target}: {missing}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({"outcomes": found}))
        return 0
    wrong = 0
    for name, outcome in found.items():
        want = expected.get(name)
        differs = want is not None and outcome != want and not outcome.startswith(SKIPPED)
        wrong += differs
        print(f"{name:45} {outcome}" + (f"    EXPECTED {want}" if differs else ""))
    print(f"{len(found)} rows, {wrong} unexpected", file=sys.stderr)
    return 1 if wrong else 0


def _outcomes(
    options: argparse.Namespace, rows: list[Row]
) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
    """Return row → outcome and row → expected outcome."""
    mounted = apart.mounted(options.target)
    if mounted is not None:
        names = {row.name for row in rows}
        found = {name: o for name, o in apart.outcomes(options.target).items() if name in names}
        answers = {row.name: row.answer(mounted.personality, mounted.mode) for row in rows}
        return found, {name: answer for name, answer in answers.items() if answer is not None}
    kind, _, which = options.target.partition(":")
    if kind == "model" and which in REFERENCE:
        wanted = {row.name: model.expected(which, row) or "" for row in rows}
        return {row.name: outcome for row, outcome in model.run(which, rows)}, wanted
    with _target(options) as target:
        hanging: set[str] = set()
        if options.personality and options.mode:
            mode = Mode(options.mode)
            hanging = {row.name for row in rows if row.answer(options.personality, mode) == "hangs"}
            _check_mode(target, mode)
        vast = options.vast or bool(options.personality) or kind == "guest_memfd"
        found = {row.name: outcome for row, outcome in run(target, rows, hanging, vast)}
        return found, {row.name: row.want[target.column] for row in rows if row.name in found}


@contextlib.contextmanager
def _target(options: argparse.Namespace) -> Iterator[Target]:
    kind, _, which = options.target.partition(":")
    target: Target
    if options.target == "memfd":
        target = Memfd()
    elif kind == "guest_memfd" and which in ("0", "1", "3"):
        target = GuestMemfd(int(which))
    elif os.path.isdir(options.target):
        column = REFERENCE[options.personality] if options.personality else options.against
        target = Directory(options.target, column=column)
    else:
        raise SystemExit(f"{options.target}: neither a target nor a directory; see --help")
    if missing := target.why_not():
        raise apart.Unable(missing)
    try:
        yield target
    finally:
        target.close()


def _check_mode(target: Target, mode: Mode) -> None:
    """Raise Unable where a mount by root did not get passthrough: private mappings work then."""
    if mode is not Mode.PASSTHROUGH:
        return
    subject = target.make(Start.HOLES)
    try:
        mmap.mmap(subject.fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ).close()
    except OSError:
        return
    finally:
        target.discard(subject)
    raise apart.Unable("FUSE passthrough (Linux 6.9, POSIX message queues); see: privfs doctor")


def _differences(check: bool) -> int:
    path = Path(_PAGE)
    runs: dict[str, dict[Mode, dict[str, Outcome]]] = {}
    for name in report.TARGETS:
        which = apart.mounted(name)
        assert which is not None
        runs.setdefault(which.personality, {})[which.mode] = apart.outcomes(name)
    try:
        text = report.draw(runs)
    except report.Unexplained as unexplained:
        print(unexplained, file=sys.stderr)
        return 1
    if path.exists() and path.read_text() == text:
        return 0
    if check:
        print(f"{path} is stale; run scripts/conformance differences", file=sys.stderr)
        return 1
    path.write_text(text)
    print(f"{path} is written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
