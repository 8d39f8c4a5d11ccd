# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be done to the world: one method for each deed of the plan."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import time
from collections.abc import Callable
from functools import partial

import audit
from crowd import PATIENCE, Crowd, Member
from place import BUDGET_PAGES, PAGE, QUOTA_PAGES, Breach, Place, until
from plan import COMMON, FILE_PAGES, SMALL_PAGES, VMS, Deed, Plan, movable, torrent, user_pages

from privfs.notifier.lane import SOCKET
from privfs.seals import ALL_PURPOSES, Purpose

_ENDS = {0, 1, 3, -signal.SIGKILL, -signal.SIGSEGV}  #: of a process whose owner has gone
#: Deeds that wait for system calls to end, which may wait for whoever is stopped.
_WAIT_FOR_OTHERS = {
    "leave", "finish", "storm_a_guest", "fill", "quota", "behind", "clock", "remount",
    "calm",
}  # fmt: skip
_CRASHED = {-signal.SIGKILL, -signal.SIGSEGV}


def _answered(member: Member, lines: int) -> bool:
    said = re.findall("^(sent|closed)$", member.text, re.MULTILINE)
    return len(said) >= lines or member.process.poll() is not None


class World:
    """A mount and its crowd."""

    def __init__(self, place: Place, plan: Plan, mutant: str) -> None:
        self.place = place
        self.plan = plan
        self.crowd = Crowd(place, mutant, plan.seed)
        self._allowed = audit.Allowed()
        self._stopped: list[Member] = []

    def begin(self) -> None:
        """Mount, make the files that stay, boot the VMs."""
        self.place.start()
        for name in (*VMS, COMMON):
            self.place.create(name, FILE_PAGES)
        self.crowd.boot(VMS, self.plan.seed)
        for i in range(self.plan.torrents):
            self.place.create(torrent(i), SMALL_PAGES)
            self.enter(f"steady{i}", torrent(i), self.plan.mode, i, self.plan.seed + i)
        self._pour()
        self._allowed = audit.Allowed()

    def _pour(self) -> None:
        """Punch and allocate in the files of torrents until told to stop."""
        for i in range(self.plan.torrents):
            pages = map(str, (*user_pages(torrent(i)), 1 << 62, self.plan.seed + i))
            self.crowd.call(torrent(i), torrent(i), *pages, "punch", "punch", "allocate", "zero")

    def perform(self, deed: Deed) -> None:
        """Do a deed, then look at what must always hold."""
        if deed.name in _WAIT_FOR_OTHERS:
            self._wake()
        getattr(self, deed.name)(*deed.arguments)
        self.crowd.check()
        audit.at_any_time(self.place)
        self.place.count()

    def close(self) -> None:
        """Leave nothing; whoever waits for the mount can only go when it has gone."""
        try:
            self.place.clear()
        finally:
            self.crowd.close()

    # --- users --------------------------------------------------------------------------------

    def enter(self, name: str, file: str, mode: str, slot: int, seed: int) -> None:
        first, end = user_pages(file)
        self.crowd.enter(name, file, mode, slot, f"work {seed} {first} {end}")

    def leave(self, name: str) -> None:
        member = self.crowd.users[name]
        audit.user(member)
        member.tell("leave", "^left 0$")
        if code := member.end():
            raise Breach(f"{name} ended with {code}: {member.tail()}")
        del self.crowd.users[name]
        member.close()

    def kill(self, name: str) -> None:
        self.crowd.kill(self.crowd.users.pop(name), "at work")

    def drop(self, name: str) -> None:
        self.crowd.users[name].tell("drop", "^dropped$")
        self._doom(name)

    def orphan(self, name: str) -> None:
        """Kill a user whose child keeps its socket open."""
        member = self.crowd.users.pop(name)
        self.crowd.orphans.append(int(member.tell("fork", r"^child (\d+)$")[1]))
        self.crowd.kill(member, "leaving a child")

    def hang(self, name: str, file: str, mode: str, slot: int, seed: int, selfcall: int) -> None:
        self.enter(name, file, mode, slot, seed)
        if selfcall:
            self.selfcall(name, *user_pages(file))
        self._doom(name)

    def _doom(self, name: str) -> None:
        self.crowd.doom(name)
        self._allowed.kills += 1

    def stop(self, name: str) -> None:
        self._stopped.append(self._member(name))
        self._stopped[-1].signal(signal.SIGSTOP)

    def cont(self, name: str) -> None:
        self._member(name).signal(signal.SIGCONT)

    def _wake(self) -> None:
        for member in self._stopped:
            if member.process.poll() is None:
                member.signal(signal.SIGCONT)
        self._stopped.clear()

    def _member(self, name: str) -> Member:
        return self.crowd.vms[name] if name in VMS else self.crowd.users[name]

    def selfcall(self, name: str, start: int, end: int) -> None:
        """Should it die of that, the ladder may have to lend a hand, and to end its call by EIO."""
        self._allowed.kills += 1
        self._allowed.failures += 1
        self.crowd.users[name].tell(f"call {start} {end}", "^calling$")
        self.crowd.calls += 1

    def behind(self, name: str, seed: int) -> None:
        """Kill a user whose call waits for the lock of a caller that waits for the user."""
        member, file = self.crowd.users[name], self.crowd.files[name]
        first, end = user_pages(file)
        self.crowd.call("ahead", file, *map(str, (first, end, 50, seed)), "punch", "allocate")
        self.selfcall(name, first, end)
        until(lambda: "D" in member.states() or "\ncalled" in member.text, "its call", PATIENCE)
        self.kill(name)
        self.crowd.finished("ahead")

    def ask(self, name: str, what: str, start: int, end: int) -> None:
        """Without waiting: what is asked for may wait for a user that hangs."""
        self.crowd.users[name].send(f"{what} {start} {end}")
        self.crowd.calls += 1

    def starve(self, name: str) -> None:
        self.crowd.users[name].tell("starve", "^starving$")

    # --- callers ------------------------------------------------------------------------------

    def caller(
        self, name: str, file: str, first: int, end: int, count: int, seed: int, *kinds: str
    ) -> None:
        self.crowd.call(name, file, *map(str, (first, end, count, seed)), *kinds)

    def compact(self, name: str, file: str, count: int) -> None:
        """Move what a file holds, under its users."""
        first, end = "0", str(FILE_PAGES)
        self.crowd.call(name, file, first, end, str(count), "0", "compact")

    def finish(self, name: str) -> None:
        self.crowd.finished(name)

    def cut_down(self, name: str) -> None:
        member = self.crowd.callers.pop(name)
        self.crowd.judge(member)
        self.crowd.kill(member, "in a system call")

    def _at_once(self, file: str, first: int, end: int, *kinds: str) -> None:
        """Make calls and wait for them."""
        self.crowd.call("now", file, str(first), str(end), "0", "0", *kinds)
        self.crowd.finished("now")

    # --- guests and files ---------------------------------------------------------------------

    def storm_a_guest(self, vm: str, callers: int, killed: int, seed: int) -> None:
        """Several callers at the pages that a guest stamps, some killed; the last one clears."""
        member = self.crowd.vms[vm]
        member.tell("pause", "^paused$")
        member.tell("begin", "^begun$")
        first, end = self._stamped(member)
        names = [f"{vm}.{i}" for i in range(callers)]
        for i, name in enumerate(names):
            self.crowd.call(name, vm, str(first), str(end), "40", str(seed + i), "punch", "punch")
        for name in names[:killed]:
            self.cut_down(name)
        for name in names[killed:]:
            self.finish(name)
        self._at_once(vm, first, end, "clear")
        member.tell("end", "^ended$")
        member.send("go")

    def _stamped(self, member: Member) -> tuple[int, int]:
        found = re.search(r"^ready (\d+) (\d+)$", member.text, re.MULTILINE)
        assert found is not None
        return int(found[1]), int(found[2])

    def fill(self, vm: str, start: int, pages: int) -> None:
        self.crowd.vms[vm].tell(f"fill {start} {pages}", "^filled$")

    def create(self, name: str) -> None:
        self.place.create(name, SMALL_PAGES)

    def unlink(self, name: str) -> None:
        os.unlink(self.place.path / name)

    def reboot(self, vm: str) -> None:
        self.crowd.kill(self.crowd.vms.pop(vm), "like a power cut")
        self.crowd.boot((vm,), self.plan.seed)

    # --- the mount ----------------------------------------------------------------------------

    def noise(self, seed: int) -> None:
        """What no user would say; the session ends, and nothing else."""
        dice = random.Random(seed)
        says: list[Callable[[], str]] = [
            lambda: f"noise {dice.randrange(1, 2000)} {seed}",
            lambda: f"noise {40 * dice.randrange(1, 20)} {seed}",
            lambda: f"fds {dice.randrange(1, 8)}",
            lambda: "large",
            lambda: f"record ACK 0 0 0 0 0 0 {dice.randrange(1, 99)}",
            lambda: "record UNREGISTER 0 0 1 7",
            lambda: (
                f"odd {dice.choice(('socket', 'pipe', 'memfd', 'epoll', 'self', 'path'))} "
                f"{self.place.path / COMMON}"
            ),
            lambda: f"register {self.place.path}",
        ]
        self._raw(["hello"] * dice.randrange(2) + [dice.choice(says)() for _ in range(3)])

    def flood(self, file: str, count: int) -> None:
        """More questions than answers are read."""
        path = self.place.path / file
        first, end = user_pages(file)
        get = f"GET 0 0 1 {path.stat().st_ino} {first} {end} {first}"
        # as the file's other users: the first one's purpose counts
        purpose = ALL_PURPOSES & ~Purpose.UNMOVABLE if movable(file) else ALL_PURPOSES
        register = f"register {path} O_RDWR {int(purpose)}"
        self._raw(["hello", register, f"flood {count} {get}"])

    def _raw(self, lines: list[str]) -> None:
        member = Member("raw", "raw_user", self.place.path / SOCKET)
        try:
            member.hear("^ready$")
            for sent, line in enumerate(lines, 1):
                member.send(line)  # some of it cannot even be sent, and ends the program
                until(partial(_answered, member, sent), f"{line!r} sent", PATIENCE)
        except BrokenPipeError:
            pass
        finally:
            member.close()

    def exhaust(self) -> None:
        """Take most of the budget; what is more than all of it changes nothing."""
        names = [f"ballast{i}" for i in range(5)]
        pages = QUOTA_PAGES - 1024
        try:
            for name in names:
                self.place.create(name, 2 * QUOTA_PAGES)
            codes = [self.place.allocate(name, pages) for name in names[:4]]
            last = self.place.allocate(names[4], BUDGET_PAGES - 4 * pages)
            held = self.place.ask("stat", ino=(self.place.path / names[4]).stat().st_ino)
            if codes != [0] * 4 or last != errno.ENOSPC or held["allocated"] or held["held"]:
                raise Breach(f"budget: {codes}, then {last} and {held['allocated']} bytes kept")
        finally:
            for name in names:
                if (self.place.path / name).exists():
                    os.unlink(self.place.path / name)

    def quota(self, name: str) -> None:
        """A user of a file that is full is refused, and may stay."""
        path = self.place.create(name, 2 * QUOTA_PAGES)
        if code := self.place.allocate(name, QUOTA_PAGES):
            raise Breach(f"quota: allocation failed: {os.strerror(code)}")
        self.enter(name, name, "good", 1, 1)
        member = self.crowd.users[name]
        member.tell("rest", "^resting$")
        refused = f"^error {QUOTA_PAGES + 5} {errno.ENOMEM}$"
        member.tell(f"touch {QUOTA_PAGES + 5}", refused)
        member.tell("touch 5", r"^value 5 \d+$")
        self.leave(name)
        os.unlink(path)

    def freeze(self, milliseconds: int) -> None:
        """Stand still; nobody may die of what the mount itself did not do."""
        self.place.freeze(milliseconds / 1000)

    def clock(self, name: str, file: str, slot: int, seed: int, seconds: int) -> None:
        """Move the time of day while a caller waits for a user that hangs."""
        self.hang(name, file, "hung", slot, seed, 0)
        caller = self.crowd.call("timed", file, *map(str, (*user_pages(file), 0, 0)), "clear")
        ino = (self.place.path / file).stat().st_ino
        until(
            lambda: bool(self.place.ask("stat", ino=ino)["operations"])
            or caller.process.poll() is not None,
            "an operation", PATIENCE,
        )  # fmt: skip
        self.place.move_clock(seconds)
        self.crowd.finished("timed")

    def squeeze(self, name: str, spare: int, seed: int) -> None:
        """Leave the mount no descriptors: who comes waits, what is new is refused, all goes on."""
        path = self.place.path / name
        path.touch()
        os.truncate(path, SMALL_PAGES * PAGE)
        guests = []
        try:
            with self.place.no_descriptors(spare):
                code = self.place.allocate(name, SMALL_PAGES)
                if code not in (0, errno.ENOSPC):
                    raise Breach(f"without descriptors: {os.strerror(code)}")
                guests = [Member("raw", "raw_user", self.place.path / SOCKET) for _ in range(3)]
                for guest in guests:
                    guest.hear("^ready$")
                    guest.send("hello")
                time.sleep(0.2)
            if self.place.allocate(name, SMALL_PAGES):
                raise Breach("descriptors are back, memory is not")
            for guest in guests:
                until(partial(_answered, guest, 1), "an answer to who had to wait", PATIENCE)
        finally:
            for guest in guests:
                guest.close()
            os.unlink(path)

    def wait(self, milliseconds: int) -> None:
        time.sleep(milliseconds / 1000)

    def remount(self, how: str, seed: int) -> None:
        """Take the mount away with callers waiting; everyone must notice, and nobody hang."""
        crowd = self.crowd
        first, end = user_pages(COMMON)
        crowd.call("late", COMMON, str(first), str(end), "100000", str(seed), "punch", "allocate")
        crowd.callers["late"].hear("^did 20$")
        if how == "kill":
            self.place.kill()
        else:
            self.place.end()
        for member in (*crowd.users.values(), *crowd.vms.values()):
            code = member.end()
            if code not in _ENDS:
                raise Breach(f"{member.name} met the end of the mount with {code}")
        for member in (*crowd.callers.values(), *crowd.doomed.values()):
            crowd.kill(member, "after the end of the mount")
        crowd.close()
        self.begin()

    def calm(self) -> None:
        """Let everything come to an end that should, and hold the accounts against each other."""
        crowd = self.crowd
        for i in range(self.plan.torrents):
            crowd.callers[torrent(i)].signal(signal.SIGTERM)
        for name in list(crowd.callers):
            crowd.finished(name)
        for member in crowd.vms.values():
            member.tell("pause", "^paused$")
        for member in crowd.users.values():
            member.tell("feed", "^fed$")
            member.tell("rest", "^resting$")
        self._see_them_die()
        crowd.reap_orphans()
        audit.in_peace(self.place, crowd, self._allowed)
        for name, member in crowd.users.items():
            member.tell(crowd.work[name], "^working$")
        for member in crowd.vms.values():
            member.send("go")
        self._pour()

    def _see_them_die(self) -> None:
        """An invalidation ends those who do not answer; those it cannot reach end by our hand."""
        crowd = self.crowd
        for name, member in list(crowd.doomed.items()):
            file = crowd.files[name]
            if (self.place.path / file).exists():
                self._reach(member, file)
            else:
                crowd.kill(member, "with its file gone")
            member.close()
            del crowd.doomed[name]

    def _reach(self, member: Member, file: str) -> None:
        first, end = user_pages(file)
        if (self.place.path / file).stat().st_size < end * PAGE:
            os.truncate(self.place.path / file, end * PAGE)

        def ended() -> bool:
            """Take its pages away, again if it had none mapped yet."""
            if member.process.poll() is None:
                self._at_once(file, first, end, "fill", "clear")
                audit.at_any_time(self.place)
            return member.process.poll() is not None

        until(ended, f"end of {member.name}: {member.tail()}", PATIENCE)
        code = member.end()
        if code not in _CRASHED:
            raise Breach(f"{member.name} ended with {code}, not by the ladder: {member.tail()}")
