# SPDX-License-Identifier: GPL-2.0-or-later
"""The bits of an S-EPT entry and the pages of a PAMT, against numbers from the manual."""

from __future__ import annotations

import pytest

from hwemu.tdx.entry import (
    ACCESSIBLE,
    LEAVES,
    PENDING,
    STATES,
    SeptState,
    counter_of,
    decode,
    details,
    encode,
    hpa_of,
)
from hwemu.tdx.pamt import PAGE_SIZE, PageType, Pamt, Tdmr

MIB, GIB = 1 << 20, 1 << 30
#: Index → the seven-bit code.
CODES = [0x0E, 0x0C, 0x00, 0x08, 0x60, 0x68, 0x64, 0x66, 0x63, 0x67, 0x70, 0x78, 0x74, 0x76, 0x73,
         0x77]  # fmt: skip


def test_the_sixteen_states_have_the_codes_of_the_manual() -> None:
    assert [STATES[SeptState(index)].code for index in range(16)] == CODES


@pytest.mark.parametrize("state", SeptState)
def test_an_entry_reads_back_as_it_was_written(state: SeptState) -> None:
    hpa = 0 if state in (SeptState.FREE, SeptState.REMOVED) else 0x123456000
    word = encode(state, hpa)
    assert decode(word) is state
    assert hpa_of(word, 0) == hpa
    code = (word >> 9 & 1) | (word >> 53 & 0xF) << 1 | (word >> 6 & 3) << 5
    assert code == STATES[state].code


@pytest.mark.parametrize(
    ("state", "ve", "word"),
    [
        (SeptState.FREE, False, 1 << 63 | 7 << 53),
        (SeptState.REMOVED, False, 1 << 63 | 3 << 54),
        (SeptState.NL_MAPPED, False, 0x1000 | 7),
        (SeptState.NL_BLOCKED, False, 1 << 63 | 1 << 55 | 0x1000),
        (SeptState.MAPPED, False, 1 << 63 | 0x1000 | 0xF7),
        (SeptState.BLOCKEDW, False, 1 << 63 | 1 << 59 | 1 << 54 | 0x1000 | 0xF5),
        (SeptState.EXPORTED_DIRTY, False, 1 << 63 | 1 << 53 | 1 << 9 | 0x1000 | 0xF7),
        (SeptState.PENDING, True, 1 << 56 | 0x1000 | 0xF0),
        (SeptState.PENDING, False, 1 << 63 | 1 << 56 | 0x1000 | 0xF0),
    ],
)
def test_bits(state: SeptState, ve: bool, word: int) -> None:
    hpa = 0 if state in (SeptState.FREE, SeptState.REMOVED) else 0x1000
    assert encode(state, hpa, ve=ve) == word


def test_bits_of_no_state_are_refused() -> None:
    with pytest.raises(ValueError, match="no state"):
        decode(1 << 56)
    with pytest.raises(ValueError, match="not an address"):
        encode(SeptState.MAPPED, 0x1001)
    with pytest.raises(ValueError, match="not an address"):
        encode(SeptState.FREE, 0x1000)


def test_sets_of_states() -> None:
    assert len(LEAVES) == 12
    assert {state.name for state in ACCESSIBLE} == {
        "MAPPED", "BLOCKEDW", "EXPORTED_BLOCKEDW", "EXPORTED_DIRTY", "EXPORTED_DIRTY_BLOCKEDW",
    }  # fmt: skip
    assert all(state.name.startswith("PENDING") for state in PENDING)
    assert len(PENDING) == 6


def test_an_accept_counter_is_hidden_from_the_host() -> None:
    word = encode(SeptState.PENDING, 2 * MIB, 300)
    assert counter_of(word) == 300
    assert hpa_of(word, 1) == 2 * MIB
    rcx, rdx = details(word, 1)
    assert rcx == 1 << 63 | 2 * MIB | 0xF0
    assert rdx == 1 | 2 << 8


