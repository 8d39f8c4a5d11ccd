# SPDX-License-Identifier: GPL-2.0-or-later
"""Seals and purposes: every row of the tables, on a file and at the owner."""

from __future__ import annotations

import errno

import pytest

from privfs.budget import Budget
from privfs.memfile import Look, MemFile
from privfs.notifier.effects import Send
from privfs.notifier.owner import Owner
from privfs.notifier.user import User
from privfs.notifier.wire import Op
from privfs.operation import Done, Fallocate, FaultIn, Perform, Resize
from privfs.personality import GUEST_MEMFD, RESIZABLE, SHIM, V7, Refused
from privfs.seals import ALL_PURPOSES, ALL_SEALS, FORBIDS, Deed, Purpose, Seal, check, names

PAGE = 4096
KEEP, PUNCH, ZERO = 1, 3, 16


def file_of(pages: int = 8, allocated: int = 0) -> MemFile:
    file = MemFile(RESIZABLE, Budget(1000))
    file.submit("size", Resize(pages * PAGE))
    if allocated:
        file.submit("fill", Fallocate(KEEP, 0, allocated * PAGE))
        file.step_done("fill")
    return file


def errno_of(file: MemFile, request: Resize | Fallocate | FaultIn) -> int:
    """Submit, perform every step, return the answer."""
    effects = file.submit("op", request)
    while isinstance(effects[0], Perform):
        effects = file.step_done("op")
    assert isinstance(effects[0], Done)
    return effects[0].errno


@pytest.mark.parametrize(
    ("seal", "request_", "expected"),
    [
        (Seal.SHRINK, Resize(4 * PAGE), errno.EPERM),
        (Seal.SHRINK, Resize(8 * PAGE), 0),
        (Seal.SHRINK, Resize(9 * PAGE), 0),
        (Seal.GROW, Resize(9 * PAGE), errno.EPERM),
        (Seal.GROW, Resize(4 * PAGE), 0),
        (Seal.GROW, Fallocate(0, 0, 9 * PAGE), errno.EPERM),
        (Seal.GROW, Fallocate(0, 0, 8 * PAGE), 0),
        (Seal.GROW, Fallocate(ZERO, 0, 9 * PAGE), errno.EPERM),
        (Seal.WRITE, Fallocate(PUNCH, 0, PAGE), errno.EPERM),
        (Seal.WRITE, Fallocate(ZERO, 0, PAGE), errno.EPERM),
        (Seal.WRITE, Fallocate(KEEP, 0, PAGE), 0),
        (Seal.WRITE, Resize(4 * PAGE), 0),
        (Seal.AUTO_ALLOCATE, Fallocate(KEEP, 0, PAGE), 0),
        (Seal.SEAL, Resize(0), 0),
    ],
)
def test_what_a_seal_forbids(seal: Seal, request_: Resize | Fallocate, expected: int) -> None:
    file = file_of(allocated=2)
    file.add_seals(seal, stores=False)
    before = file.key()
    assert errno_of(file, request_) == expected
    if expected:
        assert file.key() == before


def test_no_implicit_allocation_before_and_after_a_punch() -> None:
    file = file_of(allocated=2)
    file.add_seals(Seal.AUTO_ALLOCATE, stores=False)
    assert file.look(0) is Look.PRESENT
    with pytest.raises(Refused) as refused:
        file.look(5)
    assert refused.value.errno == errno.ENOENT
    assert errno_of(file, Fallocate(PUNCH, 0, PAGE)) == 0
    with pytest.raises(Refused):
        file.look(0)
    assert errno_of(file, Fallocate(KEEP, 0, PAGE)) == 0
    assert file.look(0) is Look.PRESENT


def test_seals_accumulate_until_sealed() -> None:
    file = file_of()
    file.add_seals(Seal.GROW, stores=False)
    file.add_seals(Seal.SHRINK | Seal.SEAL, stores=False)
    assert names(file.seals) == ["SEAL", "SHRINK", "GROW"]
    with pytest.raises(Refused) as refused:
        file.add_seals(Seal.WRITE, stores=False)
    assert refused.value.errno == errno.EPERM


@pytest.mark.parametrize("mask", [0x10, 0x40, 1 << 31])
def test_unknown_seals(mask: int) -> None:
    file = file_of()
    with pytest.raises(Refused) as refused:
        file.add_seals(mask | Seal.GROW, stores=False)
    assert refused.value.errno == errno.EINVAL
    assert file.seals == Seal.NONE


@pytest.mark.parametrize(
    ("who", "expected"), [(V7, errno.EPERM), (SHIM, errno.EINVAL), (GUEST_MEMFD, errno.EINVAL)]
)
def test_who_can_be_sealed(who: object, expected: int) -> None:
    file = MemFile(who, Budget(1))  # type: ignore[arg-type]
    with pytest.raises(Refused) as refused:
        file.add_seals(Seal.GROW, stores=False)
    assert refused.value.errno == expected


