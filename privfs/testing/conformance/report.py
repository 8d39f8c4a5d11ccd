# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/differences.md, drawn from what mounts answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from privfs.testing.conformance.apart import Mounted
from privfs.testing.conformance.catalogue import ROWS
from privfs.testing.conformance.reasons import REASONS, Cause
from privfs.testing.conformance.row import COLUMNS, REFERENCE, Mode, Outcome, Row
from privfs.testing.conformance.runner import SKIPPED

#: Personalities that stand for a kernel's file; resizable stands for itself.
COMPARED: Final = ("guest_memfd", "v7", "shim")
#: Everything that the page needs: `mount:` and `user:` of each.
TARGETS: Final = tuple(f"{kind}:{who}" for who in COMPARED for kind in ("mount", "user"))

Found = Mapping[Mode, Mapping[str, Outcome]]

_HEAD: Final = """# Differences

<!-- drawn from runs of the conformance suite by scripts/conformance; do not edit -->

What a mount cannot answer, or does not want to answer, as the kernel's own files do. Each row of
the conformance suite ([conformance.md](conformance.md)) was put to a mount by root, where the
kernel itself refuses (*passthrough*), and to a mount by an ordinary user, where the daemon does
(*direct_io*). Rows that are not here are answered alike.
"""


class Unexplained(Exception):
    """Rows differ and nothing says why."""


def answered(row: Row, who: Mounted, found: Mapping[str, Outcome]) -> Outcome:
    """Return what a mount answered; what the machine could not try counts as expected."""
    outcome = found.get(row.name, SKIPPED)
    return (row.answer(who.personality, who.mode) or "") if outcome.startswith(SKIPPED) else outcome


def reason_of(row: Row, who: Mounted, outcome: Outcome) -> str | None:
    """Return the key of the reason for a difference, None if it has none."""
    differs = row.difference(who.personality, who.mode)
    return differs.reason if differs is not None and differs.answer == outcome else None


def draw(runs: Mapping[str, Found]) -> str:
    """Draw the page from personality → mode → row → outcome; raises Unexplained."""
    unexplained: list[str] = []
    parts = [_personality(who, runs[who], unexplained) for who in COMPARED]
    if unexplained:
        raise Unexplained("differences without a reason:\n" + "\n".join(unexplained))
    return "\n".join([_HEAD, _summary(runs), *parts]).rstrip() + "\n"


def _differing(
    personality: str, found: Found
) -> Iterable[tuple[Row, Outcome, dict[Mode, Outcome]]]:
    for row in ROWS:
        ideal = row.want.get(REFERENCE[personality])
        if ideal is None:
            continue
        answers = {mode: answered(row, Mounted(personality, mode), found[mode]) for mode in Mode}
        if any(answer != ideal for answer in answers.values()):
            yield row, ideal, answers


def _summary(runs: Mapping[str, Found]) -> str:
    lines = ["| stands for | rows | differ with passthrough | differ with direct_io |",
             "|---|---|---|---|"]  # fmt: skip
    for who in COMPARED:
        rows = sum(REFERENCE[who] in row.want for row in ROWS)
        differing = list(_differing(who, runs[who]))
        counts = [
            str(sum(answers[mode] != ideal for _, ideal, answers in differing)) for mode in Mode
        ]
        lines.append(f"| {COLUMNS[REFERENCE[who]]} | {rows} | {counts[0]} | {counts[1]} |")
    return "\n".join(lines) + "\n"


def _personality(who: str, found: Found, unexplained: list[str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for row, ideal, answers in _differing(who, found):
        keys = {
            mode: reason_of(row, Mounted(who, mode), answer)
            for mode, answer in answers.items()
            if answer != ideal
        }
        for mode, key in keys.items():
            if key is None:
                unexplained.append(
                    f"{who}, {mode.value}: {row.name}: {answers[mode]} instead of {ideal}"
                )
        key = next((key for key in keys.values() if key is not None), "")
        cells = [row.name, ideal, *(answers[mode] for mode in Mode)]
        shown = [f"`{cell.replace('|', chr(92) + '|')}`" for cell in cells]
        by_reason.setdefault(key, []).append("| " + " | ".join(shown) + " |")
    text = [f"## {who}: {COLUMNS[REFERENCE[who]]}\n"]
    for cause in Cause:
        of_cause = [key for key in REASONS if key in by_reason and REASONS[key].cause is cause]
        if of_cause:
            text.append(f"### {cause.value}\n")
        for key in of_cause:
            text += [
                f"{REASONS[key].text}\n",
                f"| row | {REFERENCE[who]} | passthrough | direct_io |",
                "|---|---|---|---|",
                *by_reason[key],
                "",
            ]
    return "\n".join(text)
