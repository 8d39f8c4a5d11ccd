# SPDX-License-Identifier: GPL-2.0-or-later
"""Files on memory that comes and goes by the extent: the end of every extent is an event."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from privfs import views
from privfs.budget import Budget
from privfs.extents import Layout
from privfs.memfile import MemFile
from privfs.notifier.effects import Effect as OwnerEffect
from privfs.notifier.effects import Send, Work
from privfs.notifier.owner import Owner
from privfs.notifier.user import RING, ExtentArrived, Granted, Happening, User, Zap
from privfs.notifier.wire import Flag, Op, Reason, Record
from privfs.operation import Done, Effect, Fallocate, FaultIn, Perform, Request, Resize, Step
from privfs.personality import PAGE_SIZE, RESIZABLE, Refused
from privfs.seals import Seal

INO = 7
UNIT = 4
#: A store whose extents are chunks of four pages and cannot be punched.
WHOLE = replace(
    RESIZABLE, page_size=UNIT * PAGE_SIZE, layout=Layout(UNIT, 0, whole=True), read_only_users=False
)


def fallocate(mode: int, first: int, last: int) -> Fallocate:
    """Return a call on chunks [first, last)."""
    size = UNIT * PAGE_SIZE
    return Fallocate(mode, first * size, (last - first) * size)


def run(file: MemFile, request: Request) -> list[Perform]:
    """Perform a request that succeeds; return its steps."""
    steps: list[Perform] = []
    effects: list[Effect] = file.submit("op", request)
    while isinstance(effects[0], Perform):
        steps.append(effects[0])
        effects = file.step_done("op")
    assert effects[0] == Done("op", 0)
    return steps


@pytest.fixture
def file() -> MemFile:
    """A file of four chunks, the third of which is a hole."""
    file = MemFile(WHOLE, Budget(100))
    run(file, Resize(4 * UNIT * PAGE_SIZE))
    run(file, fallocate(0, 0, 2))
    run(file, fallocate(0, 3, 4))
    assert file.instances == {0: 1, 1: 2, 3: 3}
    return file


# --- the file ----------------------------------------------------------------------------------


def test_a_punch_ends_the_extents_of_its_range(file: MemFile) -> None:
    steps = run(file, fallocate(3, 1, 3))
    assert [(step.step, step.dead) for step in steps] == [
        (Step.INVALIDATE, ()), (Step.FREE, ((1, 2),)),
    ]  # fmt: skip
    assert file.instances == {0: 1, 3: 3}
    assert run(file, FaultIn(UNIT + 1))[0][3:5] == (Step.ALLOCATE and UNIT, 2 * UNIT)
    assert file.instances == {0: 1, 1: 4, 3: 3}  # an instance is never used again


def test_what_was_zeroed_is_other_memory(file: MemFile) -> None:
    steps = run(file, fallocate(16, 0, 3))
    assert [(step.step, step.dead) for step in steps] == [
        (Step.INVALIDATE, ()), (Step.FREE, ((0, 1), (1, 2))), (Step.ALLOCATE, ()),
    ]  # fmt: skip
    assert file.instances == {0: 4, 1: 5, 2: 6, 3: 3}


def test_a_shrink_ends_what_leaves_the_file(file: MemFile) -> None:
    assert run(file, Resize(UNIT * PAGE_SIZE))[-1].dead == ((1, 2), (3, 3))
    assert file.instances == {0: 1}


def test_a_growth_that_failed_ends_the_extents_it_got(file: MemFile) -> None:
    used = file.allocated
    file.submit("a", fallocate(0, 2, 8))
    (effect,) = file.step_done("a", failed=errno.ENOSPC, upto=6 * UNIT)
    assert isinstance(effect, Perform)
    assert (effect.step, effect.dead) == (Step.FREE, ((4, 5), (5, 6)))
    file.step_done("a")
    assert file.instances == {0: 1, 1: 2, 2: 4, 3: 3}
    assert file.allocated == used + UNIT  # the hole inside the file stays filled


def test_a_punch_given_up_ends_nothing(file: MemFile) -> None:
    before = file.instances.copy()
    file.submit("p", fallocate(3, 0, 4))
    file.abandon("p", errno.EIO, "no proof")
    assert file.instances == before


def test_many_extents_cost_no_more_than_a_range_asks_for() -> None:
    file = MemFile(WHOLE, Budget(1 << 20))
    run(file, fallocate(0, 0, 1000))
    assert [step.dead for step in run(file, fallocate(3, 500, 502))][-1] == ((500, 501), (501, 502))
    assert len(run(file, Resize(0))[-1].dead) == 998


def test_a_seal_against_stores_needs_descriptors_that_cannot_store(file: MemFile) -> None:
    before = file.key()
    with pytest.raises(Refused, match="never read-only") as caught:
        file.add_seals(int(Seal.WRITE | Seal.GROW), stores=False)
    assert caught.value.errno == errno.EINVAL
    assert file.key() == before
    file.add_seals(int(Seal.GROW), stores=True)


# --- the owner and a user ----------------------------------------------------------------------


class Pair:
    """An owner and one user of a file, that talk without a wire."""

    def __init__(self) -> None:
        self.owner = Owner(WHOLE, 100)
        self.user = User(RING)
        self.owner.create(INO)
        self.call(Resize(4 * UNIT * PAGE_SIZE))
        self.call(fallocate(1, 0, 4))
        self.owner.connect(1, 100)
        self.said: list[Happening] = []
        self.tell(self.user.hello())
        self.tell(self.user.register(), (INO, True))

    def call(self, request: Request, op: str = "op") -> None:
        self.do(self.owner.request(INO, op, request))

    def tell(self, record: Record, found: tuple[int, bool] | None = None) -> list[Happening]:
        """Send a record; return what the user heard of it."""
        self.said = []
        self.do(self.owner.received(1, record, found))
        return self.said

    def do(self, effects: list[OwnerEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Work):
                self.do(self.owner.performed(INO, effect.perform.op))
            elif isinstance(effect, Send):
                self.said.append(self.user.received(effect.record))

    def get(self, page: int, *, again: bool = False) -> tuple[int, int]:
        """Fault; return the instance whose extent came along, if any, and that of the grant."""
        *before, granted = self.tell(
            self.user.get(INO, page, page, page + 1, write=True, again=again)
        )
        assert isinstance(granted, Granted)
        instance = 0
        for extent in before:
            assert isinstance(extent, ExtentArrived)
            first = page // UNIT * UNIT
            assert (extent.start, extent.end) == (first, first + UNIT)
            instance = extent.instance
        return instance, granted.instance


def test_a_user_hears_of_every_extent_that_a_punch_ends() -> None:
    pair = Pair()
    assert [pair.get(page) for page in (0, UNIT, 2 * UNIT)] == [(1, 1), (2, 2), (3, 3)]
    pair.said = []
    pair.call(fallocate(3, 1, 3), "p")
    assert pair.said == [Zap(INO, UNIT, 3 * UNIT, 2, Reason.PUNCH, (2, 3))]
    assert [pair.user.extent(INO, instance) for instance in (1, 2, 3)] == [(0, UNIT), None, None]
    assert pair.owner.files[INO].instances == {i: i + 1 for i in range(4)}  # not proven yet
    pair.tell(pair.user.ack(2))
    assert sorted(pair.owner.files[INO].instances) == [0, 3]
    assert pair.get(UNIT) == (5, 5)
    assert views.meminfo(pair.owner)["given_up"] == 2 * UNIT * PAGE_SIZE
    assert f"PrivGivenUp: {2 * UNIT * 4:>15} kB\n" in views.meminfo_text(pair.owner)
    pair.tell(pair.user.unregister(INO))  # it had two more
    assert views.meminfo(pair.owner)["given_up"] == 4 * UNIT * PAGE_SIZE
    pair.do(pair.owner.gone(1))
    assert views.meminfo(pair.owner)["given_up"] == 0


def test_an_extent_that_lived_on_is_asked_for_again() -> None:
    """The user has closed it, then its owner gave the punch up: nothing was freed."""
    pair = Pair()
    pair.get(0)
    pair.said = []
    pair.call(fallocate(3, 0, 1), "p")
    (zap,) = pair.said
    assert isinstance(zap, Zap)
    pair.do(pair.owner.cancel("p", errno.EINTR))  # zap only
    pair.tell(pair.user.ack(zap.seq))
    assert (pair.get(0), pair.user.extent(INO, 1)) == ((0, 1), None)
    assert (pair.get(0, again=True), pair.user.extent(INO, 1)) == ((1, 1), (0, UNIT))


def test_an_invalidation_says_that_extents_die_only_where_they_do() -> None:
    for personality, flags in ((WHOLE, Flag.EXTENT), (RESIZABLE, 0)):
        owner = Owner(personality, 100)
        owner.create(INO)
        owner.connect(1, 100)
        user = User()
        owner.received(1, user.hello())
        owner.received(1, user.register(), (INO, True))
        for request in (Resize(UNIT * PAGE_SIZE), fallocate(1, 0, 1)):
            for effect in owner.request(INO, "op", request):
                if isinstance(effect, Work):
                    owner.performed(INO, "op")
        sent = [
            e.record for e in owner.request(INO, "p", fallocate(3, 0, 1)) if isinstance(e, Send)
        ]
        assert [(record.op, record.flags) for record in sent] == [(Op.INVALIDATE, flags)]


def test_a_user_that_must_not_store_is_no_user() -> None:
    """No descriptor of such memory is read-only: it would be let in to store."""
    pair = Pair()
    pair.owner.connect(2, 101)
    user = User()
    pair.owner.received(2, user.hello())
    (send,) = pair.owner.received(2, user.register(), (INO, False))
    assert isinstance(send, Send)
    assert (send.record.op, send.record.status) == (Op.REGISTERED, errno.EACCES)
