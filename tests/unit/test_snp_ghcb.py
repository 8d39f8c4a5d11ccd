# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwemu.snp import ghcbmsr, psc
from hwemu.snp.ghcb import (
    FIELDS,
    NEEDS,
    SHARED_BUFFER,
    SHARED_BUFFER_SIZE,
    SNP_ONLY,
    ApCreate,
    ApRequest,
    Event,
    Ghcb,
    GhcbRefused,
    Ioio,
    Malformed,
    Response,
)
from hwemu.snp.ghcbmsr import ANSWERS, Info, message
from hwemu.snp.psc import (
    LIST_SIZE,
    ORDER,
    Finished,
    MapGpaRange,
    PscEntry,
    PscError,
    PscList,
    PscOp,
    Step,
)
from hwemu.snp.rmpentry import PAGE_SIZE

# -- the MSR protocol


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (message(Info.SEV_INFO_RESP, max=2, min=1, cbit=51), 0x0002_0001_3300_0001),
        (message(Info.SEV_INFO_REQ), 0x2),
        (message(Info.CPUID_REQ, function=0x8000_001F, register=1), 0x8000_001F_4000_0004),
        (message(Info.PSC_REQ, gfn=0x12345, operation=1), 0x0010_0000_1234_5014),
        (message(Info.PSC_RESP, error=ghcbmsr.PSC_RESP_ERROR), 1 << 63 | 0x15),
        (message(Info.REG_GPA_REQ, gfn=0x8000), 0x800_0012),
        (message(Info.VMPL_REQ, vmpl=1), 1 << 32 | 0x16),
        (message(Info.HV_FT_RESP, features=ghcbmsr.Feature.SNP | 2), 0x3081),
        (message(Info.TERM_REQ, reason_set=1, reason=2), 0x2_1100),
        (message(Info.GHCB_GPA, gfn=0x1234), 0x123_4000),
    ],
)
def test_words_of_the_msr_protocol(word: int, expected: int) -> None:
    assert word == expected
    assert ghcbmsr.decode(word).encode() == word


@given(st.sampled_from(sorted(Info)), st.data())
def test_every_message_comes_back(info: Info, data: st.DataObject) -> None:
    fields = {
        name: data.draw(st.integers(0, (1 << width) - 1))
        for name, (_, width) in ghcbmsr.FIELDS[info].items()
    }
    found = ghcbmsr.decode(message(info, **fields))
    assert (found.info, dict(found.fields)) == (info, fields)


def test_fields_never_overlap() -> None:
    for info, fields in ghcbmsr.FIELDS.items():
        used = 0xFFF
        for bit, width in fields.values():
            mask = (1 << width) - 1 << bit
            assert not used & mask, info
            used |= mask
        assert used < 1 << 64
    assert all(answer == request + 1 or request == Info.SEV_INFO_REQ
               for request, answer in ANSWERS.items())  # fmt: skip


@pytest.mark.parametrize("word", [0x3, 0xFFF, -1, 1 << 64])
def test_words_that_say_nothing(word: int) -> None:
    with pytest.raises(ValueError, match="GHCB MSR"):
        ghcbmsr.decode(word)


def test_messages_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="8 bits"):
        message(Info.TERM_REQ, reason_set=1, reason=256)
    with pytest.raises(ValueError, match="reason_set"):
        message(Info.TERM_REQ, reason=1)


# -- the page


def request(event: int, info_1: int = 0, info_2: int = 0, **fields: int) -> Ghcb:
    ghcb = Ghcb()
    ghcb.set("sw_exit_code", event)
    ghcb.set("sw_exit_info_1", info_1)
    ghcb.set("sw_exit_info_2", info_2)
    for name, value in fields.items():
        ghcb.set(name, value)
    return ghcb


def why(ghcb: Ghcb, *, snp: bool = True) -> Malformed:
    with pytest.raises(GhcbRefused) as caught:
        ghcb.event(snp=snp)
    return caught.value.reason


