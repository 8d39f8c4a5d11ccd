# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens next: from a seed, the same deeds in the same order, whatever the processes do.

A plan keeps its own idea of who is there.  It never looks at the world, so that a run can be
played again; what it does not decide is when the processes get to run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

VMS: Final = ("vm0", "vm1")
COMMON: Final = "common"  #: a file of both VMs and of users
FIXED: Final = "fixed"  #: how files begin whose users ask that nothing moves
FILE_PAGES: Final = 4096
SMALL_PAGES: Final = 1024  #: of a file that comes and goes
#: Where users in C work; the guests have other pages of the same files.
USER_PAGES: Final = {COMMON: (256, 320), "vm0": (3072, 3136), "vm1": (3072, 3136)}
SMALL_USER_PAGES: Final = (0, 64)
#: Pages of COMMON that both guests write.
GUEST_PAGES: Final = (0, 64)
PAGE_WORDS: Final = 512
STEADY_SLOTS: Final = 64
"""Words of a page that belong to the users of torrents, whom no deed ends."""
MAX_USERS: Final = 6
MAX_CALLERS: Final = 3
MAX_SMALL: Final = 3
LONGEST_STOP: Final = 3  #: deeds
CALM_EVERY: Final = 25  #: deeds

Argument = str | int


def torrent(number: int) -> str:
    """Return the name of a file that is punched without end."""
    return f"torrent{number}"


@dataclass(frozen=True, slots=True)
class Deed:
    """One thing that is done to the world; ``name`` is a method of it."""

    name: str
    arguments: tuple[Argument, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.name, *map(str, self.arguments)])


def movable(file: str) -> bool:
    """Return whether the users of a file leave its memory to be moved; VMs leave theirs."""
    return not file.startswith(FIXED)


def user_pages(file: str) -> tuple[int, int]:
    """Return where users in C work in a file."""
    return USER_PAGES.get(file, SMALL_USER_PAGES)


