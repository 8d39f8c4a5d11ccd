# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of private files: extents, each one memfd, of a store that the mount chose."""

from privfs.backing.choice import STORES, choose, default_size
from privfs.backing.memory import Backing
from privfs.backing.store import Store, StoreError
from privfs.backing.values import BackingError, Extent, Finding, Statistics

__all__ = [
    "STORES", "Backing", "BackingError", "Extent", "Finding", "Statistics", "Store", "StoreError",
    "choose", "default_size",
]  # fmt: skip
