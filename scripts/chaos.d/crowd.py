# SPDX-License-Identifier: GPL-2.0-or-later
"""The processes around the mount: guests, users in C, callers; who is well, and who must die."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from actors import Actor
from place import Breach, Place, until
from plan import movable

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNEL = ROOT / "scripts" / "guests" / "build" / "kernel.elf"
TWIN = ROOT / "tests" / "twin" / "build" / "user"
#: No system call may take longer: some users hang one after the other, others are stopped.
PATIENCE = 35.0
_BOOT = 90.0
#: What callers may meet: pages beyond an end that moves, no budget.
_CALLER_ERRNOS = {errno.EINVAL, errno.ENOSPC}
#: And who moves memory: no room for a second copy, or the name is gone.
_MOVER_ERRNOS = {errno.ENOENT, errno.ENOSPC}


class Member(Actor):
    """An actor whose silence is a Breach."""

    def __init__(self, name: str, program: str | Path, *arguments: str | Path) -> None:
        super().__init__(program, *arguments)
        self.name = name
        self.heard = 0
        self.heard_at = time.monotonic()

    def tell(self, line: str, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Send a line and wait for its answer."""
        try:
            self.send(line)
            return self.expect(pattern, timeout)
        except (AssertionError, OSError) as error:
            raise Breach(f"{self.name} did not answer {line!r}: {error}: {self.tail()}") from error

    def hear(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Wait for a line."""
        try:
            return self.expect(pattern, timeout)
        except AssertionError as error:
            raise Breach(f"{self.name}: {error}: {self.tail()}") from error

    def tail(self) -> str:
        """Return the end of what it said."""
        return f"[{self.process.poll()}] {self.text[-600:]!r}"

    def silence(self) -> float:
        """Return the seconds since it was last heard."""
        if len(self.text) != self.heard:
            self.heard, self.heard_at = len(self.text), time.monotonic()
        return time.monotonic() - self.heard_at

    def end(self, timeout: float = PATIENCE) -> int:
        """Wait for its end."""
        until(
            lambda: self.process.poll() is not None, f"end of {self.name}: {self.tail()}", timeout
        )
        return self.wait()


@dataclass(slots=True)
class Crowd:
    """Everyone, by name.  ``doomed`` must be killed by the ladder or have crashed."""

    place: Place
    mutant: str
    seed: int
    users: dict[str, Member] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    work: dict[str, str] = field(default_factory=dict)
    vms: dict[str, Member] = field(default_factory=dict)
    callers: dict[str, Member] = field(default_factory=dict)
    doomed: dict[str, Member] = field(default_factory=dict)
    orphans: list[int] = field(default_factory=list)
    punches: int = 0
    calls: int = 0

    def everyone(self) -> list[Member]:
        """Return all that have not been closed."""
        groups = (self.users, self.vms, self.callers, self.doomed)
        return [member for group in groups for member in group.values()]

    # --- births -------------------------------------------------------------------------------

    def boot(self, names: tuple[str, ...], seed: int) -> None:
        """Boot VMs beside each other."""
        for name in names:
            own, common = self.place.path / name, self.place.path / "common"
            self.vms[name] = Member(
                name, str(HERE / "guest"), KERNEL, name, str(seed), self.mutant, own, common
            )
        for name in names:
            self.vms[name].hear(r"^ready (\d+) (\d+)$", _BOOT)

    def enter(self, name: str, file: str, mode: str, slot: int, work: str) -> Member:
        """Start a user in C and let it work."""
        if movable(file):
            mode = f"movable-{mode}"
        member = Member(name, TWIN, self.place.path / file, mode, name, str(slot))
        self.users[name], self.files[name], self.work[name] = member, file, work
        member.hear(r"^ready \d+ \d+ 1$")
        member.tell(work, "^working$")
        return member

    def call(self, name: str, file: str, *arguments: str) -> Member:
        """Start a caller."""
        member = Member(name, str(HERE / "caller"), self.place.path / file, *arguments)
        self.callers[name], self.files[name] = member, file
        member.hear("^ready$")
        return member

    # --- ends ---------------------------------------------------------------------------------

    def doom(self, name: str) -> None:
        """A user has stopped doing as it should."""
        self.doomed[name] = self.users.pop(name)

    def finished(self, name: str) -> None:
        """Wait until a caller has done everything, and look at what it met."""
        member = self.callers.pop(name)
        try:
            while member.process.poll() is None:
                if member.silence() > PATIENCE:
                    raise Breach(f"{name} waits in a system call: {self.stuck(member)}")
                time.sleep(0.01)
            member.end()
            self.judge(member)
        except BaseException:
            self.callers[name] = member
            raise
        member.close()

    def judge(self, member: Member) -> None:
        """Look at the errnos of a caller."""
        for code, kind in re.findall(r"^errno (\d+) (\w+)$", member.text, re.MULTILINE):
            allowed = _MOVER_ERRNOS if kind == "compact" else _CALLER_ERRNOS
            fixed = kind == "compact" and not movable(self.files[member.name])
            if int(code) not in allowed and not (fixed and int(code) == errno.EOPNOTSUPP):
                raise Breach(f"{member.name}: {kind} failed: {os.strerror(int(code))}")
        done = re.search(r"^done (\d+) \d+$", member.text, re.MULTILINE)
        self.calls += int(done[1]) if done else 0
        if member.process.poll() == 0 and not done:
            raise Breach(f"{member.name} ended early: {member.tail()}")
        if member.process.poll() not in (None, 0, -signal.SIGKILL):
            raise Breach(f"{member.name} failed: {member.tail()}")

    def kill(self, member: Member, why: str) -> None:
        """SIGKILL someone, who must be gone soon: a thread in state D would not go."""
        member.signal(signal.SIGKILL)
        until(
            lambda: member.process.poll() is not None,
            f"end of {member.name}, killed {why}: {self.stuck(member)}", PATIENCE,
        )  # fmt: skip
        member.close()

    def close(self) -> None:
        """End everyone."""
        self.reap_orphans()
        for member in self.everyone():
            member.close()
        for group in (self.users, self.vms, self.callers, self.doomed):
            group.clear()

    def reap_orphans(self) -> None:
        """End the children whose parents were killed."""
        while self.orphans:
            os.kill(self.orphans.pop(), signal.SIGKILL)

    # --- views --------------------------------------------------------------------------------

    def stuck(self, member: Member) -> str:
        """Say where the threads of someone wait."""
        found = []
        for task in Path(f"/proc/{member.pid}/task").glob("*"):
            try:
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                found.append(f"{state} in {(task / 'wchan').read_text() or '?'}")
            except OSError:
                continue
        return ", ".join(found) or "gone"

    def check(self) -> None:
        """See that whoever should live does, and that no caller waits too long."""
        for member in (*self.users.values(), *self.vms.values()):
            if member.process.poll() is not None:
                raise Breach(f"{member.name} ended: {member.tail()}")
        for member in self.callers.values():
            if member.process.poll() is None and member.silence() > PATIENCE:
                raise Breach(f"{member.name} waits in a system call: {self.stuck(member)}")