def test_details_show_level_and_public_state() -> None:
    assert details(encode(SeptState.FREE), 2) == (1 << 63, 2)
    assert details(encode(SeptState.NL_MAPPED, 0x5000), 3) == (7, 3 | 132 << 8)
    assert details(encode(SeptState.BLOCKED, 0x5000), 0) == (1 << 63 | 0x50F0, 1 << 8)


# -- PAMT -----------------------------------------------------------------------------------------


def pamt() -> Pamt:
    return Pamt([Tdmr(GIB, 2 * GIB, ((2 * MIB, 4096),)), Tdmr(5 * GIB, 3 * MIB)])


def test_a_walk_stops_at_the_largest_page_in_use() -> None:
    table = pamt()
    table.assign(2 * GIB, 2, PageType.REG, 7)
    table.assign(GIB + 4 * MIB, 1, PageType.REG, 8)
    table.assign(GIB, 0, PageType.EPT, 9)
    assert table.walk(2 * GIB + 77 * PAGE_SIZE) == table.walk(2 * GIB)
    assert table.walk(2 * GIB).level == 2
    found = table.walk(GIB + 5 * MIB)
    assert (found.level, found.pt, found.owner) == (1, PageType.REG, 8)
    assert table.walk(GIB).pt is PageType.EPT
    assert table.walk(GIB, 1).pt is PageType.NDA  # its own level is asked, what is beneath is not
    assert table.counts() == {PageType.REG: 512 * 512 + 512, PageType.EPT: 1}


def test_a_large_page_is_free_only_with_all_beneath_it() -> None:
    table = pamt()
    assert table.is_free(GIB, 1)
    assert not table.is_free(GIB, 2)  # a reserved page is in it
    assert not table.is_free(GIB + 2 * MIB, 1)
    assert table.is_free(2 * GIB, 2)
    table.assign(GIB + 37 * PAGE_SIZE, 0, PageType.REG, 1)
    assert not table.is_free(GIB, 1)
    table.free(GIB + 37 * PAGE_SIZE, 0)
    assert table.is_free(GIB, 1)
    assert not table.is_free(5 * GIB + 2 * MIB, 1)  # only half of it is in the TDMR
    assert not table.is_free(GIB - MIB, 0)


def test_pages_split_and_merge_with_type_and_owner() -> None:
    table = pamt()
    table.assign(2 * GIB, 2, PageType.REG, 7)
    table.set_bepoch(2 * GIB, 2, 5)
    before = table.copy()
    table.split(2 * GIB, 2)
    assert table.walk(2 * GIB + 900 * MIB).level == 1
    assert table.bepoch(2 * GIB, 1) == 0
    assert sum(1 for _ in table.owned(7)) == 512
    table.merge(2 * GIB, 2)
    assert list(table.owned(7)) == [(2 * GIB, 2, PageType.REG)]
    assert before.bepoch(2 * GIB, 2) == 5  # a copy is its own
    assert table.key([(7, 9)]) == before.key([(7, 9)])  # both epochs are long past
    assert table.key([(7, 5)]) != before.key([(7, 5)])


@pytest.mark.parametrize(
    "tdmrs",
    [
        [Tdmr(1, 4096)],
        [Tdmr(4096, 0)],
        [Tdmr(0, 4096)],
        [Tdmr(4096, 8192), Tdmr(8192, 4096)],
        [Tdmr(4096, 8192, ((4096, 8192),))],
    ],
)
def test_wrong_tdmrs_are_refused(tdmrs: list[Tdmr]) -> None:
    with pytest.raises(ValueError, match="TDMR"):
        Pamt(tdmrs)


def test_what_is_in_no_tdmr_is_no_page() -> None:
    table = pamt()
    assert 4 * GIB not in table
    with pytest.raises(LookupError, match="in no TDMR"):
        table.walk(4 * GIB)
    with pytest.raises(LookupError, match="in no TDMR"):
        table.bepoch(4 * GIB, 0)
