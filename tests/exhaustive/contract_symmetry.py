# SPDX-License-Identifier: GPL-2.0-or-later
"""Users that start alike are not told apart: states that differ in their numbers alone are one.

The owner treats its users alike, so to exchange two of them in a state is to exchange them in all
that can follow (Ip and Dill, *Better verification through symmetry*, 1996).  Only the key of a
state is exchanged, not the state, so every trace is one of the plain world.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import permutations
from typing import Any

from contract_guest import Guest
from contract_host import Host
from contract_values import SHIPPING, Cores, Setup
from contract_world import Contract, State

from privfs.operation import OpId


def build(setup: Setup) -> Contract:
    """Return the world of a setup, the smallest that shows all of it."""
    users = range(setup.users)
    named = (setup.late, setup.fresh, setup.readers, setup.immortal)
    same = (
        len({setup.fates(p) for p in users}) == 1
        and all(not some or some == frozenset(users) for some in named)
        and all(call.caller < 0 for call in setup.calls)
    )
    return Symmetric(setup) if setup.alike and setup.users > 1 and same else Contract(setup)


class Symmetric(Contract):
    """The contract among users that are alike; :func:`build` knows whether they are."""

    def __init__(
        self,
        setup: Setup,
        cores: Cores = SHIPPING,
        host: type[Host] = Host,
        guest: type[Guest] = Guest,
    ) -> None:
        self._orders = list(permutations(range(setup.users)))
        self._renamed: dict[tuple[int, tuple[int, ...]], int] = {}
        super().__init__(setup, cores, host, guest)

    def key(self, state: State) -> Hashable:
        """Return the least of the states that are this one with its users exchanged."""
        number, *guests = state
        ranked = sorted(guests)
        if ranked == guests and len(set(guests)) == len(guests):
            return state
        return min([
            (self._rename(number, order), *ranked)
            for order in self._orders
            if [guests[p] for p in order] == ranked
        ])  # fmt: skip

    def _rename(self, number: int, order: tuple[int, ...]) -> int:
        """Return the host in which user ``order[p]`` has become user ``p``."""
        found = self._renamed.get((number, order))
        if found is None:
            twin = renamed(self.hosts[number], order)
            found = self._renamed[number, order] = self.hosts.number(twin)
        return found


def renamed(host: Host, order: tuple[int, ...]) -> Host:
    """Return a host whose users have changed places: ``order[p]`` becomes ``p``."""
    users = host.setup.users
    place = {old: new for new, old in enumerate(order)}

    def sid(old: int) -> int:
        session, p = divmod(old - 1, users)
        return 1 + place[p] + users * session

    def op(old: OpId) -> Any:
        match old:
            case ("get" | "call" as what, int(by), *rest):
                return (what, sid(by), *rest)
        return old

    twin = host.copy()
    owner = twin.owner = host.owner.copy()
    for session in owner.sessions.values():
        session.sid = sid(session.sid)
        session.pid = 100 + place[session.pid - 100]
        session.sent = {
            seq: None if key is None else (key[0], op(key[1])) for seq, key in session.sent.items()
        }
    ordered = sorted(owner.sessions.values(), key=lambda session: session.sid)
    owner.sessions = {session.sid: session for session in ordered}
    owner.users = {ino: {sid(user) for user in users} for ino, users in owner.users.items()}
    for ino, holder in owner.exclusive._holders.items():
        owner.exclusive._holders[ino] = sid(holder)
    for wait in owner._waits.values():
        wait.sids = {sid(user) for user in wait.sids}
    owner._waits = {(ino, op(what)): wait for (ino, what), wait in owner._waits.items()}
    owner._parked = [get._replace(sid=sid(get.sid)) for get in owner._parked]
    owner._faults = {
        op(what): get._replace(sid=sid(get.sid)) for what, get in owner._faults.items()
    }
    owner._callers = {op(what): by for what, by in owner._callers.items()}
    for file in owner.files.values():
        for active in file._active:
            active.op = op(active.op)
        file._waiting = [(op(what), request) for what, request in file._waiting]
    twin.works = tuple([
        work._replace(perform=work.perform._replace(op=op(work.perform.op))) for work in host.works
    ])  # fmt: skip
    twin.timers = tuple([(ino, op(what), *rest) for ino, what, *rest in host.timers])
    twin.chains = tuple([(op(what), count) for what, count in host.chains])
    twin.gets = tuple([(sid(by), req, ino) for by, req, ino in host.gets])
    return twin
