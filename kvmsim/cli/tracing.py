# SPDX-License-Identifier: GPL-2.0-or-later
"""``--trace FILE``."""

from __future__ import annotations

from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.failure import Failure
from kvmsim.tracefile import TraceFile


def opened_trace(path: str, format: str | None) -> TraceFile:
    """A trace that is written to ``path``; Failure."""
    try:
        return TraceFile(path, format or "")
    except OSError as error:
        raise Failure(
            Exit.USAGE, f"--trace {path}: {error.strerror}; name a file that can be written"
        ) from None
