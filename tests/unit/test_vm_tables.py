# SPDX-License-Identifier: GPL-2.0-or-later
"""What is shown of a VM's tables: columns against the tables' own walks, marks, pictures."""

from __future__ import annotations

import dataclasses
import struct
import threading
import zlib
from typing import Any

import numpy as np
import pytest
from tdx_machine import Lab

from hwemu.arena import new_table_pool
from hwemu.pkvm.hypervisor import Hypervisor
from hwemu.pkvm.state import PageState as PkvmState
from hwemu.snp.hostops import NewState, rmpupdate
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import STATES, PageSize
from hwemu.stage2 import Stage2
from hwemu.tdx.entry import SeptState
from kvmsim.confidential.frames import FrameMap
from kvmsim.views.columns import NO_STATE, PLAIN, Columns, Entries, Holder, no_entries, no_leaves
from kvmsim.views.odd import MARKS, Odd, is_wrong, mark, names
from kvmsim.views.picture import CLASSES, cells, classify, picture
from kvmsim.views.pkvm import PkvmTables
from kvmsim.views.png import png, text
from kvmsim.views.rows import FrameRows, TableRows
from kvmsim.views.snp import WORDS as SNP
from kvmsim.views.snp import SnpTables
from kvmsim.views.tdx import WORDS as TDX
from kvmsim.views.tdx import TdxTables

PAGE, MIB, LARGE = 4096, 1 << 20, 512
MAPPED, PENDING, BLOCKED = (int(one) for one in
                            (SeptState.MAPPED, SeptState.PENDING, SeptState.BLOCKED))  # fmt: skip


class Nothing:
    """A machine under a hypervisor that has nothing to zero or to flush."""

    def zero(self, pfn: int, npages: int) -> None: ...

    def flush_host(self, pfn: int, npages: int) -> None: ...

    def copy_pages(self, source: int, target: int, npages: int) -> None: ...

    def flush_guest(self, handle: int, gfn: int, npages: int) -> None: ...


def columns(npages: int = 4, first: int = 0, **changed: Any) -> Columns:
    """Private pages that the owner holds, each with a MAPPED entry of its own and a leaf."""
    hpas = np.arange(npages, dtype=np.int64) * PAGE + (1 << 39)
    found = Columns(
        first, 0, np.ones(npages, np.bool_), np.ones(npages, np.bool_),
        no_leaves(npages), no_leaves(npages),
        Entries(np.full(npages, MAPPED, np.uint8), np.ones(npages, np.uint8), hpas,
                np.full(npages, Holder.GUEST, np.uint8)),
    )  # fmt: skip
    found.leaf.hpa[:], found.leaf.level[:], found.leaf.writable[:] = hpas, 1, True
    return dataclasses.replace(found, **changed)


def marks(given: Columns, at: int = 1) -> set[str]:
    mark(given, TDX)
    return set(names(int(given.odd[at])))


def test_what_is_in_order_has_no_mark() -> None:
    given = columns()
    assert marks(given) == set()
    assert not given.odd.any()


def _entry(given: Columns, **values: int) -> None:
    for name, value in values.items():
        getattr(given.entry, name)[1] = value


@pytest.mark.parametrize(
    ("values", "leaf", "expected"),
    [
        ({"state": PENDING}, 0, {"not accepted"}),
        ({"state": BLOCKED}, 0, {"blocked"}),
        ({"state": PENDING}, 1, {"not accepted", "forbidden"}),
        ({"state": BLOCKED}, 1, {"blocked", "forbidden"}),
        ({"state": NO_STATE, "level": 0, "hpa": -1, "holder": 0}, 1, {"forbidden"}),
        ({"holder": Holder.HOST}, 1, {"nobody's"}),
        ({"holder": Holder.OTHER}, 1, {"another's"}),
        ({"hpa": 1 << 38}, 1, {"elsewhere"}),
        ({}, 2, {"too large"}),
    ],
)
def test_an_entry_is_marked(values: dict[str, int], leaf: int, expected: set[str]) -> None:
    given = columns()
    _entry(given, **values)
    if not leaf:
        given.leaf.hpa[1] = -1
    given.leaf.level[1] = leaf
    assert marks(given) == expected
    assert not given.odd[[0, 2, 3]].any()


