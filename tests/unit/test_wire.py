# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from privfs.notifier.wire import (
    LAYOUT,
    MAX_FRAME,
    MAX_PAGES,
    MAX_RECORDS,
    RECORD,
    Fence,
    Flag,
    Op,
    Reason,
    Record,
    To,
    WireError,
    label_words,
    pack,
    parse,
    words_label,
)

FIELDS = ("status", "req", "obj", "start", "end", "seq")
SIDES = (To.OWNER, To.USER)


def sides(op: Op) -> list[To]:
    return [side for side in SIDES if LAYOUT[op].to in (side, To.BOTH)]


def sample(op: Op) -> Record:
    """Return a record of ``op`` with every field in use set to something distinct."""
    fields = LAYOUT[op]
    record = Record(op, int(Flag.FD) if fields.needs_fd else 0)
    for number, name in enumerate(FIELDS, 11):
        if name in fields.uses:
            record = record._replace(**{name: number})
    if fields.ranged:
        record = record._replace(start=14, end=15)
    if fields.reasoned:
        record = record._replace(status=Reason.TRUNCATE)
    if fields.fenced:
        record = record._replace(status=Fence.UFFD, flags=int(Flag.FD))
    return record


ALL = [pytest.param(op, id=op.name) for op in Op]


def test_every_op_has_a_contract() -> None:
    assert set(LAYOUT) == set(Op)
    for fields in LAYOUT.values():
        assert fields.meaning
        assert all(fields.uses.values())


@pytest.mark.parametrize("op", ALL)
def test_round_trip(op: Op) -> None:
    record = sample(op)
    frame = pack([record])
    assert len(frame) == RECORD.size == 40
    for side in sides(op):
        assert parse(frame, side) == [record]


@pytest.mark.parametrize("op", ALL)
def test_the_wrong_direction_is_refused(op: Op) -> None:
    for side in set(SIDES) - set(sides(op)):
        with pytest.raises(WireError, match=f"{op.name}: may only be sent"):
            parse(pack([sample(op)]), side)


@pytest.mark.parametrize("op", ALL)
def test_every_unused_field_must_be_zero(op: Op) -> None:
    for name in set(FIELDS) - set(LAYOUT[op].uses):
        with pytest.raises(WireError, match=f"{op.name}: field {name} must be 0"):
            parse(pack([sample(op)._replace(**{name: 1})]), sides(op)[0])


@pytest.mark.parametrize("op", ALL)
def test_every_flag_that_is_not_allowed_is_refused(op: Op) -> None:
    for bit in range(8):
        flag = 1 << bit
        frame = pack([sample(op)._replace(flags=sample(op).flags | flag)])
        if LAYOUT[op].flags & flag:
            parse(frame, sides(op)[0])
        else:
            with pytest.raises(WireError, match=f"{op.name}: flags"):
                parse(frame, sides(op)[0])


@pytest.mark.parametrize("op", [op for op in Op if LAYOUT[op].needs_fd])
def test_a_descriptor_must_come_along(op: Op) -> None:
    with pytest.raises(WireError, match="without a file descriptor"):
        parse(pack([sample(op)._replace(flags=0)]), sides(op)[0])


@pytest.mark.parametrize("op", [op for op in Op if LAYOUT[op].ranged])
@pytest.mark.parametrize(("start", "end"), [(0, 0), (5, 5), (6, 5), (0, MAX_PAGES + 1), (2**63, 2)])
def test_bad_ranges_are_refused(op: Op, start: int, end: int) -> None:
    with pytest.raises(WireError, match=f"{op.name}: bad range"):
        parse(pack([sample(op)._replace(start=start, end=end)]), sides(op)[0])


@pytest.mark.parametrize("op", [op for op in Op if LAYOUT[op].ranged])
def test_the_whole_file_is_a_range(op: Op) -> None:
    parse(pack([sample(op)._replace(start=0, end=MAX_PAGES)]), sides(op)[0])


