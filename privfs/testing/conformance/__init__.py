# SPDX-License-Identifier: GPL-2.0-or-later
"""A conformance suite for private memory files: what does each operation answer?

A row is an operation on a fresh file and the answer of each kind of file that is known to exist;
see docs/conformance.md.  :func:`run` yields the outcomes of a target.
"""

from privfs.testing.conformance.catalogue import ROWS
from privfs.testing.conformance.row import COLUMNS, REFERENCE, Mode, Row, Start
from privfs.testing.conformance.runner import SKIPPED, run
from privfs.testing.conformance.subject import Subject
from privfs.testing.conformance.targets import Directory, GuestMemfd, Memfd, Target

__all__ = [
    "COLUMNS", "REFERENCE", "ROWS", "SKIPPED", "Directory", "GuestMemfd", "Memfd", "Mode", "Row",
    "Start", "Subject", "Target", "run",
]  # fmt: skip