def test_fields_lie_where_the_kernel_has_them() -> None:
    ghcb = Ghcb()
    for number, (name, offset) in enumerate(FIELDS.items(), 1):
        assert not ghcb.valid(name)
        ghcb.set(name, number)
        assert ghcb.page[offset] == number
        assert ghcb.valid(name)
        assert ghcb.get(name) == number
    bits = int.from_bytes(ghcb.page[0x3F0:0x400], "little")
    assert bits == sum(1 << (offset >> 3) for offset in FIELDS.values())
    ghcb.version, ghcb.usage = 2, 0x1234
    assert struct.unpack_from("<HI", ghcb.page, 0xFFA) == (2, 0x1234)
    ghcb.invalidate()
    assert not any(ghcb.valid(name) for name in FIELDS)
    with pytest.raises(ValueError, match="GHCB of 100 bytes"):
        Ghcb(bytearray(100))


@pytest.mark.parametrize("event", Event)
def test_every_event_names_what_it_needs(event: Event) -> None:
    info = Ioio(0x3F8, 1, reads=True, string=False, repeat=False).encode()
    info = info if event is Event.IOIO else 2 if event is Event.AP_CREATE else 0
    needed = NEEDS[event]
    assert request(event, info, **dict.fromkeys(needed, 1)).event() is event
    for missing in needed:
        rest = dict.fromkeys(set(needed) - {missing}, 1)
        assert why(request(event, info, **rest)) is Malformed.MISSING_INPUT
    if event in SNP_ONLY:
        ghcb = request(event, info, **dict.fromkeys(needed, 1))
        assert why(ghcb, snp=False) is Malformed.INVALID_EVENT


def test_malformed_requests() -> None:
    assert why(Ghcb()) is Malformed.MISSING_INPUT
    assert why(request(0x1234)) is Malformed.INVALID_EVENT
    ghcb = request(Event.CPUID, rax=0xD, rcx=0)
    assert why(ghcb) is Malformed.MISSING_INPUT  # xcr0 counts for leaf 0xd
    ghcb.set("xcr0", 7)
    assert ghcb.event() is Event.CPUID
    ghcb.usage = 1
    assert why(ghcb) is Malformed.INVALID_USAGE
    write = Ioio(0x3F8, 1, reads=False, string=False, repeat=False)
    assert Ioio.decode(write.encode()) == write
    assert why(request(Event.IOIO, write.encode())) is Malformed.MISSING_INPUT
    assert why(request(Event.IOIO, write.encode() | 4, rax=1)) is Malformed.MISSING_INPUT
    assert why(request(Event.MSR, 1, rcx=1)) is Malformed.MISSING_INPUT  # a write
    assert why(request(Event.AP_CREATE, ApRequest.CREATE)) is Malformed.MISSING_INPUT


def test_answers() -> None:
    ghcb = request(Event.PSC, sw_scratch=0x800)
    ghcb.answer(info_2=int(PscError.GENERIC))
    assert (ghcb.get("sw_exit_info_1"), ghcb.get("sw_exit_info_2")) == (0, 0x100 << 32)
    ghcb.refuse(GhcbRefused(Malformed.INVALID_INPUT, "test"))
    assert ghcb.get("sw_exit_info_1") == Response.MALFORMED_INPUT
    assert ghcb.get("sw_exit_info_2") == Malformed.INVALID_INPUT


def test_the_scratch_area_lies_in_the_shared_buffer() -> None:
    gpa = 0x7000
    ghcb = request(Event.PSC, sw_scratch=gpa + SHARED_BUFFER)
    area = ghcb.scratch(gpa, SHARED_BUFFER_SIZE)
    area[:3] = b"abc"
    assert ghcb.page[SHARED_BUFFER : SHARED_BUFFER + 3] == b"abc"
    assert SHARED_BUFFER_SIZE == LIST_SIZE  # 253 entries are what fits
    area.release()
    for start, length in ((0x7FF, 8), (0x800, 0x7F1), (0xFF0, 1), (0x800, 0), (0x1800, 8)):
        ghcb.set("sw_scratch", gpa + start)
        with pytest.raises(GhcbRefused) as caught:
            ghcb.scratch(gpa, length)
        assert caught.value.reason is Malformed.INVALID_SCRATCH_AREA