@dataclass(slots=True)
class Plan:
    """Deeds without end.  ``mode`` is that of users that behave (another under a mutant).

    ``torrents`` are files with a user and a caller of their own, whom no deed ends.
    """

    seed: int
    mode: str = "good"
    torrents: int = 0
    users: dict[str, str] = field(default_factory=dict)  #: name → file
    small: list[str] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)
    stopped: dict[str, int] = field(default_factory=dict)  #: name → deeds left
    starved: list[str] = field(default_factory=list)
    dice: random.Random = field(init=False)
    _made: int = 0
    _since_calm: int = 0

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    def next(self) -> Deed:
        """Return the next deed."""
        for name in list(self.stopped):
            self.stopped[name] -= 1
            if self.stopped[name] <= 0:
                del self.stopped[name]
                return Deed("cont", (name,))
        self._since_calm += 1
        if self._since_calm >= CALM_EVERY:
            return self._calm()
        possible = [(weight, make) for weight, make, may in self._choices() if may]
        weights = [weight for weight, _ in possible]
        return self.dice.choices([make for _, make in possible], weights)[0]()

    def _choices(self) -> list[tuple[float, Callable[[], Deed], bool]]:
        awake = self._awake()
        return [
            (10, self._enter, len(self.users) < MAX_USERS),
            (3, self._leave, bool(awake)),
            (4, self._kill, bool(self.users)),
            (3, self._drop, bool(awake)),
            (2, self._orphan, bool(awake)),
            (4, self._hang, True),
            (3, self._stop, len(self.stopped) < 2),
            (3, self._selfcall, bool(awake)),
            (5, self._ask, bool(awake)),
            (2, self._behind, bool(awake)),
            (2, self._starve, bool(awake)),
            (12, self._caller, len(self.callers) < MAX_CALLERS),
            (4, self._finish, bool(self.callers)),
            (4, self._cut_down, bool(self.callers)),
            (6, self._compact, len(self.callers) < MAX_CALLERS),
            (6, self._storm_a_guest, True),
            (3, self._fill, True),
            (3, self._create, len(self.small) < MAX_SMALL),
            (2, self._unlink, bool(self.small)),
            (2, self._noise, True),
            (2, self._flood, True),
            (1, self._exhaust, True),
            (1, self._quota, True),
            (1, self._reboot, True),
            (1.5, self._freeze, True),
            (3, self._clock, True),
            (1.5, self._squeeze, True),
            (0.7, self._remount, True),
            (3, self._wait, True),
        ]

    # --- users --------------------------------------------------------------------------------

    def _awake(self) -> list[str]:
        return [n for n in self.users if n not in self.stopped and n not in self.starved]

    def _name(self, kind: str) -> str:
        self._made += 1
        return f"{kind}{self._made}"

    def _slot(self) -> int:
        """Return the word of a page that a new user writes, and nobody beside it."""
        return STEADY_SLOTS + self._made % (PAGE_WORDS - STEADY_SLOTS)

    def _file(self) -> str:
        return self.dice.choice([COMMON, *self._named()])

    def _named(self) -> list[str]:
        """Return the files that have a name."""
        return [COMMON, *self.small, *VMS, *map(torrent, range(self.torrents))]

    def _pick(self) -> str:
        return self.dice.choice(self._awake())

    def _seed(self) -> int:
        return self.dice.randrange(1 << 30)

    def _pages(self, file: str) -> tuple[int, int]:
        first, end = user_pages(file)
        start = self.dice.randrange(first, end)
        return start, min(end, start + self.dice.choice((1, 1, 2, 8, 32)))

    def _enter(self) -> Deed:
        name, file = self._name("u"), self._file()
        self.users[name] = file
        slow = f"slow={self.dice.choice((5, 20, 100))}"
        mode = self.dice.choice((self.mode, self.mode, self.mode, slow))
        return Deed("enter", (name, file, mode, self._slot(), self._seed()))

    def _gone(self) -> str:
        name = self._pick()
        del self.users[name]
        return name

    def _leave(self) -> Deed:
        return Deed("leave", (self._gone(),))

    def _kill(self) -> Deed:
        name = self.dice.choice(list(self.users))
        del self.users[name]
        self.stopped.pop(name, None)
        if name in self.starved:
            self.starved.remove(name)
        return Deed("kill", (name,))

    def _drop(self) -> Deed:
        return Deed("drop", (self._gone(),))

    def _orphan(self) -> Deed:
        return Deed("orphan", (self._gone(),))

    def _hang(self) -> Deed:
        mode = self.dice.choice(("hung", "hung", "close", "close", "crash"))
        selfcall = int(mode == "hung" and self.dice.random() < 0.4)
        name, file = self._name("h"), self._file()
        return Deed("hang", (name, file, mode, self._slot(), self._seed(), selfcall))

    def _stop(self) -> Deed:
        running = [name for name in (*self.users, *VMS) if name not in self.stopped]
        name = self.dice.choice(running)
        self.stopped[name] = self.dice.randint(1, LONGEST_STOP)
        return Deed("stop", (name,))

    def _selfcall(self) -> Deed:
        name = self._pick()
        return Deed("selfcall", (name, *self._pages(self.users[name])))

    def _behind(self) -> Deed:
        """Choose someone whose file still has a name."""
        named = [n for n in self._awake() if self.users[n] in self._named()]
        if not named:
            return self._wait()
        name = self.dice.choice(named)
        del self.users[name]
        return Deed("behind", (name, self._seed()))

    def _ask(self) -> Deed:
        name = self._pick()
        what = self.dice.choice(("punch", "punch", "alloc"))
        return Deed("ask", (name, what, *self._pages(self.users[name])))

    def _starve(self) -> Deed:
        name = self._pick()
        self.starved.append(name)
        return Deed("starve", (name,))

    # --- callers ------------------------------------------------------------------------------

    def _caller(self) -> Deed:
        name, file = self._name("c"), self._file()
        self.callers.append(name)
        kinds = ["punch", "punch", "allocate", "zero"]
        first, end = user_pages(file)
        if file == COMMON and self.dice.random() < 0.3:
            first, end = GUEST_PAGES
        if file in self.small and self.dice.random() < 0.5:
            kinds.append("resize")
        count = self.dice.choice((20, 100, 300))
        return Deed("caller", (name, file, first, end, count, self._seed(), *kinds))

    def _compact(self) -> Deed:
        """Choose a file whose memory is to move, and how often."""
        name, file = self._name("p"), self._file()
        self.callers.append(name)
        return Deed("compact", (name, file, self.dice.choice((1, 5, 20))))

    def _a_caller(self) -> str:
        name = self.dice.choice(self.callers)
        self.callers.remove(name)
        return name

    def _finish(self) -> Deed:
        return Deed("finish", (self._a_caller(),))

    def _cut_down(self) -> Deed:
        return Deed("cut_down", (self._a_caller(),))

    # --- guests and files ---------------------------------------------------------------------

    def _a_vm(self) -> str:
        """Choose a VM; a stopped one goes on with the next deed anyway."""
        awake = [name for name in VMS if name not in self.stopped]
        return self.dice.choice(awake or VMS)

    def _storm_a_guest(self) -> Deed:
        vm = self._a_vm()
        if vm in self.stopped:
            return self._wait()
        killed = self.dice.randint(0, 2)
        return Deed("storm_a_guest", (vm, self.dice.randint(1, 3), killed, self._seed()))

    def _fill(self) -> Deed:
        vm = self._a_vm()
        if vm in self.stopped:
            return self._wait()
        start = self.dice.randrange(GUEST_PAGES[0], GUEST_PAGES[1] - 16)
        return Deed("fill", (vm, start, self.dice.randint(1, 16)))

    def _create(self) -> Deed:
        name = self._name(self.dice.choice(("t", FIXED)))
        self.small.append(name)
        return Deed("create", (name,))

    def _unlink(self) -> Deed:
        name = self.dice.choice(self.small)
        self.small.remove(name)
        return Deed("unlink", (name,))

    def _reboot(self) -> Deed:
        vm = self.dice.choice(VMS)
        self.stopped.pop(vm, None)
        return Deed("reboot", (vm,))

    # --- the mount ----------------------------------------------------------------------------

    def _noise(self) -> Deed:
        return Deed("noise", (self._seed(),))

    def _flood(self) -> Deed:
        return Deed("flood", (self._file(), self.dice.choice((1000, 20_000, 100_000))))

    def _exhaust(self) -> Deed:
        return Deed("exhaust")

    def _quota(self) -> Deed:
        return Deed("quota", (self._name("q"),))

    def _wait(self) -> Deed:
        return Deed("wait", (self.dice.randint(20, 300),))

    def _freeze(self) -> Deed:
        return Deed("freeze", (self.dice.choice((50, 300, 1000, 2500)),))

    def _clock(self) -> Deed:
        seconds = self.dice.choice((1, 3600, 86_400, 10 * 365 * 86_400))
        seconds *= self.dice.choice((-1, 1))
        return Deed("clock", (self._name("h"), COMMON, self._slot(), self._seed(), seconds))

    def _squeeze(self) -> Deed:
        return Deed("squeeze", (self._name("z"), self.dice.randrange(4), self._seed()))

    def _remount(self) -> Deed:
        how = self.dice.choice(("kill", "kill", "end"))
        for things in (self.users, self.small, self.callers, self.stopped, self.starved):
            things.clear()
        return Deed("remount", (how, self._seed()))

    def _calm(self) -> Deed:
        self._since_calm = 0
        for things in (self.callers, self.stopped, self.starved):
            things.clear()
        return Deed("calm")
