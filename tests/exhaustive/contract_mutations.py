# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules of the contract, each with the world that shows why it is needed.

Each of these must be caught: a check that no mutation trips over checks nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import contract_mutants as m
from contract_guest import Guest
from contract_host import Host
from contract_values import SHIPPING, Call, Cores, Release, Setup, grow
from contract_world import Contract
from contract_worlds import BOTH, CANCEL, ONE, P, Q, own


@dataclass(frozen=True)
class Mutation:
    """A rule that is off, the world that shows it, and what must be found there."""

    rule: str
    setup: Setup
    finds: str
    cores: Cores = SHIPPING
    guest: type[Guest] = Guest
    host: type[Host] = Host
    world: type[Contract] = Contract
    intact: type[Guest] = Guest  #: of the same world with the rule

    def build(self) -> Contract:
        """The world without the rule."""
        return self.world(self.setup, self.cores, self.host, self.guest)

    def build_intact(self) -> Contract:
        """The same world with it."""
        return Contract(self.setup, SHIPPING, Host, self.intact)


FULL = Setup(calls=(P,), populated=(0,))
TWO = Setup(pages=2, calls=(P, Q), populated=(0, 1))
HANG = Setup(calls=(P,), populated=(0,), hang=ONE)
CLOSE = Setup(calls=(P,), populated=(0,), close=ONE)
COMES_BACK = Setup(calls=(P,), populated=(0,), reregister=1)
CONVERTS = Setup(populated=(0,), converts=1)
BRACKETS = Setup(
    pages=2, calls=(BOTH,), populated=(0, 1), brackets=True, slots=((0, 1, 1, 0), (1, 1, 1, 1))
)
STICKS = Setup(calls=(P,), populated=(0,), hang=ONE, sticks=ONE, immortal=ONE)

REACHES, STUCK, DROPPED = "is gone", "stuck", "an honest user was"
OTHER_SIDE, WOULD_NOT = "on the side of the other attribute", "would not retry"

