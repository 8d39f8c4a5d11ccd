# SPDX-License-Identifier: GPL-2.0-or-later
"""Mappings of processes, as proc(5) tells of them."""

from __future__ import annotations

import mmap
from ctypes import addressof, c_char

from kvmsim.exec.maps import kept_from_children, overlapping

MADV_DONTFORK = 10


def test_a_mapping_that_children_do_not_get() -> None:
    with mmap.mmap(-1, 3 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        view = c_char.from_buffer(memory)
        start = addressof(view)
        memory.madvise(MADV_DONTFORK, 4096, 4096)
        with open("/proc/self/smaps") as smaps, open("/proc/self/maps") as maps:
            kept = kept_from_children(smaps.read())
            found = list(overlapping(maps.read(), start, start + 3 * 4096))
        del view
    assert kept & {first for first, _, _ in found} == {start + 4096}
    assert [(last - first, one.shared) for first, last, one in found] == [(4096, False)] * 3
