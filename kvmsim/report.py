# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM is and holds, as plain values for JSON and tables; never a page's content.

Sizes and addresses are bytes. ``allocated`` is None where an owner did not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kvmsim.memoryuse import Allocated, MemoryUse, memory_use
from kvmsim.memslot import Memslot
from kvmsim.mmu import Mmu
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE


def memory_report(
    mmu: Mmu, held: Mapping[int, Allocated] | None, paths: Mapping[int, str]
) -> dict[str, Any]:
    """Slots with what each holds, and their sums (the VM's lock held).

    ``paths`` names files by their number. ``attributes`` are the gfns of slots by type, in bytes.
    """
    slots = [_slot(mmu, slot, held, paths) for slot in mmu.slots]
    use = memory_use(mmu, 0, mmu.kind.max_gfn)
    total = None if held is None else sum(held.values(), Allocated())
    return {"attributes": _bytes(use), "allocated": total and _bytes(total), "slots": slots}


def _slot(
    mmu: Mmu, slot: Memslot, held: Mapping[int, Allocated] | None, paths: Mapping[int, str]
) -> dict[str, Any]:
    use = memory_use(mmu, slot.base_gfn, slot.end_gfn)
    path = None if slot.file is None else paths.get(slot.file)
    return {
        "slot": slot.id,
        "gpa": slot.base_gfn << PAGE_SHIFT,
        "size": slot.npages << PAGE_SHIFT,
        "file": path,
        "offset": slot.file_page << PAGE_SHIFT,
        "attributes": _bytes(use),
        "allocated": None if held is None else _bytes(held.get(slot.id, Allocated())),
    }


def _bytes(pages: MemoryUse | Allocated) -> dict[str, int]:
    return {name: count * PAGE_SIZE for name, count in asdict(pages).items()}
