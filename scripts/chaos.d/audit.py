# SPDX-License-Identifier: GPL-2.0-or-later
"""What must hold, at any time and in peace; every failure is a Breach that says what differs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crowd import PATIENCE, Crowd, Member
from place import PAGE, Breach, Place, until

from privfs.notifier.wire import Fence

#: Threads that the mount keeps for a while after they had something to do.
_IDLE_THREADS = 16
_SETTLE = 30.0
_EXPECTED_LOG = re.compile(
    r"killing \S+: no acknowledgement|dead mount|was killed|cleared|stale|in use by"
    r"|cannot accept a user: .*Too many open|accept returned EMFILE|raise the limit on open files"
    r"|an extent cannot be handed out: Too many open files"
)


def at_any_time(place: Place) -> None:
    """Memory and bitmaps agree, no freed memory was touched, and nobody was given up."""
    findings = place.ask("audit")["findings"]
    if findings:
        raise Breach(f"audit: {findings[:3]}")
    for line in place.log().splitlines():
        if not _EXPECTED_LOG.search(line):
            raise Breach(f"the mount said: {line}")


def user(member: Member) -> dict[str, int]:
    """What a user in C read was what it may read."""
    words = member.tell("stats", "^stats (.*)$")[1].split()
    counts = {name: int(count) for name, count in zip(words[::2], words[1::2], strict=True)}
    if counts["stale"] or counts["lost"]:
        raise Breach(f"{member.name}: {counts}")
    for word, code in re.findall(r"^(called|reply) (\d+)$", member.text, re.MULTILINE):
        # No such file: it was unlinked before the call; else beyond an end that moves, no budget.
        if int(code) not in (0, 2, 22, 28):
            raise Breach(f"{member.name}: {word} {code}")
    return counts


def guest(member: Member) -> int:
    """What a guest read was what it may read; returns its own punches."""
    punches, reads, _, bad = map(
        int, member.tell("stats", r"^stats (\d+) (\d+) (\d+) (\d+)$").groups()
    )
    if bad:
        raise Breach(f"{member.name}: {bad} bad reads of {reads}: {member.tail()}")
    if re.search(r"^errno ", member.text, re.MULTILINE):
        raise Breach(f"{member.name}: a punch of its own failed: {member.tail()}")
    return punches


@dataclass(slots=True)
class Allowed:
    """How many users the ladder may have killed since the mount began, and whose calls it ended."""

    kills: int = 0
    failures: int = 0


def in_peace(place: Place, crowd: Crowd, allowed: Allowed) -> None:
    """Nobody works and nobody is missing: every account must add up."""
    for member in crowd.users.values():
        user(member)
    crowd.punches = sum(guest(member) for member in crowd.vms.values())

    last: dict[str, Any] = {}

    def settled(name: str, difference: Callable[[], str]) -> None:
        def agrees() -> bool:
            last[name] = difference()
            return not last[name]

        try:
            until(agrees, name, _SETTLE)
        except Breach:
            raise Breach(f"{name}: {last[name]}") from None

    settled("operations", lambda: _operations(place))
    settled("sessions", lambda: _sessions(place, crowd))
    settled("budget", lambda: _budget(place))
    settled("descriptors and threads", lambda: _counts(place))
    settled("sleepers", lambda: _sleepers(crowd))
    for member in crowd.users.values():
        _table(place, member)
    status = place.ask("status")
    if status["kills"] > allowed.kills or status["failures"] > allowed.failures:
        raise Breach(
            f"{status['kills']} users killed, {status['failures']} calls failed with EIO; {allowed}"
        )


def _operations(place: Place) -> str:
    found = place.ask("audit")
    return str(found) if found["findings"] or found["skipped"] else ""


def _sessions(place: Place, crowd: Crowd) -> str:
    rows = place.ask("status")["sessions"]
    found = sorted(row["pid"] for row in rows if row["state"] == "open")
    expected = sorted(m.pid for m in (*crowd.users.values(), *crowd.vms.values()))
    behind = [row for row in rows if row["unacknowledged"] or row["state"] != "open"]
    return "" if found == expected and not behind else f"{found}, not {expected}; {behind}"


def _table(place: Place, member: Member) -> None:
    """See that a user maps nothing but what the owner knows that it was granted."""
    mapped = [int(word) for word in member.tell("pages", "^pages(.*)$")[1].split()]
    ready = re.search(r"^ready (\d+) ", member.text, re.MULTILINE)
    assert ready is not None
    name = f"{member.name}({member.pid})"
    rows = place.ask("map", ino=int(ready[1]))["rows"] if mapped else []
    granted = {
        page
        for row in rows
        if name in row["users"]
        for page in range(row["start"] // PAGE, row["end"] // PAGE)
    }
    for start, end in zip(mapped[::2], mapped[1::2], strict=True):
        if lost := set(range(start, end)) - granted:
            raise Breach(f"{name} maps {sorted(lost)[:9]}, which it was not granted")


def _budget(place: Place) -> str:
    status = place.ask("status")
    memory = status["memory"]
    names = [path for path in place.path.iterdir() if path.is_file()]
    held = sum(place.ask("stat", ino=path.stat().st_ino)["held"] for path in names)
    unlinked = status["files"] - len(names)
    agrees = not memory["reserved"] and memory["used"] == memory["private"]
    if unlinked == 0:
        agrees = agrees and held == memory["private"]
    return "" if agrees else f"{memory}, {held} bytes held, {unlinked} unlinked files"


def _counts(place: Place) -> str:
    status = place.ask("status")
    fds, threads, children = place.counts()
    fences = sum(row["fence"] == Fence.UFFD.text for row in status["sessions"])
    askers = status["asking"] - 1  # without ourselves
    expected = place.fds + 2 * len(status["sessions"]) + fences + status["extents"] + askers
    good = fds == expected and children == place.children
    if good and threads <= place.threads + _IDLE_THREADS:
        return ""
    return (
        f"{fds} descriptors, not {expected} ({place.descriptors()}); {threads} threads, "
        f"{place.threads} at first; {children} children, not {place.children}"
    )


def _sleepers(crowd: Crowd) -> str:
    asleep = [m.name for m in crowd.everyone() if "D" in m.states()]
    return f"state D for {PATIENCE:.0f} s: {', '.join(asleep)}" if asleep else ""
