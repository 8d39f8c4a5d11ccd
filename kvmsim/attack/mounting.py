# SPDX-License-Identifier: GPL-2.0-or-later
"""A mount for attacks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from kvmsim.exec.memory import temporary_mount


def mounted(*options: str) -> AbstractContextManager[Path]:
    """A mount of its own in a process of its own, with mount options; NoMount."""
    return temporary_mount(",".join(("size=256M", *options)))
