# SPDX-License-Identifier: GPL-2.0-or-later
"""Disorder on purpose: random deeds to a mount and its users, and accounts that must add up."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from crowd import KERNEL, TWIN
from deeds import World
from mutants import MUTANTS
from place import Breach, Place
from plan import STEADY_SLOTS, Deed, Plan

OK, FOUND, USAGE, CANNOT, INTERRUPTED = 0, 1, 2, 3, 130
_HISTORY = 40
_STUCK = 150.0  #: seconds; longer than anything inside waits


class Interrupted(BaseException):
    """A signal asks us to end."""


class Journal:
    """What happened, and a line a second of it; ends a run that hangs in a system call."""

    def __init__(self, seed: int, seconds: float, quiet: bool) -> None:
        self.seed = seed
        self.step = 0
        self.history: deque[str] = deque(maxlen=_HISTORY)
        self.began = self.moved = time.monotonic()
        self.deadline = self.began + seconds
        self.world: World | None = None
        self.hung = False
        self._quiet = quiet
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="journal")
        self._thread.start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def punches(self) -> int:
        return self.world.place.punches if self.world is not None else 0

    @property
    def moves(self) -> int:
        return self.world.place.moves if self.world is not None else 0

    def note(self, deed: Deed) -> None:
        """A deed begins."""
        self.step += 1
        self.moved = time.monotonic()
        self.history.append(f"{self.seconds:7.2f}s  {self.step:4}  {deed}")

    def line(self) -> str:
        parts = [
            f"{self.seconds:5.0f}s",
            f"seed {self.seed}",
            f"step {self.step}",
            f"{self.punches} punches",
        ]
        if self.world is not None:
            crowd = self.world.crowd
            parts += [
                f"{len(crowd.vms)} VMs", f"{len(crowd.users)} users",
                f"{len(crowd.callers)} callers", f"{len(crowd.doomed)} doomed",
            ]  # fmt: skip
        if self.history:
            parts.append(self.history[-1].split(maxsplit=2)[2])
        return "  ".join(parts)

    def _tick(self) -> None:
        while not self._done.wait(1):
            if not self._quiet:
                print(self.line(), flush=True)
            if time.monotonic() - self.moved > _STUCK and self.world is not None:
                self.hung = True
                self.world.place.clear()  # lets whoever waits for it go
                self.moved = time.monotonic()

    def close(self) -> None:
        self._done.set()
        self._thread.join()


def torrents(text: str) -> int:
    count = int(text)
    if not 0 <= count <= STEADY_SLOTS:
        raise argparse.ArgumentTypeError(f"{count}: 0 to {STEADY_SLOTS}")
    return count


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description="Disturb a mount of its own, its users and their guests at random: punch, "
        "freeze, kill, fill up. After every deed all accounts must add up. Needs root.",
        epilog=f"Exit status: {OK} nothing found; {FOUND} a rule was broken; {USAGE} usage; "
        f"{CANNOT} cannot run here; {INTERRUPTED} interrupted. docs/chaos.md says more.",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N",
                        help="what decides the deeds (a random one, which is said)")  # fmt: skip
    parser.add_argument("--seconds", type=float, metavar="S", default=60,
                        help="end after so long (60)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=0, metavar="N",
                        help="end after so many deeds, if they take less")  # fmt: skip
    parser.add_argument("--punches", type=int, default=0, metavar="N",
                        help="the same for punches that users acknowledged")  # fmt: skip
    parser.add_argument("--torrents", type=torrents, default=0, metavar="N",
                        help=f"files punched without end, up to {STEADY_SLOTS} (0)")  # fmt: skip
    parser.add_argument("--mutant", choices=MUTANTS, default="none", metavar="NAME",
                        help="switch one rule of privfs off: it must be found")  # fmt: skip
    parser.add_argument("--mutants", action="store_true", help="list the rules by name, do nothing")
    parser.add_argument("--plan", type=int, metavar="N", help="print the first N deeds, do nothing")
    parser.add_argument("--quiet", action="store_true", help="no line every second")
    return parser.parse_args()


def why_not() -> str:
    """Return why this cannot run here, empty if it can."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    if os.geteuid() != 0:
        return "needs root: what is killed and mounted here belongs to it"
    missing = [str(path) for path in (KERNEL, TWIN) if not path.exists()]
    return f"not built: {', '.join(missing)}; use scripts/chaos" if missing else ""


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="privfs-chaos."))
    try:
        yield path
    finally:
        if not os.path.ismount(path / "mount"):
            shutil.rmtree(path, ignore_errors=True)


def run(plan: Plan, journal: Journal, given: argparse.Namespace) -> None:
    """Do deeds until the time is up, a calm one last."""
    steps, punches = given.steps or math.inf, given.punches or math.inf
    with folder() as path:
        world = journal.world = World(Place(path, given.mutant), plan, given.mutant)
        try:
            journal.note(Deed("begin"))
            world.begin()
            while (
                time.monotonic() < journal.deadline
                and journal.step < steps
                and journal.punches < punches
            ):
                deed = plan.next()
                journal.note(deed)
                world.perform(deed)
            for deed in (Deed("calm"), Deed("end")):
                journal.note(deed)
                if deed.name == "calm":
                    world.perform(deed)
                else:
                    world.place.end()
        except Breach:
            journal.history.append(f"log of the mount: {world.place.log()[-1500:]}")
            raise
        finally:
            journal.moved = time.monotonic()
            world.close()


def main() -> int:
    """Run and report."""
    given = arguments()
    if given.mutants:
        print("\n".join(f"{name:14} {mutant.what}" for name, mutant in MUTANTS.items()))
        return OK
    seed = random.SystemRandom().randrange(1 << 31) if given.seed is None else given.seed
    plan = Plan(seed, MUTANTS[given.mutant].mode, given.torrents)
    if given.plan is not None:
        print("\n".join(f"{i + 2:4}  {plan.next()}" for i in range(given.plan)))
        return OK
    if reason := why_not():
        print(f"chaos: {reason}", file=sys.stderr)
        return CANNOT
    again = f"scripts/chaos --seed {seed} --seconds {given.seconds:g}"
    again += f" --mutant {given.mutant}" if given.mutant != "none" else ""
    again += f" --steps {given.steps}" if given.steps else ""
    again += f" --punches {given.punches}" if given.punches else ""
    again += f" --torrents {given.torrents}" if given.torrents else ""
    print(f"chaos: to play this again: {again}", flush=True)

    def interrupted(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Interrupted

    faulthandler.register(signal.SIGUSR1)  # where does it wait?
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    journal = Journal(seed, given.seconds, given.quiet)
    try:
        run(plan, journal, given)
    except Interrupted:
        print(f"chaos: interrupted at step {journal.step}; nothing found", flush=True)
        return INTERRUPTED
    except Exception as error:
        what = "nothing moved" if journal.hung else str(error)
        print("\n".join(["chaos: the last deeds:", *journal.history]))
        if not isinstance(error, Breach):
            traceback.print_exc(file=sys.stdout)
        print(f"chaos: FOUND at step {journal.step}, seed {seed}: {type(error).__name__}: {what}")
        print(f"chaos: to play it again: {again}", flush=True)
        return FOUND
    finally:
        journal.close()
    print(
        f"chaos: {journal.step} steps in {journal.seconds:.0f} s, {journal.punches} punches, "
        f"{journal.moves} moves, nothing found", flush=True,
    )  # fmt: skip
    return OK


if __name__ == "__main__":
    sys.exit(main())
