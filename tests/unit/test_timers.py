# SPDX-License-Identifier: GPL-2.0-or-later
"""When rungs are due, and which time does not count."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from privfs.ladder import Ladder
from privfs.notifier.effects import Rung
from privfs.timers import BEAT, SLACK, RunningTime, Timers

LADDER = Ladder(log=0.1, ack=2.0, kill=3.0)
LOG, CONDEMN, GIVE_UP = LADDER.delay(Rung.LOG), LADDER.delay(Rung.CONDEMN), 3.0


def test_time_runs_while_somebody_looks() -> None:
    now = [100.0]
    running = RunningTime(lambda: now[0])
    began = running.read()
    for _ in range(8):
        now[0] += BEAT
        running.read()
    assert running.read() - began == pytest.approx(8 * BEAT)


@pytest.mark.parametrize("stood_still", [1.0, 3600.0, 1e9])
def test_time_in_which_nobody_looked_is_left_out(stood_still: float) -> None:
    now = [100.0]
    running = RunningTime(lambda: now[0])
    began = running.read()
    now[0] += stood_still
    assert running.read() - began == pytest.approx(BEAT + SLACK)
    now[0] += 0.2
    assert running.read() - began == pytest.approx(BEAT + SLACK + 0.2)


def test_a_little_late_counts() -> None:
    now = [100.0]
    running = RunningTime(lambda: now[0])
    began = running.read()
    now[0] += BEAT + SLACK
    assert running.read() - began == pytest.approx(BEAT + SLACK)


async def rungs(timers: Timers, count: int) -> list[tuple[float, int, Rung]]:
    found = []
    began = trio.current_time()
    for _ in range(count):
        ino, _, rung = await timers.next()
        found.append((round(trio.current_time() - began, 3), ino, rung))
    return found


def test_rungs_come_in_the_order_in_which_they_are_due() -> None:
    async def main() -> None:
        timers = Timers(LADDER.delay, lambda ino, op: True, trio.current_time)
        timers.arm(1, "a", Rung.GIVE_UP)
        timers.arm(2, "b", Rung.LOG)
        timers.arm(3, "c", Rung.CONDEMN)
        assert await rungs(timers, 3) == [
            (LOG, 2, Rung.LOG), (CONDEMN, 3, Rung.CONDEMN), (GIVE_UP, 1, Rung.GIVE_UP),
        ]  # fmt: skip

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_an_earlier_rung_is_heard_of_by_who_waits_for_a_later_one() -> None:
    async def main() -> None:
        timers = Timers(LADDER.delay, lambda ino, op: True, trio.current_time)
        timers.arm(1, "a", Rung.GIVE_UP)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def later() -> None:
                await trio.sleep(1)
                timers.arm(2, "b", Rung.LOG)

            assert await rungs(timers, 2) == [
                (1 + LOG, 2, Rung.LOG), (GIVE_UP, 1, Rung.GIVE_UP),
            ]  # fmt: skip

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_who_waits_for_nobody_is_not_waited_for() -> None:
    async def main() -> None:
        timers = Timers(LADDER.delay, lambda ino, op: ino != 1, trio.current_time)
        timers.arm(1, "a", Rung.GIVE_UP)
        timers.arm(2, "b", Rung.GIVE_UP)
        assert await rungs(timers, 2) == [(0.0, 1, Rung.GIVE_UP), (GIVE_UP, 2, Rung.GIVE_UP)]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