def test_every_seal_forbids_something_and_the_lookup_is_complete() -> None:
    assert set(FORBIDS) == set(ALL_SEALS)
    assert {deed for row in FORBIDS.values() for deed in row} == set(Deed)
    for seal, row in FORBIDS.items():
        for deed in Deed:
            if deed in row:
                with pytest.raises(Refused) as refused:
                    check(seal, deed, "test")
                assert refused.value.errno == row[deed]
            else:
                check(seal, deed, "test")


# --- at the owner --------------------------------------------------------------------------------


class Session:
    """One user of inode 5 at an owner, without a wire."""

    def __init__(self, owner: Owner, sid: int) -> None:
        self.owner, self.sid, self.user = owner, sid, User()
        owner.connect(sid, 1000 + sid)
        self.say(self.user.hello(f"u{sid}"))

    def say(self, record: object, found: tuple[int, bool] | None = None) -> list[Send]:
        effects = self.owner.received(self.sid, record, found)  # type: ignore[arg-type]
        sent = [e for e in effects if isinstance(e, Send) and e.sid == self.sid]
        for send in sent:
            self.user.received(send.record)
        return sent

    def register(self, purpose: int, *, writable: bool = True) -> Send:
        return self.say(self.user.register(purpose), (5, writable))[-1]


def owner_of_one() -> Owner:
    owner = Owner(RESIZABLE, 1000)
    owner.create(5)
    owner.request(5, "size", Resize(8 * PAGE))
    return owner


def test_the_first_user_decides_the_purpose() -> None:
    owner = owner_of_one()
    assert Session(owner, 1).register(ALL_PURPOSES).record.status == 0
    assert Session(owner, 2).register(Purpose.UNMOVABLE).record.status == errno.EINVAL
    assert Session(owner, 3).register(ALL_PURPOSES).record.status == 0
    assert owner.files[5].purpose == ALL_PURPOSES
    assert owner.users[5] == {1, 3}


def test_a_purpose_outlives_its_users() -> None:
    owner = owner_of_one()
    first = Session(owner, 1)
    first.register(Purpose.UNMOVABLE)
    first.say(first.user.unregister(5))
    assert Session(owner, 2).register(Purpose.NONE).record.status == errno.EINVAL


def test_unknown_purposes() -> None:
    owner = owner_of_one()
    assert Session(owner, 1).register(0x8).record.status == errno.EINVAL
    assert owner.files[5].purpose is None


def test_write_seal_needs_that_nobody_stores() -> None:
    owner = owner_of_one()
    first = Session(owner, 1)
    first.register(ALL_PURPOSES)
    with pytest.raises(Refused) as refused:
        owner.seal(5, Seal.WRITE)
    assert refused.value.errno == errno.EBUSY
    first.say(first.user.unregister(5))
    owner.seal(5, Seal.WRITE)
    second = Session(owner, 2)
    answer = second.register(ALL_PURPOSES)
    assert (answer.record.status, answer.record.start) == (0, 0)
    denied = second.say(second.user.get(5, 0, 0, 1, write=True))[-1].record
    assert (denied.op, denied.status) == (Op.PAGE, errno.EACCES)


def test_a_fault_in_a_sealed_hole_is_denied() -> None:
    owner = owner_of_one()
    owner.seal(5, Seal.AUTO_ALLOCATE)
    user = Session(owner, 1)
    user.register(ALL_PURPOSES)
    denied = user.say(user.user.get(5, 0, 0, 1, write=True))[-1].record
    assert (denied.op, denied.status) == (Op.PAGE, errno.ENOENT)


# --- quotas --------------------------------------------------------------------------------------


def test_a_file_holds_no_more_than_its_quota() -> None:
    budget = Budget(100)
    file = MemFile(RESIZABLE, budget, quota=4)
    file.submit("size", Resize(8 * PAGE))
    assert errno_of(file, Fallocate(KEEP, 0, 5 * PAGE)) == errno.ENOSPC
    assert (file.allocated, budget.used) == (0, 0)
    assert errno_of(file, Fallocate(KEEP, 0, 4 * PAGE)) == 0
    assert errno_of(file, FaultIn(6)) == errno.ENOSPC
    assert errno_of(file, Fallocate(KEEP, 0, 4 * PAGE)) == 0  # nothing new
    assert errno_of(file, Fallocate(PUNCH, 0, PAGE)) == 0
    assert errno_of(file, FaultIn(6)) == 0
    assert (file.allocated, budget.used) == (4, 4)
