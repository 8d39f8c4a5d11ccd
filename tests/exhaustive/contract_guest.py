# SPDX-License-Identifier: GPL-2.0-or-later
"""A user process whole: kvmsim's VM and fault path over the user's half of the contract.

What is played here is what the emulator's shell plays (``kvmsim.running``, ``proven``, ``private``,
``privfs.notifier.lane``), its VMM, and what may happen to any process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from contract_lane import Lane
from contract_process import Debt, Vcpu
from contract_values import Letter, joined, put, takeable, without

from kvmsim.region import Region
from kvmsim.uapi import ABIS, PAGE_SIZE
from privfs.notifier.wire import Fence, Op


class Guest(Lane):
    """One process.  It does not know its number: all that start alike are one machine."""

    # --- what can happen ----------------------------------------------------------------------

    def events(self) -> Iterator[tuple[Any, ...]]:
        flags = self.flags
        if "dead" in flags:
            return
        if "killed" in flags:
            yield ("die",)
            if "sticks" in self.fates and "still" not in flags:
                yield ("still",)
        if "still" in flags:
            return
        for fate, flag in (("hang", "hung"), ("close", "closed"), ("kill", "killed")):
            if fate in self.fates and flag not in flags:
                yield (fate,)
        if "stop" in self.fates and not flags:
            yield ("stop",)
        if "stopped" in flags:
            yield ("cont",)
            return
        if "left" in flags:
            return
        if self._may_reconnect():
            yield ("reconnect",)
        if not flags & {"hung", "closed"}:
            yield from self._lane_events()
        for v, vcpu in enumerate(self.vcpus):
            yield from self._vcpu_events(v, vcpu)

    def _lane_events(self) -> Iterator[tuple[Any, ...]]:
        for i in takeable(self.inbox, self.setup.delivery):
            yield "lane", i
        room = self.can_send()
        if self.owed and self._may_ack(self.owed[0]) and room:
            yield ("ack",)
        for i, state in enumerate(self.registered):
            if state == "yes" and self.comebacks and room and self._nobody_inside():
                if self.open is None:
                    yield "unregister", i + 1
            elif state == "no" and room and self._opened():
                yield "register", i + 1
        if "leaves" in self.fates and room and set(self.registered) == {"no"} and self._opened():
            yield ("bye",)
        if self.open is not None:
            yield ("converted",)
        elif self.converts and set(self.registered) == {"yes"}:
            yield ("convert",)

    def _may_reconnect(self) -> bool:
        left = "closed" in self.flags and not self.flags & {"hung", "killed"}
        return left and len(self.outboxes) < self.setup.sessions and self._nobody_inside()

    def _opened(self) -> bool:
        """The owner has answered HELLO."""
        hello = any(op == Op.HELLO for op, _ in self.user._pending.values())
        return not hello and "mute" not in self.fates

    def _nobody_inside(self) -> bool:
        return all(v.state != "inside" for v in self.vcpus)

    def _may_ack(self, debt: Debt) -> bool:
        return self.shootdown.drained(debt.epoch)

    # --- the VMM ------------------------------------------------------------------------------

    def _on_unregister(self, ino: int) -> None:
        self.comebacks -= 1
        self._unbind(ino)
        self._leave(ino)

    def _unbind(self, ino: int) -> None:
        """Delete the file's slots and prove the flush: nobody is in guest code."""
        for number, (gfn, _, file, _) in enumerate(self.setup.bound):
            if file == ino and self.vm.mmu.slots.get(number) is not None:
                gone = Region(number, 0, gfn * PAGE_SIZE, 0)
                if self._vm().set_user_memory_region2(gone).leaves:
                    self._request_flush()
        self._let_go({extent[:2] for extent in self.extents if extent.ino == ino})

    def _leave(self, ino: int) -> None:
        record = self._user().unregister(ino)
        self.registered = put(self.registered, ino - 1, "leaves")
        self.stores -= {ino}
        self.alone -= {ino}
        self._ask(record, "unregister", ino)

    def _on_register(self, ino: int) -> None:
        self.registered = put(self.registered, ino - 1, "asked")
        exclusive = "exclusive" in self.fates
        record = self._user().register(self.setup.purpose, exclusive=exclusive)
        self._ask(record, "register", ino)

    def _on_bye(self) -> None:
        self._post(self.user.bye())
        self._flag("left")

    def _on_call(self, number: int, op: int, ino: int, start: int, end: int) -> None:
        user = self._user()
        make = user.punch if op == Op.PUNCH else user.allocate
        self._ask(make(ino, start, end), "call", number)

    def _on_convert(self) -> None:
        """Change the attribute of the first gfn: the bracket stays open until it has changed."""
        self.converts -= 1
        private = ABIS[self.setup.abi].attribute_private
        value = 0 if self.vm.mmu.attributes.get(0) else private
        self.open = self._vm().begin_set_memory_attributes(0, PAGE_SIZE, value)
        self.ranges += ((0, 1),)
        if self.open.zapped.leaves:
            self._request_flush()

    def _on_converted(self) -> None:
        assert self.open is not None
        self._vm().end(self.open)
        self.open = None
        kept = list(self.ranges)
        kept.remove((0, 1))
        self.ranges = tuple(kept)

    # --- its fate -----------------------------------------------------------------------------

    def _on_hang(self) -> None:
        """The lane stops for ever; guest code runs on."""
        self._flag("hung")

    def _on_stop(self) -> None:
        """SIGSTOP."""
        self._flag("stopped")

    def _on_cont(self) -> None:
        self.flags -= {"stopped"}
        self.fates -= {"stop"}

    def _on_close(self) -> None:
        """The socket is closed, and the process runs on."""
        self.inbox, self.owed = (), ()
        self._hang_up()
        self._flag("closed")

    def _on_kill(self) -> None:
        self._flag("killed")

    def _on_die(self) -> None:
        """The process ends: its socket closes, nothing of it reaches anything."""
        self.leaves, self.vcpus = frozenset(), (Vcpu(),) * self.setup.vcpus
        self.shootdown = self.cores.shootdown(self.setup.vcpus)
        self.inbox, self.owed, self.open, self.ranges, self.requests = (), (), None, (), ()
        self.alone = frozenset()
        if "closed" not in self.flags:
            self._hang_up()
        self.flags = frozenset({"killed", "dead"} | self.flags)

    def _on_still(self) -> None:
        """No thread returns to its program any more, but some cannot exit.

        What the kernel does for it may still touch what is mapped, unless a fence stops that too.
        """
        self.vcpus = tuple([Vcpu() for _ in self.vcpus])
        self.shootdown = self.cores.shootdown(self.setup.vcpus)
        if "fenced" in self.fates:
            self.leaves = frozenset()
        self._flag("still")

    def _on_fenced(self) -> None:
        """The owner was told."""
        self._flag("told")

    def _on_echoed(self) -> None:
        """The owner hears again that the socket has ended."""
        self.fates -= {"echoes"}

    def _on_reaped(self) -> None:
        """Its exit was seen."""
        self.outboxes = ((),) * len(self.outboxes)
        self._flag("reaped")

    def _hang_up(self) -> None:
        self.outboxes = put(
            self.outboxes, len(self.outboxes) - 1, (*self.outboxes[-1], None)
        )  # fmt: skip

    def _on_reconnect(self) -> None:
        """Unmap everything, then open another session in place of the one whose socket broke."""
        self._forget_everything()
        self.inbox, self.owed, self.ranges, self.requests = (), (), (), ()
        if self.open is not None:
            self._vm().end(self.open)
            self.open = None
        self.registered = ("no",) * self.setup.files
        self.vcpus = tuple([Vcpu(tlb=vcpu.tlb) for vcpu in self.vcpus])
        self.user = self.cores.user(self.setup.ring)
        self.flags -= {"closed"}
        self.fates -= {"close"}
        number = len(self.outboxes)
        self.outboxes += ((),)
        self.hello(replaces=number)  # the host knows that session's id
        self._say("connect", number)

    def hello(self, replaces: int = 0) -> None:
        """Open a session."""
        fence = Fence.UFFD if "fenced" in self.fates else Fence.NONE
        self._post(self._user().hello("u", replaces, fence))

    def _forget_everything(self) -> None:
        for ino in self.setup.inos:
            self._unbind(ino)
        self.vm.mmu.invalidate = self.cores.invalidate()

    # --- what the host does to it -------------------------------------------------------------

    def _on_letter(self, session: int, letter: Letter) -> None:
        if session == len(self.outboxes) - 1 and not self.flags & {"closed", "dead"}:
            self.inbox = joined(self.inbox, letter, self.setup.delivery)

    def _on_dropped(self, session: int) -> None:
        """The owner has closed its end."""
        self.outboxes = put(self.outboxes, session, ())
        if session == len(self.outboxes) - 1 and not self.flags & {"closed", "dead"}:
            self.inbox = (*self.inbox, None)

    def _on_condemned(self) -> None:
        """The owner has sent SIGKILL."""
        if self.healthy:
            self.wrong("an honest user was killed")
        self._flag("killed")

    def _on_judged(self, session: int, why: str) -> None:
        if self.healthy and session == len(self.outboxes) - 1:
            self.wrong(f"an honest user was dropped: {why}")

    def _on_sent(self, session: int, i: int) -> None:
        self.outboxes = put(self.outboxes, session, without(self.outboxes[session], i))
