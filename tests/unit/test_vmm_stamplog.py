# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import struct

import pytest

from kvmsim.vmm import stamplog
from kvmsim.vmm.stamplog import Record, RecordFlag, Stamp, StampLog, StampLogError, Verdict

GPA = 0x100000
KNOWN = RecordFlag.KNOWN


class Memory:
    """The log's bytes."""

    def __init__(self, vcpus: int = 2, window_gfn: int = 0x200) -> None:
        self.data = bytearray(stamplog.STAMP_LOG_SIZE)
        struct.pack_into(
            "<QIIQQ", self.data, 0, stamplog.STAMP_MAGIC, vcpus, stamplog.STAMP_RING, window_gfn, 64
        )

    def read_shared(self, gpa: int, length: int) -> bytes:
        return bytes(self.data[gpa - GPA : gpa - GPA + length])

    def write_shared(self, gpa: int, data: bytes) -> None:
        self.data[gpa - GPA : gpa - GPA + len(data)] = data

    def epoch(self, page: int) -> tuple[int, int]:
        begin, done = struct.unpack_from("<II", self.data, stamplog.STAMP_EPOCHS + 8 * page)
        return begin, done

    def put_record(self, vcpu: int, seq: int, value: int = 0) -> None:
        at = stamplog.STAMP_RINGS + (vcpu * stamplog.STAMP_RING + seq % stamplog.STAMP_RING) * 64
        struct.pack_into(
            "<QQQIIIIIIII", self.data, at, seq, value, 0, 5, 0, 0, 0, 0, 0, seq & 0xFFFFF, vcpu
        )


def record(**fields: int) -> Record:
    base = {
        "seq": 1,
        "value": 0,
        "expect": 0,
        "page": 0,
        "begin": 0,
        "done": 0,
        "expect_epoch": 0,
        "flags": KNOWN,
        "verdict": Verdict.SAME,
        "generation": 1,
        "vcpu": 0,
    }
    return Record(**(base | fields))  # type: ignore[arg-type]


def test_no_log_without_a_guest() -> None:
    memory = Memory()
    memory.data[0] ^= 1
    with pytest.raises(StampLogError, match="boot the guest"):
        StampLog(memory, GPA)


def test_punch_moves_begin_before_and_done_after() -> None:
    memory = Memory()
    log = StampLog(memory, GPA)
    log.begin_punch(0x202, 2)
    assert [memory.epoch(page) for page in range(1, 5)] == [(0, 0), (1, 0), (1, 0), (0, 0)]
    log.end_punch(0x202, 2)
    assert [memory.epoch(page) for page in range(1, 5)] == [(0, 0), (1, 1), (1, 1), (0, 0)]


def test_failed_punch_is_never_done_but_the_next_one_is() -> None:
    memory = Memory()
    log = StampLog(memory, GPA)
    log.begin_punch(0x200, 1)
    log.begin_punch(0x200, 1)
    log.end_punch(0x200, 1)
    assert memory.epoch(0) == (2, 2)


def test_end_without_begin_is_refused_and_changes_nothing() -> None:
    memory = Memory()
    log = StampLog(memory, GPA)
    log.begin_punch(0x200, 1)
    with pytest.raises(StampLogError, match="not begun"):
        log.end_punch(0x200, 2)
    assert memory.epoch(0) == (1, 0)


@pytest.mark.parametrize(("gfn", "npages"), [(0x1FF, 1), (0x23F, 2), (0x200, 0), (0x240, 1)])
def test_pages_outside_the_window_are_refused(gfn: int, npages: int) -> None:
    memory = Memory()
    before = bytes(memory.data)
    with pytest.raises(StampLogError, match="outside"):
        StampLog(memory, GPA).begin_punch(gfn, npages)
    assert memory.data == before


def test_records_come_in_order_and_only_the_new_ones() -> None:
    memory = Memory()
    log = StampLog(memory, GPA)
    for seq in range(1, 400):
        memory.put_record(1, seq)
    assert [r.seq for r in log.records(1)] == list(range(400 - 256, 400))
    assert [r.seq for r in log.records(1, after=397)] == [398, 399]
    assert log.records(0) == []


def test_stats_are_those_of_the_vcpu() -> None:
    memory = Memory()
    struct.pack_into(
        "<13Q", memory.data, stamplog.STAMP_VCPUS + stamplog.LAYOUT["vcpu"], *range(13)
    )
    log = StampLog(memory, GPA)
    assert log.stats(1).head == 12
    assert log.stats(1).bad == 9 + 10 + 11
    assert log.stats(0).bad == 0
    assert log.first_bad(1) is None
    with pytest.raises(StampLogError, match="no vcpu 2"):
        log.stats(2)


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"flags": 0, "value": 9}, Verdict.FRESH),
        ({"value": 7, "expect": 7}, Verdict.SAME),
        ({"value": 0, "expect": 0, "done": 5, "begin": 5}, Verdict.SAME),
        # the punch began and did not return yet: the old value is allowed
        ({"value": 7, "expect": 7, "begin": 1, "done": 0}, Verdict.SAME),
        ({"value": 7, "expect": 7, "begin": 1, "done": 1}, Verdict.STALE),
        # written with the epoch of a punch that returns later: allowed to survive it
        ({"value": 7, "expect": 7, "begin": 1, "done": 1, "expect_epoch": 1}, Verdict.SAME),
        ({"value": 0, "expect": 7, "begin": 1, "done": 0}, Verdict.PUNCHED),
        ({"value": 0, "expect": 7, "begin": 1, "done": 1}, Verdict.PUNCHED),
        ({"value": 0, "expect": 7, "begin": 1, "done": 1, "expect_epoch": 1}, Verdict.LOST),
        ({"value": 0, "expect": 7}, Verdict.LOST),
        # … or to be erased by it, if the punch was still running at the write
        (
            {
                "value": 0,
                "expect": 7,
                "begin": 1,
                "expect_epoch": 1,
                "flags": KNOWN | RecordFlag.WINDOWED,
            },
            Verdict.PUNCHED,
        ),
        ({"value": 6, "expect": 7, "begin": 1, "done": 1}, Verdict.MISMATCH),
        ({"value": 6, "expect": 0, "begin": 1, "done": 1}, Verdict.MISMATCH),
    ],
)
def test_verdicts(fields: dict[str, int], verdict: Verdict) -> None:
    assert record(**fields).judged() is verdict
    assert verdict.bad == (verdict in (Verdict.STALE, Verdict.LOST, Verdict.MISMATCH))


def test_stamp_fields() -> None:
    word = 0x12345 | 3 << 20 | 0xABCDE << 24 | 0x54321 << 44
    assert Stamp.unpack(word) == Stamp(0x12345, 3, 0xABCDE, 0x54321)
