# SPDX-License-Identifier: GPL-2.0-or-later
"""`TdxModule`: one TDX module as a value machine, called by registers.

``seamcall`` and ``tdcall`` are shaped as the instructions are: the leaf in RAX, operands in the
other registers, the answer a `Result` with the registers after it. ``call`` and the methods of
`hwemu.tdx.host.Host` say the same, but raise `TdxError` where RAX is no success and nothing
changed. What the CPU side must do (flush a TLB, leave the TD, inject #VE) comes back as values.

Nothing here locks or waits: one caller at a time, as if each leaf were an instant. To see what two
leaves at once would answer, hold one open between ``begin`` and ``end``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hwemu.tdx import guest, lifeleaves, memleaves
from hwemu.tdx.checks import CHECKS, Call
from hwemu.tdx.host import Host
from hwemu.tdx.leaves import Leaf, leaf_of
from hwemu.tdx.locks import Held
from hwemu.tdx.machine import Config, Machine
from hwemu.tdx.pamt import Tdmr
from hwemu.tdx.result import (
    Access,
    ExitReason,
    Memory,
    NoMemory,
    Result,
    TdExit,
)
from hwemu.tdx.status import TdxError
from hwemu.tdx.td import Td, Vcpu

_EFFECTS = memleaves.EFFECTS | lifeleaves.EFFECTS


class TdxModule(Host, Machine):
    """A module over ``tdmrs``, whose pages' contents ``memory`` reaches.

    ``config`` takes the other fields of `hwemu.tdx.machine.Config`: HKIDs, packages, widths.
    """

    def __init__(self, tdmrs: Sequence[Tdmr], memory: Memory | None = None, **config: Any) -> None:
        Machine.__init__(self, Config(tuple(tdmrs), **config), memory or NoMemory())

    # -- the host ---------------------------------------------------------------------------------

    def call(self, rax: int, *, lp: int = 0, **registers: int) -> Result:
        """Run one leaf on logical processor ``lp``; raise `TdxError` if it is refused."""
        leaf, version = leaf_of(rax)
        return self._run(leaf, Call(leaf, version, lp, registers))

    def _run(self, leaf: Leaf, call: Call) -> Result:
        for check in leaf.order:
            CHECKS[check](self, call)
        return _EFFECTS[leaf.number](self, call)

    def seamcall(self, rax: int, *, lp: int = 0, **registers: int) -> Result:
        """Run one leaf: RAX holds leaf (15:0) and version (23:16); registers by name, else 0.

        TDH.VP.ENTER answers at once: the vCPU is in the TD then, until a `TdExit` comes from
        ``access`` or ``tdcall``, or the CPU side reports one with ``td_exit``.
        """
        try:
            return self.call(rax, lp=lp, **registers)
        except TdxError as error:
            return Result(error.status, error.rcx, error.rdx, error.r8)

    def begin(self, rax: int, *, lp: int = 0, **registers: int) -> Held:
        """Take the locks that the leaf would have in its midst, and leave it there.

        Raises what the leaf would; nothing else of it happens. A vCPU's leaf is `begin_guest`.
        """
        scratch = self.copy(NoMemory())
        scratch.locks.record()
        scratch.call(rax, lp=lp, **registers)
        return self.locks.hold(scratch.locks.recorded())

    def begin_guest(self, tdvpr: int, rax: int, **registers: int) -> Held:
        """As `begin`, for a leaf of TDCALL of a vCPU that runs."""
        scratch = self.copy(NoMemory())
        scratch.locks.record()
        td, vcpu = scratch._running(tdvpr)
        guest.tdcall(scratch, td, vcpu, rax, registers)
        return self.locks.hold(scratch.locks.recorded())

    def end(self, held: Held) -> None:
        """Let go of the locks that `begin` took. The leaf itself has not happened."""
        self.locks.release(held)

    # -- the guest --------------------------------------------------------------------------------

    def _running(self, tdvpr: int) -> tuple[Td, Vcpu]:
        td = self.vcpus[tdvpr]
        vcpu = td.vcpus[tdvpr]
        if not vcpu.running:
            raise ValueError(f"vCPU at {tdvpr:#x} is not in its TD: TDH.VP.ENTER comes first")
        return td, vcpu

    def tdcall(
        self, tdvpr: int, rax: int, *, interrupt_after: int | None = None, **registers: int
    ) -> Result:
        """Run one leaf of TDCALL on a vCPU that runs. Effects say if it has left the TD.

        ``interrupt_after``: an interrupt comes after so many 4 KiB pages of an ACCEPT of 2 MiB.
        """
        td, vcpu = self._running(tdvpr)
        try:
            return guest.tdcall(self, td, vcpu, rax, registers, interrupt_after)
        except TdxError as error:
            return Result(error.status, error.rcx, error.rdx, error.r8)

    def access(self, tdvpr: int, gpa: int, rights: int = 1, *, gla: int | None = None) -> Access:
        """Return what a guest access meets; ``rights`` are 1 read, 2 write, 4 fetch, or several.

        The TLB is the CPU side's: this is the walk that follows a miss.
        """
        td, vcpu = self._running(tdvpr)
        return guest.access(self, td, vcpu, gpa, rights, gpa if gla is None else gla)

    def td_exit(self, tdvpr: int, reason: ExitReason = ExitReason.EXTERNAL_INTERRUPT) -> TdExit:
        """The vCPU has left its TD for a reason of the CPU side's: an interrupt, a kick."""
        td, vcpu = self._running(tdvpr)
        return guest.leave(td, vcpu, TdExit(vcpu.hpa, reason))

    # -- all of it --------------------------------------------------------------------------------

    def copy(self, memory: Memory | None = None) -> TdxModule:
        """An independent copy of all but the pages' contents; over ``memory`` if given."""
        other = TdxModule.__new__(TdxModule)
        other.config = self.config  # type: ignore[misc]
        self.copy_to(other, memory or self.memory)
        return other
