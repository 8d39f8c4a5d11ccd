# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests of private memory need: an explorer of small worlds."""

from privfs.testing.explore import (
    STUCK,
    Report,
    StepFailed,
    System,
    World,
    confirm,
    explore,
    replay,
)
from privfs.testing.parts import Part, Parts, View
from privfs.testing.rows import Rows

__all__ = [
    "STUCK",
    "Part",
    "Parts",
    "Report",
    "Rows",
    "StepFailed",
    "System",
    "View",
    "World",
    "confirm",
    "explore",
    "replay",
]