def test_pages_and_types_are_marked() -> None:
    given = columns()
    given.page[1] = False
    assert marks(given) == {"no page"}
    given = columns()
    given.private[1] = False
    assert marks(given) == {"stale", "wrong type"}
    assert marks(dataclasses.replace(given, whole=True, sided=False)) == set()
    given = columns(typed=False)
    given.page[:] = False
    given.shared.level[1] = 1
    assert marks(given) == {"wrong type"}


def test_a_vm_without_tables_is_not_held_to_them() -> None:
    given = columns(entry=no_entries(4))
    given.page[1] = False
    mark(given, PLAIN)
    assert names(int(given.odd[1])) == ["no page"]
    assert not given.odd[0]


def test_small_entries_are_marked_where_a_large_one_could_be() -> None:
    given = columns(3 * LARGE, first=LARGE - 8)
    given.entry.hpa[:] += 8 * PAGE - given.entry.hpa[0] % (LARGE * PAGE) - 16 * PAGE + 2 * MIB
    mark(given, TDX)
    small = given.odd & int(Odd.SMALL) != 0
    assert small[8 : 8 + 2 * LARGE].all()
    assert np.count_nonzero(small) == 2 * LARGE
    given.entry.state[9] = PENDING
    mark(given, TDX)
    assert np.count_nonzero(given.odd & int(Odd.SMALL)) == LARGE


def test_every_mark_has_a_name_of_its_own() -> None:
    assert len({one.name for one in MARKS}) == len(MARKS) == len(Odd)
    assert {one.odd for one in MARKS} == set(Odd)
    assert is_wrong("nobody's")
    assert not is_wrong("not accepted")


# --- columns against the tables -----------------------------------------------------------------


def test_leaves_are_those_that_a_walk_finds() -> None:
    stage2 = Stage2(new_table_pool(1 << 20), 256 << 20)
    base = 1 << 39
    stage2.map(3 * PAGE, base, 5)
    stage2.map(9 * PAGE, base + 77 * PAGE, 1, writable=False)
    stage2.map(2 * MIB, base + 4 * MIB, 1024, level=2)
    stage2.map(1 << 30, base + (1 << 30), 1 << 18, level=3)
    for first, npages in ((0, 2000), (5, 3), (700, 100), ((1 << 18) - 4, 600), (1600, 0)):
        found = stage2.columns(first * PAGE, npages)
        assert len(found.hpa) == npages
        for at in range(npages):
            try:
                known = stage2.walk((first + at) * PAGE)
            except Exception:
                assert (found.hpa[at], found.level[at]) == (-1, 0)
                continue
            assert found.hpa[at] == known.hpa
            assert (found.level[at], found.writable[at]) == (known.level, known.writable)


def test_a_td_is_told_of_as_its_secure_ept_has_it() -> None:
    lab = Lab()
    tdr, (tdvpr,) = lab.runnable()
    module = lab.module
    lab.tables(tdr, 0)
    for page in range(3):
        module.mem_page_aug(tdr, page * PAGE, lab.page())
    large = lab.page(2 * MIB)
    lab.tables(tdr, 2 * MIB, 1)
    module.mem_page_aug(tdr, 2 * MIB, large, 1)
    module.vp_enter(tdvpr)
    assert module.tdcall(tdvpr, 6, rcx=PAGE).ok
    module.td_exit(tdvpr)
    module.mem_range_block(tdr, 2 * PAGE, 0)
    tables = TdxTables(threading.Lock(), module, tdr)
    found = tables.entries(0, no_leaves(3 * LARGE))
    tree = module.td(tdr).tree
    for page in (*range(6), LARGE, LARGE + 7, 2 * LARGE - 1, 2 * LARGE + 1):
        at = tree.walk(page * PAGE, 0)
        expected = NO_STATE if at.state is SeptState.FREE else at.state
        assert found.state[page] == expected, page
    assert found.state[:3].tolist() == [PENDING, MAPPED, SeptState.PENDING_BLOCKED]
    assert (found.level[1], found.level[LARGE + 5]) == (1, 2)
    assert found.hpa[LARGE + 7] == large + 7 * PAGE
    assert set(found.holder[found.hpa >= 0]) == {Holder.GUEST}
    reached = np.sort(found.hpa[found.hpa >= 0])
    counted = 0
    for frames in tables.frames("pamt", reached, []):
        assert not frames.odd.any()
        counted += len(frames.hpa)
    assert counted == sum(module.pamt.counts().values())
    lost = [frames for frames in tables.frames("pamt", reached[1:], []) if frames.odd.any()]
    assert [(int(f.hpa[f.odd > 0][0]), int(f.odd.max())) for f in lost] == [
        (int(reached[0]), Odd.UNREACHABLE)
    ]