@pytest.mark.parametrize("status", [0, 5, 0xFFFF])
def test_an_invalidation_has_a_reason(status: int) -> None:
    with pytest.raises(WireError, match="unknown reason"):
        parse(pack([sample(Op.INVALIDATE)._replace(status=status)]), To.USER)


@pytest.mark.parametrize("status", [max(Fence) + 1, 0xFFFF])
def test_a_fence_is_one_that_we_know(status: int) -> None:
    with pytest.raises(WireError, match=f"unknown fence {status}"):
        parse(pack([sample(Op.HELLO)._replace(status=status)]), To.OWNER)


@pytest.mark.parametrize("fence", Fence)
@pytest.mark.parametrize("flags", [Flag.NONE, Flag.FD])
def test_a_userfaultfd_is_the_only_fence_with_a_descriptor(fence: Fence, flags: Flag) -> None:
    frame = pack([sample(Op.HELLO)._replace(status=fence, flags=int(flags))])
    if (fence is Fence.UFFD) == (flags is Flag.FD):
        assert parse(frame, To.OWNER)[0].status == fence
    else:
        with pytest.raises(WireError, match="comes with its fence"):
            parse(frame, To.OWNER)


@pytest.mark.parametrize("op", [0, max(Op) + 1, 255])
def test_unknown_ops_are_refused(op: int) -> None:
    for side in SIDES:
        with pytest.raises(WireError, match="unknown op"):
            parse(pack([Record(op)]), side)


def test_frames_have_bounds() -> None:
    ack = pack([Record(Op.ACK, seq=1)])
    assert len(parse(ack * MAX_RECORDS, To.OWNER)) == MAX_RECORDS
    assert len(ack * MAX_RECORDS) == MAX_FRAME
    for bad in (b"", ack[:-1], ack + b"\0", ack * (MAX_RECORDS + 1)):
        with pytest.raises(WireError, match="frame of"):
            parse(bad, To.OWNER)


def test_one_bad_record_refuses_its_frame() -> None:
    with pytest.raises(WireError):
        parse(pack([Record(Op.ACK, seq=1), Record(Op.WELCOME)]), To.OWNER)


@given(st.binary(max_size=130), st.sampled_from(SIDES))
def test_garbage_raises_nothing_but_wire_errors(frame: bytes, side: To) -> None:
    try:
        records = parse(frame, side)
    except WireError:
        return
    assert pack(records) == frame


U64 = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1))
NEARLY = st.builds(
    Record, st.integers(0, 15), st.integers(0, 9), st.integers(0, 6), st.integers(0, 2**32 - 1),
    U64, U64, U64, U64,
)  # fmt: skip


@given(st.lists(NEARLY, min_size=1, max_size=3), st.sampled_from(SIDES))
@example([Record(Op.HELLO, 0x80, req=1, start=1)], To.OWNER)  # ~Flag.NONE did not hold bit 7
def test_nearly_right_records_obey_their_contract(records: list[Record], side: To) -> None:
    try:
        parsed = parse(pack(records), side)
    except WireError:
        return
    assert parsed == records
    for record in parsed:
        fields = LAYOUT[Op(record.op)]
        assert fields.to in (side, To.BOTH)
        assert record.flags & ~int(fields.flags) == 0
        assert all(not getattr(record, name) for name in FIELDS if name not in fields.uses)
        assert not fields.ranged or record.start < record.end <= MAX_PAGES


@given(st.text(max_size=16))
def test_labels_round_trip_or_are_refused(label: str) -> None:
    try:
        words = label_words(label)
    except ValueError:
        assert len(label.encode(errors="surrogatepass")) > 16 or not label.isprintable()
        return
    assert all(0 <= word < 2**64 for word in words)
    if label.isprintable():
        assert words_label(*words) == label


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_any_label_is_fit_for_a_terminal(low: int, high: int) -> None:
    assert words_label(low, high).isprintable()


def test_a_long_label_is_refused() -> None:
    assert words_label(*label_words("x" * 16)) == "x" * 16
    with pytest.raises(ValueError, match="at most 16 bytes, got 17"):
        label_words("x" * 17)
