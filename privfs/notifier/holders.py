# SPDX-License-Identifier: GPL-2.0-or-later
"""Who was ever given the memfd of an extent, and so may have touched it since.

A descriptor cannot be taken back, and a process may hand it on.  So a touch of freed memory is
somebody's for certain only if no other process was ever given that instance of the extent; and
nobody is left who could touch it only if all who were are proven dead.
"""

from __future__ import annotations

from typing import NamedTuple

Instance = tuple[int, int]  #: inode, number of the extent's instance


class Holders(NamedTuple):
    """Who may touch an instance.  ``left``: somebody has said goodbye, and may still live."""

    alive: frozenset[int]  #: sessions
    dead: bool
    left: bool

    @property
    def nobody(self) -> bool:
        """True if all who ever held it are proven dead."""
        return not self.alive and not self.left


_NONE = Holders(frozenset(), dead=False, left=False)


class Ledger:
    """Holders of all instances that exist."""

    __slots__ = ("_instances",)

    def __init__(self) -> None:
        self._instances: dict[Instance, Holders] = {}

    def given(self, instance: Instance, sid: int) -> None:
        """A session is being sent the memfd."""
        old = self._instances.get(instance, _NONE)
        self._instances[instance] = old._replace(alive=old.alive | {sid})

    def ended(self, sid: int, *, dead: bool) -> None:
        """A session has ended: its process is proven dead, or lives on for all we know."""
        for instance, old in self._instances.items():
            if sid in old.alive:
                self._instances[instance] = Holders(
                    old.alive - {sid}, old.dead or dead, old.left or not dead
                )

    def buried(self, instance: Instance) -> None:
        """The extent is ended: whoever has it can touch nothing."""
        self._instances.pop(instance, None)

    def of(self, instance: Instance) -> Holders:
        """Return who may touch an instance."""
        return self._instances.get(instance, _NONE)

    def copy(self) -> Ledger:
        """Return an independent copy."""
        twin = Ledger()
        twin._instances = self._instances.copy()
        return twin