def test_ap_creation() -> None:
    found = ApCreate.decode(7 << 32 | 2 << 16 | 1, 0x5000)
    assert found == ApCreate(ApRequest.CREATE, 7, 2, 0x5000)
    assert ApCreate.decode(7 << 32 | 2, 0x123).request is ApRequest.DESTROY
    for info_1, info_2 in ((3, 0x5000), (1, 0x5001), (0, 2 << 20), (1, 0)):
        with pytest.raises(GhcbRefused) as caught:
            ApCreate.decode(info_1, info_2)
        assert caught.value.reason is Malformed.INVALID_INPUT


# -- page state changes

P, S = PscOp.PRIVATE, PscOp.SHARED


def worked(raw: bytearray, limit: int = 300) -> tuple[list[MapGpaRange], Finished]:
    """Work a list off; the ranges and the end."""
    work, ranges = PscList(raw), []
    for _ in range(limit):
        found = work.next_range()
        if isinstance(found, Finished):
            return ranges, found
        ranges.append(found)
        assert work.complete(1) is None
    raise AssertionError("it never ends")


def test_an_entry_is_one_word() -> None:
    entry = PscEntry(0x12_3456_7890, S, 1, 0x123)
    assert entry.encode() == 0x123 | 0x12_3456_7890 << 12 | 2 << 52 | 1 << 56
    assert PscEntry.decode(entry.encode()) == entry
    with pytest.raises(ValueError, match="does not fit"):
        PscEntry(1 << 40, S).encode()


def test_neighbours_that_ask_the_same_are_one_range() -> None:
    raw = psc.pack(
        [
            PscEntry(8, P), PscEntry(9, P), PscEntry(10, S), PscEntry(12, S),
            PscEntry(512, S, 1), PscEntry(1024, S, 1), PscEntry(1536, S),
        ]
    )  # fmt: skip
    ranges, end = worked(raw)
    assert ranges == [
        MapGpaRange(8 << 12, 2, True, 0),
        MapGpaRange(10 << 12, 1, False, 0),
        MapGpaRange(12 << 12, 1, False, 0),
        MapGpaRange(512 << 12, 1024, False, 1),
        MapGpaRange(1536 << 12, 1, False, 0),
    ]
    assert end == Finished(PscError.NONE)
    assert struct.unpack_from("<HH", raw) == (7, 6)
    words = struct.unpack_from("<7Q", raw, 8)
    assert [word & 0xFFF for word in words] == [1, 1, 1, 1, 512, 512, 1]


def test_253_pages_are_one_range() -> None:
    raw = psc.pack([PscEntry(gfn, P) for gfn in range(253)])
    assert len(raw) == LIST_SIZE
    assert worked(raw) == ([MapGpaRange(0, 253, True, 0)], Finished(PscError.NONE))
    for count in (0, 254):
        with pytest.raises(ValueError, match=f"{count} entries"):
            psc.pack([PscEntry(0, P)] * count)


def test_a_broken_page_is_finished_by_itself() -> None:
    raw = psc.pack([PscEntry(512, P, 1, done=500), PscEntry(1024, P, 1), PscEntry(7, P, done=1)])
    ranges, end = worked(raw)
    assert ranges == [MapGpaRange(1012 << 12, 12, True, 1), MapGpaRange(1024 << 12, 512, True, 1)]
    assert end == Finished(PscError.NONE)


def test_hints_are_passed_over() -> None:
    raw = psc.pack([PscEntry(8, PscOp.PSMASH), PscEntry(9, P), PscEntry(512, PscOp.UNSMASH, 1)])
    assert worked(raw) == ([MapGpaRange(9 << 12, 1, True, 0)], Finished(PscError.NONE))