def test_an_snp_guest_is_told_of_as_the_rmp_has_it() -> None:
    rmp, start = Rmp(4 * LARGE, start=LARGE), LARGE
    assert rmpupdate(rmp, start + 3, NewState(True, gpa=7 * PAGE, asid=5)).ok
    assert rmpupdate(rmp, start + 9, NewState(True, gpa=8 * PAGE, asid=6)).ok
    assert rmpupdate(rmp, 2 * LARGE, NewState(True, PageSize.SIZE_2M, False, 2 * MIB, 5)).ok
    for first, npages in ((start, 4 * LARGE), (start + 3, 1), (2 * LARGE + 9, 700), (0, start)):
        expected = [pfn for pfn in range(max(first, start), min(first + npages, start + 4 * LARGE))
                    if rmp.entry(pfn).asid == 5]  # fmt: skip
        assert rmp.pfns_of(5, first, npages).tolist() == expected
    known = FrameMap()
    known.set(8, 1, start + 9)
    tables = SnpTables(threading.Lock(), rmp, 5, known, ())
    tables.prepare()
    leaves = no_leaves(2 * LARGE)
    leaves.hpa[8], leaves.level[8] = (start + 9) * PAGE, 1  # another guest's
    leaves.hpa[9], leaves.level[9] = (start + 20) * PAGE, 1  # the hypervisor's
    found = tables.entries(0, leaves)
    invalid = next(n for n, row in enumerate(STATES) if row.state.value == "Guest-Invalid")
    assert (found.state[7], found.hpa[7], found.holder[7]) == (invalid, (start + 3) * PAGE, 1)
    assert found.holder[[8, 9, 10]].tolist() == [Holder.OTHER, Holder.HOST, Holder.NONE]
    assert found.level[LARGE : 2 * LARGE].tolist() == [2] * LARGE
    assert found.hpa[LARGE + 3] == (2 * LARGE + 3) * PAGE
    assert rmpupdate(rmp, start + 4, NewState(True, gpa=7 * PAGE, asid=5)).ok
    tables.prepare()
    rows = FrameRows(SNP)
    for frames in tables.frames("rmp", np.zeros(0, np.int64), [(0, 16)]):
        rows.add(frames, 0, 1 << 40)
    told = {(row["start"] // PAGE, row["end"] // PAGE): row["odd"] for row in rows.rows()}
    assert told == {
        (start + 3, start + 4): ["not accepted", "twice"],
        (start + 4, start + 5): ["not accepted", "twice"],
        (2 * LARGE, 3 * LARGE): ["not accepted", "no slot"],
    }


# --- ranges -------------------------------------------------------------------------------------


def test_neighbours_are_one_row_over_pieces() -> None:
    rows = TableRows("all", TDX)
    for first in (0, 4, 8):
        given = columns(first=first)
        mark(given, TDX)
        rows.add(given)
    given = columns(first=16)
    given.page[2] = False
    mark(given, TDX)
    rows.add(given)
    found = rows.rows()
    assert [(row["start"] // PAGE, row["end"] // PAGE) for row in found] == [
        (0, 12), (16, 18), (18, 19), (19, 20)
    ]  # fmt: skip
    assert found[0]["leaf"] == {"size": PAGE, "rights": "rwx"}
    assert found[0]["state"] == "MAPPED"
    assert found[2]["odd"] == ["no page"]


def test_addresses_that_do_not_go_on_begin_a_row() -> None:
    given = columns()
    given.entry.hpa[2:] += PAGE
    mark(given, TDX)
    rows = TableRows("sept", TDX)
    rows.add(given)
    assert [(row["start"] // PAGE, row["hpa"]) for row in rows.rows()] == [
        (0, 1 << 39), (2, (1 << 39) + 3 * PAGE)
    ]  # fmt: skip
    both = TableRows("stage2", TDX)
    both.add(given)
    assert [row["odd"] for row in both.rows()] == [[], ["elsewhere"]]


# --- pictures -----------------------------------------------------------------------------------


def row(start: int, end: int, **changed: Any) -> dict[str, Any]:
    return {
        "start": start * PAGE, "end": end * PAGE, "type": "private", "page": True, "state": None,
        "leaf": None, "shared": None, "odd": [],
    } | changed  # fmt: skip


def read(data: bytes) -> tuple[int, int, np.ndarray[Any, Any], bytes]:
    """Decode what `png` wrote, with every check sum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size)[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return width, height, lines[:, 1:], chunks[b"PLTE"]


def test_a_png_holds_the_pixels_it_was_given() -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    width, height, found, palette = read(png(pixels, [(n, 2 * n, 255) for n in range(6)]))
    assert (width, height) == (3, 2)
    assert (found == pixels).all()
    assert palette[3:6] == bytes((1, 2, 255))
    for bad in (np.zeros((0, 3), np.uint8), np.full((1, 1), 9, np.uint8)):
        with pytest.raises(ValueError, match="PNG of"):
            png(bad, [(0, 0, 0)])
    assert text("I", 2).shape == (10, 4)


def test_a_dot_is_a_page_and_the_most_remarkable_wins_in_a_block() -> None:
    rows = [row(0, 8), row(8, 9, odd=["not accepted"]), row(9, 1024, page=False)]
    small, pages = cells(rows, 0, 1024 * PAGE, confidential=True)
    assert (small.shape, pages) == ((2, 512), 1)
    kinds = [CLASSES[number].name for number in small[0, 7:10]]
    assert kinds == ["private, not the guest's yet", "not accepted", "private, no page"]
    end = 1 << 21
    rows.append(row(1024, end, page=False))
    blocks, pages = cells(rows, 0, end * PAGE, confidential=True)
    assert (blocks.shape, pages) == ((1024, 512), 4)
    assert CLASSES[blocks[0, 2]].name == "not accepted"


def test_what_is_wrong_is_seen_before_all_else() -> None:
    number = classify(row(0, 1, odd=["not accepted", "nobody's"]), confidential=True)
    assert CLASSES[number].name.startswith("wrong")
    assert number == max(classify(row(0, 1, odd=[one.name]), confidential=True) for one in MARKS)


def test_a_picture_is_one() -> None:
    vm = {"vm": "vm0", "pid": 1, "technology": "TDX",
          "rows": [row(0, 600), row(600, 700, odd=["blocked"])]}  # fmt: skip
    width, height, found, _ = read(picture(vm, 0, 700 * PAGE))
    assert width == 1024 + 24
    assert height > 2 * 16
    blocked = next(n for n, one in enumerate(CLASSES) if one.name == "blocked")
    assert (found == blocked).any()


def test_a_protected_vm_is_told_of_by_owner() -> None:
    hypervisor = Hypervisor(Nothing(), [(0x1000, 0x1100)])
    handle = hypervisor.create_vm(16)
    hypervisor.host_donate_guest(handle, 0x1004, 2, 3)
    tables = PkvmTables(threading.Lock(), hypervisor, handle)
    found = tables.entries(0, no_leaves(32))
    assert found.state[:6].tolist() == [NO_STATE] * 2 + [PkvmState.OWNED] * 3 + [NO_STATE]
    assert found.hpa[2:5].tolist() == [n * PAGE for n in (0x1004, 0x1005, 0x1006)]
    assert set(found.holder[2:5]) == {Holder.GUEST}
    hypervisor.guest_share_host(handle, 3)
    found = tables.entries(0, no_leaves(16))
    assert (found.state[3], found.holder[3]) == (PkvmState.SHARED_OWNED, Holder.GUEST)
    gone = PkvmTables(threading.Lock(), hypervisor, None).entries(0, no_leaves(4))
    assert gone.state.tolist() == [NO_STATE] * 4
