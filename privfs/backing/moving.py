# SPDX-License-Identifier: GPL-2.0-or-later
"""Copy what an extent holds into a new memfd, as ``migrate_pages()`` copies folios (mm/migrate.c).

To be called when every user has proven that it cannot reach the old one: what is stored there after
a page was copied is lost.  Whatever fails leaves the old extent as it was, and nothing of the new.

Only pages that the file has are copied: what somebody touched after it was freed stays behind.  Of
those, the ones that nobody has touched yet are given memory in the new memfd and no contents.
"""

from __future__ import annotations

import bisect
import errno
import os
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from pyroaring import BitMap

from privfs.backing.memory import ADVICE, Backing
from privfs.backing.store import Store
from privfs.backing.values import BackingError, Extent
from privfs.extents import PAGE_SIZE, chunks

#: Pages copied between two looks for an interrupt: some 20 ms.
STRIDE: Final = (32 << 20) // PAGE_SIZE
#: Pages whose numbers are looked at together.
_WINDOW: Final = 1 << 20


def copy_extent(
    backing: Backing, ino: int, index: int, pages: BitMap, go_on: Callable[[int], bool]
) -> None:
    """Make a copy of extent ``index`` that holds ``pages``, the file's own numbers.

    ``go_on`` is told of pages as they are done; where it says False the copying ends with EINTR.
    Raises BackingError: EINTR, ENOSPC where memory or descriptors ran out, or what the kernel said.
    """
    start, end = backing.extent(ino, index).start, backing.extent(ino, index).end
    advice = {**ADVICE, **backing.store.advice}
    try:
        old, new = backing.begin_copy(ino, index)
        touched = list(backing.store.touched(old.fd)) if backing.store.locates else None
        for low, high in runs(pages, start, end):
            for first, last in chunks(low, high, STRIDE):
                _copy(backing.store, old, new, (first, last), touched)
                if not go_on(last - first):
                    raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
    except OSError as error:
        backing.drop_copy(ino, index)
        code = error.errno or errno.EIO
        why = f"extent {index}: {error.strerror}; {advice.get(code, 'it stays where it is')}"
        raise BackingError(
            errno.ENOSPC if code in advice else code, "move", ino, (start, end), start, why
        ) from error
    except BaseException:
        backing.drop_copy(ino, index)
        raise


def _copy(
    store: Store,
    old: Extent,
    new: Extent,
    pages: tuple[int, int],
    touched: list[tuple[int, int]] | None,
) -> None:
    """Copy file pages; of ``touched``, in bytes of the memfd, what lies among them (None: all)."""
    low, high = ((page - old.start) * PAGE_SIZE for page in pages)
    store.allocate(new.fd, low, high - low)
    if touched is None:
        store.copy(old.fd, new.fd, low, high - low)
        return
    at = bisect.bisect_right(touched, low, key=lambda one: one[1])
    while at < len(touched) and touched[at][0] < high:
        first, last = max(low, touched[at][0]), min(high, touched[at][1])
        store.copy(old.fd, new.fd, first, last - first)
        at += 1


def runs(pages: BitMap, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of pages of ``[start, end)`` that are set, ascending; a long one in parts."""
    for low in range(start, end, _WINDOW):
        some = pages & BitMap(range(low, min(low + _WINDOW, end)))
        if not some:
            continue
        numbers = np.frombuffer(some.to_array(), dtype=np.uint32).astype(np.int64)
        cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
        firsts = numbers[np.concatenate(([0], cuts))]
        lasts = numbers[np.concatenate((cuts - 1, [len(numbers) - 1]))] + 1
        yield from zip(firsts.tolist(), lasts.tolist(), strict=True)