def test_a_failure_leaves_progress_in_the_list() -> None:
    raw = psc.pack([PscEntry(8, P), PscEntry(20, P), PscEntry(30, P)])
    work = PscList(raw)
    work.next_range()
    assert work.complete(1) is None
    work.next_range()
    with pytest.raises(ValueError, match="not complete"):
        work.next_range()
    assert work.complete(0) == Finished(PscError.GENERIC)
    assert struct.unpack_from("<HH", raw) == (1, 2)
    with pytest.raises(ValueError, match="1 of 0"):
        work.complete(1)
    ranges, _ = worked(raw)  # the guest asks again
    assert [found.gpa >> 12 for found in ranges] == [20, 30]


def test_ranges_can_be_under_way_together() -> None:
    entries = [
        PscEntry(8, P), PscEntry(9, P), PscEntry(20, S), PscEntry(512, P, 1), PscEntry(30, P),
        PscEntry(40, PscOp.PSMASH), PscEntry(50, S),
    ]  # fmt: skip
    raw = psc.pack(entries)
    work = PscList(raw)
    first = work.next_range()
    behind = work.further(10)
    assert [first, *behind] == [
        MapGpaRange(8 << 12, 2, True, 0),
        MapGpaRange(20 << 12, 1, False, 0),
        MapGpaRange(512 << 12, 512, True, 1),
        MapGpaRange(30 << 12, 1, True, 0),
    ], "as far as the hint"
    assert work.under_way == 4
    with pytest.raises(ValueError, match="5 of 4"):
        work.complete(5)
    assert work.complete(2) == Finished(PscError.GENERIC)
    assert struct.unpack_from("<HH", raw) == (3, 6), "what was done is in the list"
    work = PscList(raw)
    assert work.next_range() == MapGpaRange(512 << 12, 512, True, 1)
    assert len(work.further(1)) == 1
    assert work.complete(2) is None
    assert work.next_range() == MapGpaRange(50 << 12, 1, False, 0)
    assert work.further(9) == []


@pytest.mark.parametrize("wrong", [PscEntry(513, P, 1), PscEntry(512, P, 1, done=3)])
def test_an_entry_that_is_not_plain_is_left_for_its_turn(wrong: PscEntry) -> None:
    work = PscList(psc.pack([PscEntry(8, P), wrong]))
    work.next_range()
    assert work.further(9) == []


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ([PscEntry(8, P), PscEntry(513, P, 1)], PscError.INVALID_ENTRY),
        ([PscEntry(8, P), PscEntry(9, S, done=2)], PscError.INVALID_ENTRY),
    ],
)
def test_wrong_entries_end_the_work(entries: list[PscEntry], error: PscError) -> None:
    raw = psc.pack(entries)
    ranges, end = worked(raw)
    assert [found.gpa >> 12 for found in ranges] == [8]
    assert end == Finished(error)
    assert struct.unpack_from("<H", raw) == (1,)


def test_wrong_headers() -> None:
    raw = psc.pack([PscEntry(8, P)])
    struct.pack_into("<HH", raw, 0, 0, 1)
    assert worked(raw) == ([], Finished(PscError.INVALID_HEADER))
    struct.pack_into("<HH", raw, 0, 0, 253)
    assert worked(raw + bytes(8 * 400)) == ([], Finished(PscError.INVALID_HEADER))
    assert worked(bytearray(4)) == ([], Finished(PscError.INVALID_HEADER))
    struct.pack_into("<HH", raw, 0, 5, 0)
    assert worked(raw) == ([], Finished(PscError.NONE))


def test_what_is_shared_is_rescinded_first() -> None:
    assert ORDER[S] == (Step.RESCIND, Step.PSC)
    assert ORDER[P] == (Step.PSC, Step.VALIDATE)
    assert PAGE_SIZE == 4096
