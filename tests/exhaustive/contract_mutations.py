# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules of the contract, each with the world that shows why it is needed.

Each of these must be caught: a check that no mutation trips over checks nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mutant_owners as o
import mutant_users as u
from contract_guest import Guest
from contract_host import Host
from contract_values import SHIPPING, Call, Cores, Release, Setup, grow
from contract_world import Contract
from contract_worlds import BOTH, CANCEL, MOVE, MOVE_CANCEL, ONE, OTHER, P, Q, own


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
MOVES = Setup(calls=(MOVE_CANCEL,), populated=(0,))
ALONE = Setup(users=2, populated=(0,), exclusive=ONE, prompt=True, direct=True)
STICKS = Setup(calls=(P,), populated=(0,), hang=ONE, sticks=ONE, immortal=ONE)

REACHES, STUCK, DROPPED = "is gone", "stuck", "an honest user was"
FOR_ITSELF = "which has it for itself"
OTHER_SIDE, WOULD_NOT = "on the side of the other attribute", "would not retry"

MUTATIONS = [
    # the user
    Mutation("install rule", FULL, REACHES, Cores(user=u.InstallsAnything)),
    Mutation("floor of the ring", Setup(pages=2, calls=(P, Q), populated=(0, 1), ring=1),
             REACHES, Cores(user=u.ForgetsWithoutFloor)),
    Mutation("the ring is in the order of seqs",
             Setup(pages=2, calls=(P, Q), populated=(0, 1), delivery="set"),
             REACHES, Cores(user=u.TrustsTheOrder)),
    Mutation("what comes before a registration counts",
             Setup(calls=(P,), populated=(0,), delivery="two sockets", reregister=1),
             REACHES, Cores(user=u.ForgetsBeforeRegistered)),
    Mutation("zap before ack", FULL, REACHES, guest=u.AcksBeforeZap),
    Mutation("drain before ack", FULL, REACHES, guest=u.DoesNotDrain),
    Mutation("flush before entry", FULL, REACHES, Cores(shootdown=u.DoesNotFlush), guest=u.Keeps,
             intact=u.Keeps),
    Mutation("wait for earlier zaps too",
             Setup(calls=(P,), populated=(0,), converts=1), REACHES, guest=u.AcksAnOldEpoch),
    Mutation("unmap before unregister", COMES_BACK, REACHES, guest=u.UnregistersBeforeUnmap),
    Mutation("unmap before a new session",
             Setup(calls=(P,), populated=(0,), close=ONE, sessions=2), REACHES,
             guest=u.ReconnectsMapped),
    Mutation("no lock across a request", FULL, STUCK, guest=u.HoldsTheLock),
    # its fault path
    Mutation("snapshot before the look-up", CONVERTS, OTHER_SIDE, Cores(fault=u.LateSnapshot)),
    Mutation("an attribute changes in a bracket", CONVERTS, "would not retry", Cores(vm=u.BlindVm)),
    Mutation("the end counts", CONVERTS, OTHER_SIDE, Cores(invalidate=u.NoSeq)),
    Mutation("what is in progress is looked at", CONVERTS, WOULD_NOT, Cores(invalidate=u.SeqOnly)),
    Mutation("every bracket ends", CONVERTS, STUCK, Cores(invalidate=u.NeverEnds)),
    Mutation("a bracket holds the ranges of all slots", BRACKETS, WOULD_NOT,
             Cores(invalidate=u.MergedRange)),
    Mutation("brackets are merged",
             Setup(pages=2, calls=(P, Q), populated=(0, 1), brackets=True), WOULD_NOT,
             Cores(invalidate=u.NewestRange)),
    Mutation("every slot of a page is zapped",
             Setup(calls=(P,), populated=(0,), abi="v7", slots=((0, 1, 1, 0), (2, 1, 1, 0))),
             REACHES, Cores(vm=u.ZapsOneSlot)),
    # the file
    Mutation("no grant of what goes away", FULL, "granted while they go away",
             Cores(file=o.NeverParks)),
    Mutation("parking", FULL, REACHES, Cores(file=o.NeverParks, audits_grants=False)),
    Mutation("parking from the first step on", FULL, REACHES,
             Cores(file=o.ParksOnlyWhileFreeing, audits_grants=False)),
    Mutation("proof before free", FULL, REACHES, Cores(file=o.FreesBeforeProof)),
    Mutation("nothing freed after an answer", Setup(calls=(CANCEL,), populated=(0,)),
             "frees after it was answered", Cores(file=o.FreesAfterCancel)),
    Mutation("nothing freed without proof",
             Setup(calls=(P,), populated=(0,), hang=ONE, immortal=ONE), REACHES,
             Cores(file=o.FreesAfterGivingUp)),
    Mutation("one change of size at a time",
             Setup(pages=2, size=0, calls=(Call(grow(0, 2)), Call(grow(1, 2))), fails=(28,)),
             REACHES, Cores(file=o.GrowsSideBySide, audits_grants=False)),
    Mutation("proof before copy", MOVES, REACHES, Cores(file=o.CopiesBeforeProof)),
    Mutation("copy before the swap", MOVES, "whose bytes are nowhere else",
             Cores(file=o.SwapsBeforeCopy)),
    Mutation("no grant of what is being copied", MOVES, REACHES,
             Cores(file=o.NeverParks, audits_grants=False)),
    Mutation("nothing copied without proof",
             Setup(calls=(MOVE,), populated=(0,), hang=ONE, immortal=ONE), REACHES,
             Cores(file=o.FreesAfterGivingUp)),
    Mutation("the old extent ends, not the new one", MOVES, "that users are given",
             Cores(file=o.EndsTheNew)),
    # the owner
    Mutation("snapshot at the grant", FULL, REACHES, Cores(owner=o.StampsTooLate)),
    Mutation("exact acks", TWO, REACHES, Cores(owner=o.TakesAnyAck)),
    Mutation("EOF is not an ack", CLOSE, REACHES, Cores(owner=o.TakesEofForAnAck)),
    Mutation("hung users are waited for", HANG, REACHES, Cores(owner=o.SkipsTheHung)),
    Mutation("hung users are not waited for without end", HANG, STUCK, host=o.HasNoTimer),
    Mutation("zombies are waited for", CLOSE, REACHES, Cores(owner=o.SkipsZombies)),
    Mutation("a process that cannot exit needs a fence", STICKS, REACHES,
             Cores(owner=o.TrustsTheKilled)),
    Mutation("active and wait set in one step",
             Setup(calls=(P,), populated=(0,), late=ONE), REACHES,
             Cores(owner=o.Samples), host=o.CountsUsersFirst),
    Mutation("nobody comes to a file that is another's alone", replace(ALONE, late=OTHER),
             FOR_ITSELF, Cores(owner=o.LetsOthersIn)),
    Mutation("a file is nobody's alone that has a user", replace(ALONE, late=ONE), FOR_ITSELF,
             Cores(owner=o.CountsNoUsers)),
    Mutation("a file is its user's alone until that is gone",
             replace(ALONE, late=OTHER, close=ONE), FOR_ITSELF, Cores(owner=o.SharesWhatIsBroken)),
    Mutation("who replaces a session has its files for itself",
             replace(ALONE, late=OTHER, close=ONE, sessions=2), "and is another's",
             Cores(owner=o.InheritsNothing)),
    Mutation("tombstones", COMES_BACK, DROPPED, Cores(owner=o.HasNoTombstones)),
    Mutation("a registration voids older grants",
             Setup(vcpus=2, calls=(P,), populated=(0,), reregister=1, alike=True), REACHES,
             Cores(owner=o.RegistersWithoutSeq)),
    Mutation("operations have names of their own",
             Setup(calls=(own(0, 1), own(0, 1)), populated=(0,), stale=True), DROPPED,
             Cores(owner=o.NamesCallsByRequest)),
    Mutation("parked faults are served", FULL, STUCK, Cores(owner=o.WakesNobody)),
    Mutation("unregister answers parked faults", COMES_BACK, STUCK,
             Cores(owner=o.LeavesParkedUnanswered)),
    Mutation("a released file goes when it can",
             Setup(calls=(Call(Release()),), kill=ONE), STUCK, Cores(owner=o.ReapsOnlyTheIdle)),
    Mutation("a lost extent is sent again", Setup(populated=(0,)), STUCK,
             Cores(owner=o.SendsExtentsOnce), guest=u.LosesExtents, intact=u.LosesExtents),
    # the owner's shell
    Mutation("the reader never waits", Setup(calls=(own(0, 1),), populated=(0,)), STUCK,
             world=o.ReaderWaits),
    Mutation("queues to users have no end",
             HANG, STUCK, world=o.SendsWithoutQueue),
]  # fmt: skip

BY_RULE = {mutation.rule: mutation for mutation in MUTATIONS}
