# SPDX-License-Identifier: GPL-2.0-or-later
"""Every interleaving of small worlds keeps the contract; without any one rule it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from contract_mutations import MUTATIONS, Mutation
from contract_values import Call, Release, Setup, Shutdown, allocate, grow, punch, resize, zero
from contract_world import ContractWorld, fair

from privfs.personality import GUEST_MEMFD
from privfs.testing import Report, explore, replay

pytestmark = pytest.mark.exhaustive

ONE = frozenset({0})
P = Call(punch(0, 1))
Q = Call(punch(1, 2))
CANCEL = Call(punch(0, 1), cancel=True)


def own(start: int, end: int, *, record: bool = True) -> Call:
    """Return a call of user 0 itself."""
    return Call(punch(start, end), caller=0, record=record)


def check(world: ContractWorld, name: str) -> Report:
    report = explore(world, goal=ContractWorld.quiet, fair=fair)
    print(f"{name}: {report}")
    return report


WORLDS = {
    "one user, two invalidations, a caller that may be killed": Setup(
        calls=(CANCEL, P), populated=(0,)
    ),
    "one user that hangs, closes its socket or is killed": Setup(
        calls=(CANCEL, P), populated=(0,), hang=ONE, close=ONE, kill=ONE
    ),
    "one user whose exit is never seen": Setup(
        calls=(CANCEL, P), populated=(0,), hang=ONE, close=ONE, immortal=ONE
    ),
    "one user with two vCPUs": Setup(
        vcpus=2, calls=(P, P), populated=(0,), hang=ONE
    ),
    "one user that comes and goes": Setup(
        calls=(P, P), populated=(0,), reregister=2
    ),
    "one user that comes and goes with two vCPUs": Setup(
        vcpus=2, calls=(P,), populated=(0,), reregister=1
    ),
    "two users, one hangs": Setup(
        users=2, calls=(P, P), populated=(0,), hang=ONE
    ),
    "two users, one late": Setup(
        users=2, calls=(P, P), populated=(0,), late=frozenset({1}), close=ONE
    ),
    "two pages, three overlapping invalidations": Setup(
        pages=2, calls=(P, Q, Call(punch(0, 2))), populated=(0, 1)
    ),
    "two pages, a short ring": Setup(
        pages=2, calls=(P, Q, P), populated=(0, 1), ring=1
    ),
    "two pages, one user that closes its socket": Setup(
        pages=2, calls=(CANCEL, Q), populated=(0, 1), close=ONE
    ),
    "a file that shrinks, grows and is zeroed": Setup(
        pages=2, calls=(Call(resize(0), cancel=True), Call(resize(2)), Call(zero(0, 1))),
        populated=(0, 1), hang=ONE,
    ),
    "allocations that fail": Setup(
        pages=2, size=0, calls=(Call(grow(0, 2)), Call(grow(1, 2)), Call(resize(1))), fails=True
    ),
    "an allocation, a punch and a fault": Setup(
        pages=2, calls=(Call(allocate(0, 2)), Call(punch(0, 2)), Call(zero(1, 2), cancel=True)),
        fails=True,
    ),
    "a guest_memfd whose last descriptor is closed": Setup(
        calls=(P, Call(Release())), populated=(0,), personality=GUEST_MEMFD,
        hang=ONE, close=ONE, kill=ONE,
    ),
    "a file that its users keep alive": Setup(
        calls=(Call(Release()), own(0, 1)), populated=(0,), kill=ONE, reregister=1
    ),
    "a shutdown with a user that comes and goes": Setup(
        calls=(P, Call(Shutdown()), P), populated=(0,), hang=ONE, reregister=1
    ),
    "a shutdown with a user whose exit is never seen": Setup(
        users=2, calls=(Call(Shutdown()), P), populated=(0,), hang=ONE, immortal=ONE
    ),
    "a file that two users keep alive, one is killed": Setup(
        users=2, calls=(Call(Release()), own(0, 1)), populated=(0,), kill=ONE
    ),
    "a user that punches on the mount itself": Setup(
        users=2, calls=(own(0, 1, record=False), own(0, 1, record=False)), populated=(0,), hang=ONE
    ),
    "a user that punches by record, with slow timers": Setup(
        calls=(own(0, 1), own(0, 1), own(0, 1)), populated=(0,), stale=True
    ),
}  # fmt: skip

SLOW = {
    "two users with two vCPUs each": Setup(
        users=2, vcpus=2, calls=(P, P), populated=(0,)
    ),
    "two users, one hangs and one closes its socket": Setup(
        users=2, calls=(P, P), populated=(0,), hang=ONE, close=frozenset({1})
    ),
    "two users, one hangs and one is killed": Setup(
        users=2, calls=(CANCEL, P), populated=(0,), hang=ONE, kill=frozenset({1})
    ),
    "two pages, two users, three invalidations": Setup(
        users=2, pages=2, calls=(P, Q, Call(punch(0, 2))), populated=(0, 1)
    ),
    "two pages, one user that fails, three invalidations": Setup(
        pages=2, calls=(CANCEL, Q, Call(punch(0, 2))), populated=(0, 1), hang=ONE, close=ONE
    ),
    "a file that two users keep alive and punch": Setup(
        users=2, calls=(Call(Release()), own(0, 1)), populated=(0,), reregister=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORLDS)
def test_every_interleaving_keeps_the_contract(name: str) -> None:
    report = check(ContractWorld(WORLDS[name]), name)
    assert report.problem is None, report.script()
    assert report.complete
    assert report.goals > 0


INLINE = [
    "one user that hangs, closes its socket or is killed",
    "one user that comes and goes",
    "two pages, three overlapping invalidations",
    "a file that shrinks, grows and is zeroed",
    "a file that its users keep alive",
    "a guest_memfd whose last descriptor is closed",
    "a user that punches by record, with slow timers",
]


@pytest.mark.parametrize("name", INLINE)
def test_steps_that_end_at_once_keep_the_contract(name: str) -> None:
    report = check(ContractWorld(replace(WORLDS[name], inline=True)), f"inline: {name}")
    assert report.problem is None, report.script()
    assert report.complete


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SLOW)
def test_every_interleaving_of_larger_worlds_keeps_the_contract(name: str) -> None:
    report = check(ContractWorld(SLOW[name]), name)
    assert report.problem is None, report.script()
    assert report.complete


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.rule)
def test_each_rule_is_needed(mutation: Mutation) -> None:
    intact = explore(ContractWorld(mutation.setup), goal=ContractWorld.quiet, fair=fair)
    assert intact.problem is None, intact.script()
    report = check(mutation.build(), f"without {mutation.rule!r}")
    assert report.problem is not None, f"nothing is found without {mutation.rule!r}"
    assert mutation.finds in report.problem, report.script()
    assert report.trace is not None
    print(f"without {mutation.rule!r}: {len(report.trace)} steps")
    if not report.stuck:
        assert replay(mutation.build(), report.trace).violations() == report.problem
