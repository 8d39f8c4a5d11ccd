# SPDX-License-Identifier: GPL-2.0-or-later
"""Keys in order, in blocks: taking one out of 32,764 moves no more than a block of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Any, Final, Generic, Self, TypeVar

_Key = TypeVar("_Key", bound=Any)
_BLOCK: Final = 512
"""Keys of a block; it is cut when it has twice as many."""


class SortedKeys(Generic[_Key]):
    """Keys that can be compared, ascending; equal ones may be there more than once."""

    __slots__ = ("_blocks", "_firsts", "_length")

    def __init__(self) -> None:
        self._blocks: list[list[_Key]] = []  # none is empty
        self._firsts: list[_Key] = []  # the first key of each
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_Key]:
        for block in self._blocks:
            yield from block

    def add(self, key: _Key) -> None:
        """Put ``key`` in its place."""
        self._length += 1
        if not self._blocks:
            self._blocks.append([key])
            self._firsts.append(key)
            return
        at = max(bisect_right(self._firsts, key) - 1, 0)
        block = self._blocks[at]
        insort(block, key)
        self._firsts[at] = block[0]
        if len(block) == 2 * _BLOCK:
            self._blocks[at : at + 1] = [block[:_BLOCK], block[_BLOCK:]]
            self._firsts.insert(at + 1, block[_BLOCK])

    def remove(self, key: _Key) -> None:
        """Take one ``key`` out; KeyError if it is not there."""
        at = max(bisect_right(self._firsts, key) - 1, 0)
        block = self._blocks[at] if self._blocks else []
        index = bisect_left(block, key)
        if index == len(block) or block[index] != key:
            raise KeyError(key)
        self._length -= 1
        del block[index]
        if not block:
            del self._blocks[at], self._firsts[at]
        elif not index:
            self._firsts[at] = block[0]

    def floor(self, key: _Key) -> _Key | None:
        """The largest that is not greater than ``key``; None: there is none."""
        at = bisect_right(self._firsts, key) - 1
        if at < 0:
            return None
        block = self._blocks[at]
        return block[bisect_right(block, key) - 1]

    def since(self, key: _Key) -> Iterator[_Key]:
        """The keys from ``key`` on. Nothing may be added or removed meanwhile."""
        at = max(bisect_left(self._firsts, key) - 1, 0)
        for index in range(at, len(self._blocks)):
            block = self._blocks[index]
            first = bisect_left(block, key) if index == at else 0
            for place in range(first, len(block)):
                yield block[place]

    def copy(self) -> Self:
        """An independent twin."""
        twin = type(self)()
        twin._blocks = [block.copy() for block in self._blocks]
        twin._firsts = self._firsts.copy()
        twin._length = self._length
        return twin
