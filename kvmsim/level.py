# SPDX-License-Identifier: GPL-2.0-or-later
"""How large the leaves may be that map a range: 4 KiB (level 1), 2 MiB (2) or 1 GiB (3).

KVM takes the least of three (kvm_mmu_max_mapping_level() and kvm_max_level_for_order() in
arch/x86/kvm/mmu/mmu.c, v6.18): the order of the page behind the gfn, the slot's alignment
(``lpage_info``: gfn, file offset or hva must be congruent), and whether every gfn of the leaf has
the same attributes (hugepage_has_attrs()). A caller here gives a range in which slot and
attributes are the same and the pages are its own to map, all contiguous; what is left to find out
is where the two address spaces are aligned alike.

The order is not asked for. Host-physical memory of an emulator process is its arena: pages that
lie together and aligned there *are* a large page, whether the memory below was allocated page by
page or not, and a large leaf over them reaches nothing but them. What KVM's order protects, that
a folio is never freed in part under a leaf, is protected by the zap: it takes the leaf whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

MAX_LEVEL: Final = 3


class Leaves(NamedTuple):
    """``npages`` gfns from ``gfn``, to be mapped by leaves of ``level``."""

    gfn: int
    npages: int
    level: int


def pages_per_leaf(level: int) -> int:
    """KVM_PAGES_PER_HPAGE(level)."""
    return 1 << 9 * (level - 1)


def mapping_levels(gfn: int, npages: int, hfn: int, max_level: int) -> Iterator[Leaves]:
    """The fewest leaves for gfns [gfn, gfn + npages) on host frames from ``hfn``, in order."""
    if max_level == 1:
        if npages:
            yield Leaves(gfn, npages, 1)
        return
    span = pages_per_leaf(max_level)
    first = gfn + -gfn % span
    last = (gfn + npages) // span * span
    if (gfn - hfn) % span or first >= last:
        yield from mapping_levels(gfn, npages, hfn, max_level - 1)
        return
    yield from mapping_levels(gfn, first - gfn, hfn, max_level - 1)
    yield Leaves(first, last - first, max_level)
    yield from mapping_levels(last, gfn + npages - last, hfn + last - gfn, max_level - 1)
