# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks tried, and held against what is expected of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmsim.attack.catalog import Attack, run
from kvmsim.attack.expected import Row, expected
from kvmsim.attack.guest import Ended
from kvmsim.attack.lab import TECHNOLOGIES, Lab
from kvmsim.attack.mounting import mounted
from kvmsim.attack.outcome import AttackError, Outcome
from kvmsim.uapi import KvmError


@dataclass(frozen=True, slots=True)
class Tried:
    """One attack on one kind; ``outcome`` None: it could not be tried, ``error`` says why."""

    name: str
    kind: str
    outcome: Outcome | None
    row: Row
    error: str = ""

    @property
    def as_expected(self) -> bool:
        """Whether it ended as the table says."""
        return self.outcome == self.row.outcome

    def plain(self) -> dict[str, Any]:
        """The same in plain values."""
        return {
            "attack": self.name,
            "kind": self.kind,
            "outcome": None if self.outcome is None else self.outcome.plain(),
            "expected": self.row.outcome.plain(),
            "as_expected": self.as_expected,
            "why": self.row.why,
            "source": self.row.source,
            "error": self.error,
        }


def tried(attacks: Sequence[Attack], kinds: Sequence[str], image: bytes) -> Iterator[Tried]:
    """Try attacks on kinds, one after the other, each kind on a mount of its own; NoMount."""
    for kind in kinds:
        with contextlib.ExitStack() as stack:
            folder = Path(os.devnull)  # of the kind that nobody boots
            if kind in TECHNOLOGIES:
                folder = stack.enter_context(mounted())
            lab = stack.enter_context(Lab(kind, folder, image))
            for attack in attacks:
                yield _try(attack, lab, expected(attack.name, kind))


def _try(attack: Attack, lab: Lab, row: Row) -> Tried:
    try:
        return Tried(attack.name, lab.kind, run(attack, lab), row)
    except (AttackError, Ended, OSError, KvmError) as error:
        lab.spend()
        return Tried(attack.name, lab.kind, None, row, f"{type(error).__name__}: {error}")
