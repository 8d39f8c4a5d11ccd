# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest

from kvmsim.uapi import KvmError
from kvmsim.vmm.bootparams import RamRange
from kvmsim.vmm.convert import Converted, Discard, Ignored, Refused, convert_memory

PAGE = 4096
RAM = (
    RamRange(0, 4 * PAGE, private=False),
    RamRange(4 * PAGE, 4 * PAGE),
    RamRange(8 * PAGE, 4 * PAGE),
    RamRange(16 * PAGE, 4 * PAGE),
)


@dataclass
class Memory:
    """Remembers what it was asked, in order; fails at the call that it is told to."""

    calls: list[tuple[object, ...]] = field(default_factory=list)
    changes: bool = True
    fail_at: int = -1
    error: Exception = field(default_factory=lambda: OSError(errno.EIO, "broken"))

    def _call(self, *call: object) -> None:
        self.calls.append(call)
        if len(self.calls) - 1 == self.fail_at:
            raise self.error

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> bool:
        self._call("set", gpa, size, private)
        return self.changes

    def discard_shared(self, gpa: int, size: int) -> None:
        self._call("shared", gpa, size)

    def discard_private(self, gpa: int, size: int) -> None:
        self._call("private", gpa, size)

    def read_shared(self, gpa: int, length: int) -> bytes:
        raise AssertionError("a conversion reads nothing")

    def write_shared(self, gpa: int, data: bytes) -> None:
        raise AssertionError("a conversion writes nothing")

    def populate(self, gpa: int, source: bytes) -> None:
        raise AssertionError("a conversion fills nothing")


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("discard", list(Discard))
def test_attributes_first_then_the_side_that_is_left(private: bool, discard: Discard) -> None:
    memory = Memory()
    result = convert_memory(memory, RAM, 4 * PAGE, PAGE, private=private, discard=discard)
    expected: list[tuple[object, ...]] = [("set", 4 * PAGE, PAGE, private)]
    left = "shared" if private else "private"
    given = discard.value in (left, "both")
    if given:
        expected.append((left, 4 * PAGE, PAGE))
    assert memory.calls == expected
    assert result == Converted(4 * PAGE, PAGE, private, True, PAGE if given else 0)


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (4 * PAGE + 1, PAGE),
        (4 * PAGE, PAGE - 1),
        (4 * PAGE, 0),
        (-PAGE, PAGE),
        (0, PAGE),  # RAM without a private side
        (3 * PAGE, 2 * PAGE),  # half of it
        (10 * PAGE, 4 * PAGE),  # runs into a hole
        (12 * PAGE, PAGE),  # a hole
        (19 * PAGE, 2 * PAGE),  # beyond all RAM
    ],
)
def test_impossible_ranges_change_nothing(gpa: int, size: int) -> None:
    memory = Memory()
    result = convert_memory(memory, RAM, gpa, size, private=True)
    assert isinstance(result, Refused)
    assert result.errno == errno.EINVAL
    assert not result.attributes_set
    assert memory.calls == []


@pytest.mark.parametrize(("gpa", "size"), [(0, 4 * PAGE), (12 * PAGE, 4 * PAGE)])
def test_to_shared_where_nothing_can_be_private_is_silently_right(gpa: int, size: int) -> None:
    memory = Memory()
    assert convert_memory(memory, RAM, gpa, size, private=False) == Ignored(gpa, size)
    assert memory.calls == []


def test_to_shared_converts_only_what_can_be_private() -> None:
    memory = Memory()
    result = convert_memory(memory, RAM, 2 * PAGE, 4 * PAGE, private=False)
    assert isinstance(result, Converted)
    assert memory.calls == [
        ("set", 4 * PAGE, 2 * PAGE, False),
        ("private", 4 * PAGE, 2 * PAGE),
    ]
    assert result.discarded == 2 * PAGE


def test_a_range_over_two_slots_is_converted_slot_by_slot() -> None:
    memory = Memory()
    result = convert_memory(memory, RAM, 6 * PAGE, 4 * PAGE, private=True)
    assert [c[:3] for c in memory.calls if c[0] == "set"] == [
        ("set", 6 * PAGE, 2 * PAGE),
        ("set", 8 * PAGE, 2 * PAGE),
    ]
    assert result == Converted(6 * PAGE, 4 * PAGE, True, True, 4 * PAGE)


@pytest.mark.parametrize(
    ("fail_at", "attributes_set"), [(0, False), (1, True), (2, True), (3, True)]
)
def test_a_failure_says_whether_attributes_were_changed(fail_at: int, attributes_set: bool) -> None:
    memory = Memory(fail_at=fail_at)
    result = convert_memory(memory, RAM, 6 * PAGE, 4 * PAGE, private=True)
    assert isinstance(result, Refused)
    assert result.errno == errno.EIO
    assert result.attributes_set is attributes_set
    assert len(memory.calls) == fail_at + 1


def test_kvm_error_keeps_its_errno() -> None:
    memory = Memory(fail_at=0, error=KvmError(errno.ENOMEM, "KVM_SET_MEMORY_ATTRIBUTES", "full"))
    result = convert_memory(memory, RAM, 4 * PAGE, PAGE, private=True)
    assert isinstance(result, Refused)
    assert result.errno == errno.ENOMEM


def test_unchanged_attributes_are_told() -> None:
    result = convert_memory(Memory(changes=False), RAM, 4 * PAGE, PAGE, private=True)
    assert isinstance(result, Converted)
    assert not result.changed
