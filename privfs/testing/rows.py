# SPDX-License-Identifier: GPL-2.0-or-later
"""Which rows of a table the code under test has used.

A rule that is a row of a table can be watched: :class:`Rows` is the table, and remembers the keys
that were looked up.  Put it in the table's place (``monkeypatch.setitem`` and the like), run what
should use every row, and ask for :attr:`Rows.unused`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Rows(dict[K, V]):
    """A table that remembers which of its rows were used."""

    def __init__(self, table: Mapping[K, V]) -> None:
        super().__init__(table)
        self.used: set[K] = set()

    def __getitem__(self, key: K) -> V:
        row = super().__getitem__(key)
        self.used.add(key)
        return row

    def get(self, key: K, default: V | None = None) -> V | None:  # type: ignore[override]
        """Return a row, or ``default``, which is no row."""
        return self[key] if key in self else default  # noqa: SIM401 (that is what get is)

    @property
    def unused(self) -> set[K]:
        """The rows that nothing has looked up."""
        return set(self) - self.used
