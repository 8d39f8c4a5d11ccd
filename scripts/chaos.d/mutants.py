# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules switched off, one a mutant: chaos must find each, or it would not find a real breach.

They are patches of the programs that chaos starts.  Nothing in the product knows of them.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from freefirst import free_first

from kvmsim.running import RunningVm
from kvmsim.vcpus import Vcpu
from privfs import service
from privfs.backing import Backing
from privfs.memfile import Look, MemFile
from privfs.notifier import link
from privfs.notifier.owner import Owner
from privfs.notifier.ownerstate import OwnerState
from privfs.notifier.session import Event
from privfs.operation import Kind
from privfs.timers import RunningTime


class NoFlush(RunningVm):
    """A vCPU enters guest code with whatever its TLB holds."""

    def _flush(self, vcpu: Vcpu) -> None:
        return


class NoDrain(RunningVm):
    """Acknowledges while a vCPU is still in guest code."""

    def drain(self, epoch: int) -> None:
        return


def _nothing() -> None:
    return


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def eof_is_ack() -> None:
    def make(broken: Any) -> Any:
        return lambda self, sid, why: [*broken(self, sid, why), *self.gone(sid)]

    _replace(OwnerState, "broken", make)


def first_ack() -> None:
    def make(proven: Any) -> Any:
        def patched(self: OwnerState, key: Any, sid: int) -> Any:
            if key in self._waits:
                self._waits[key].sids = {sid}
            return proven(self, key, sid)

        return patched

    _replace(OwnerState, "_proven", make)


def skip_hung() -> None:
    _replace(OwnerState, "_condemn", lambda _: lambda self, s, where: self._end(s, Event.EXIT))


def no_ladder() -> None:
    _replace(Owner, "timer", lambda _: lambda self, ino, op, stopped=frozenset(): [])


def exit_only() -> None:
    _replace(service, "harmless", lambda _: lambda pid: False)


def wall_clock() -> None:
    _replace(RunningTime, "read", lambda _: lambda self: time.time())


def no_park() -> None:
    def make(look: Any) -> Any:
        def patched(self: MemFile, page: int) -> Look:
            found: Look = look(self, page)
            return Look.PRESENT if found is Look.PARK and page in self.pages else found

        return patched

    _replace(MemFile, "look", make)


def no_free() -> None:
    _replace(Backing, "punch", lambda _: lambda self, ino, start, end: None)


def lose_budget() -> None:
    def make(step_done: Any) -> Any:
        def patched(self: MemFile, *arguments: Any) -> Any:
            before = self._budget.used
            effects = step_done(self, *arguments)
            self._budget.used = max(before, self._budget.used)
            return effects

        return patched

    _replace(MemFile, "step_done", make)


def keep_fds() -> None:
    _replace(link, "close_later", lambda _: lambda fds: None)


def callers_eio() -> None:
    """Give every second punch that has to ask anyone up."""

    def make(invalidate: Any) -> Any:
        def patched(self: OwnerState, ino: int, perform: Any) -> Any:
            effects = invalidate(self, ino, perform)
            if len(self._waits[ino, perform.op].sids) > 1:
                del self._waits[ino, perform.op]
                done = self.files[ino].abandon(perform.op, errno.EIO, "a mutant")
                return [*effects, *self._run(ino, done)]
            return effects

        return patched

    _replace(OwnerState, "_invalidate", make)


def copy_first() -> None:
    """Copy what moves without waiting for those who can still store to it."""

    def make(invalidate: Any) -> Any:
        def patched(self: OwnerState, ino: int, perform: Any) -> Any:
            effects = invalidate(self, ino, perform)
            if perform.kind is Kind.MIGRATE and self._waits[ino, perform.op].sids:
                del self._waits[ino, perform.op]
                return [*effects, *self._run(ino, self.files[ino].step_done(perform.op))]
            return effects

        return patched

    _replace(OwnerState, "_invalidate", make)


@dataclass(frozen=True, slots=True)
class Mutant:
    """``mount`` patches the owner, ``vcpus`` runs the guests, ``mode`` is of the users in C."""

    what: str
    mount: Callable[[], None] = _nothing
    vcpus: type[RunningVm] = RunningVm
    mode: str = "good"

    def running(self) -> type[RunningVm]:
        """Return the class that runs vCPUs."""
        return self.vcpus


MUTANTS = {
    "none": Mutant("every rule holds"),
    "free-first": Mutant("a punch frees, then invalidates", free_first),
    "first-ack": Mutant("the first acknowledgement counts for all", first_ack),
    "eof-is-ack": Mutant("the end of a socket counts as a proof", eof_is_ack),
    "skip-hung": Mutant("a user that does not answer is left out", skip_hung),
    "no-ladder": Mutant("a user that does not answer is waited for, for ever", no_ladder),
    "exit-only": Mutant("who is killed in a call behind its waiter's is waited for", exit_only),
    "wall-clock": Mutant("the ladder goes by the time of day", wall_clock),
    "no-park": Mutant("a fault is served while its page is being invalidated", no_park),
    "no-free": Mutant("a punch leaves the memory where it is", no_free),
    "needless-eio": Mutant("a punch that several users must acknowledge is given up", callers_eio),
    "copy-first": Mutant("pages move before everyone has let go of them", copy_first),
    "lose-budget": Mutant("freed pages stay charged", lose_budget),
    "keep-fds": Mutant("received descriptors are never closed", keep_fds),
    "no-flush": Mutant("vCPUs keep stale translations", vcpus=NoFlush),
    "no-drain": Mutant("acknowledged while vCPUs are in guest code", vcpus=NoDrain),
    "early-ack": Mutant("a user acknowledges, then unmaps", mode="early"),
    "no-ring": Mutant("a user installs grants that an invalidation has overtaken", mode="noring"),
    "liar": Mutant("a user acknowledges and unmaps nothing", mode="liar"),
}
