# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of private files: extents, each one memfd, of what the machine offers."""

from privfs.backing.memory import Backing, BackingError, Extent, Finding, Statistics

__all__ = ["Backing", "BackingError", "Extent", "Finding", "Statistics"]