MUTATIONS = [
    # the user
    Mutation("install rule", FULL, REACHES, Cores(user=m.InstallsAnything)),
    Mutation("floor of the ring", Setup(pages=2, calls=(P, Q), populated=(0, 1), ring=1),
             REACHES, Cores(user=m.ForgetsWithoutFloor)),
    Mutation("the ring is in the order of seqs",
             Setup(pages=2, calls=(P, Q), populated=(0, 1), delivery="set"),
             REACHES, Cores(user=m.TrustsTheOrder)),
    Mutation("what comes before a registration counts",
             Setup(calls=(P,), populated=(0,), delivery="two sockets", reregister=1),
             REACHES, Cores(user=m.ForgetsBeforeRegistered)),
    Mutation("zap before ack", FULL, REACHES, guest=m.AcksBeforeZap),
    Mutation("drain before ack", FULL, REACHES, guest=m.DoesNotDrain),
    Mutation("flush before entry", FULL, REACHES, Cores(shootdown=m.DoesNotFlush), guest=m.Keeps,
             intact=m.Keeps),
    Mutation("wait for earlier zaps too",
             Setup(calls=(P,), populated=(0,), converts=1), REACHES, guest=m.AcksAnOldEpoch),
    Mutation("unmap before unregister", COMES_BACK, REACHES, guest=m.UnregistersBeforeUnmap),
    Mutation("unmap before a new session",
             Setup(calls=(P,), populated=(0,), close=ONE, sessions=2), REACHES,
             guest=m.ReconnectsMapped),
    Mutation("no lock across a request", FULL, STUCK, guest=m.HoldsTheLock),
    # its fault path
    Mutation("snapshot before the look-up", CONVERTS, OTHER_SIDE, Cores(fault=m.LateSnapshot)),
    Mutation("an attribute changes in a bracket", CONVERTS, "would not retry", Cores(vm=m.BlindVm)),
    Mutation("the end counts", CONVERTS, OTHER_SIDE, Cores(invalidate=m.NoSeq)),
    Mutation("what is in progress is looked at", CONVERTS, WOULD_NOT, Cores(invalidate=m.SeqOnly)),
    Mutation("every bracket ends", CONVERTS, STUCK, Cores(invalidate=m.NeverEnds)),
    Mutation("a bracket holds the ranges of all slots", BRACKETS, WOULD_NOT,
             Cores(invalidate=m.MergedRange)),
    Mutation("brackets are merged",
             Setup(pages=2, calls=(P, Q), populated=(0, 1), brackets=True), WOULD_NOT,
             Cores(invalidate=m.NewestRange)),
    Mutation("every slot of a page is zapped",
             Setup(calls=(P,), populated=(0,), abi="v7", slots=((0, 1, 1, 0), (2, 1, 1, 0))),
             REACHES, Cores(vm=m.ZapsOneSlot)),
    # the file
    Mutation("no grant of what goes away", FULL, "granted while they go away",
             Cores(file=m.NeverParks)),
    Mutation("parking", FULL, REACHES, Cores(file=m.NeverParks, audits_grants=False)),
    Mutation("parking from the first step on", FULL, REACHES,
             Cores(file=m.ParksOnlyWhileFreeing, audits_grants=False)),
    Mutation("proof before free", FULL, REACHES, Cores(file=m.FreesBeforeProof)),
    Mutation("nothing freed after an answer", Setup(calls=(CANCEL,), populated=(0,)),
             "frees after it was answered", Cores(file=m.FreesAfterCancel)),
    Mutation("nothing freed without proof",
             Setup(calls=(P,), populated=(0,), hang=ONE, immortal=ONE), REACHES,
             Cores(file=m.FreesAfterGivingUp)),
    Mutation("one change of size at a time",
             Setup(pages=2, size=0, calls=(Call(grow(0, 2)), Call(grow(1, 2))), fails=(28,)),
             REACHES, Cores(file=m.GrowsSideBySide, audits_grants=False)),
    # the owner
    Mutation("snapshot at the grant", FULL, REACHES, Cores(owner=m.StampsTooLate)),
    Mutation("exact acks", TWO, REACHES, Cores(owner=m.TakesAnyAck)),
    Mutation("EOF is not an ack", CLOSE, REACHES, Cores(owner=m.TakesEofForAnAck)),
    Mutation("hung users are waited for", HANG, REACHES, Cores(owner=m.SkipsTheHung)),
    Mutation("hung users are not waited for without end", HANG, STUCK, host=m.HasNoTimer),
    Mutation("zombies are waited for", CLOSE, REACHES, Cores(owner=m.SkipsZombies)),
    Mutation("a process that cannot exit needs a fence", STICKS, REACHES,
             Cores(owner=m.TrustsTheKilled)),
    Mutation("active and wait set in one step",
             Setup(calls=(P,), populated=(0,), late=ONE), REACHES,
             Cores(owner=m.Samples), host=m.CountsUsersFirst),
    Mutation("tombstones", COMES_BACK, DROPPED, Cores(owner=m.HasNoTombstones)),
    Mutation("a registration voids older grants",
             Setup(vcpus=2, calls=(P,), populated=(0,), reregister=1, alike=True), REACHES,
             Cores(owner=m.RegistersWithoutSeq)),
    Mutation("operations have names of their own",
             Setup(calls=(own(0, 1), own(0, 1)), populated=(0,), stale=True), DROPPED,
             Cores(owner=m.NamesCallsByRequest)),
    Mutation("parked faults are served", FULL, STUCK, Cores(owner=m.WakesNobody)),
    Mutation("unregister answers parked faults", COMES_BACK, STUCK,
             Cores(owner=m.LeavesParkedUnanswered)),
    Mutation("a released file goes when it can",
             Setup(calls=(Call(Release()),), kill=ONE), STUCK, Cores(owner=m.ReapsOnlyTheIdle)),
    Mutation("a lost extent is sent again", Setup(populated=(0,)), STUCK,
             Cores(owner=m.SendsExtentsOnce), guest=m.LosesExtents, intact=m.LosesExtents),
    # the owner's shell
    Mutation("the reader never waits", Setup(calls=(own(0, 1),), populated=(0,)), STUCK,
             world=m.ReaderWaits),
    Mutation("queues to users have no end",
             HANG, STUCK, world=m.SendsWithoutQueue),
]  # fmt: skip

BY_RULE = {mutation.rule: mutation for mutation in MUTATIONS}
