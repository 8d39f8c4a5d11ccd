# SPDX-License-Identifier: GPL-2.0-or-later
"""What each exit of the guest means: exceptions, and the instructions that SVM intercepts."""

from __future__ import annotations

from dataclasses import replace

from hwemu.cpu import cpuid, vmcb
from hwemu.cpu import rawcontext as raw_layout
from hwemu.cpu.api import (
    Access,
    CpuError,
    CpuExit,
    CpuStateError,
    HltExit,
    HypercallExit,
    InterceptExit,
    MsrExit,
    ShutdownExit,
    Stage2Fault,
)
from hwemu.cpu.decode import RING0_ONLY, Instruction, recognise
from hwemu.cpu.delivery import ERROR_CODE_VECTORS, Event, resolve
from hwemu.cpu.engine import Engine
from hwemu.cpu.guestmemory import GuestFault, GuestMemory, Stage2Miss, Unsupported

_UD, _GP, _PF = 6, 13, 14
_INT3 = 3
_MASK32, _MASK64 = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF


class Intercepts:
    """Exit handling of one vCPU and what it leaves for the next run.

    ``exit`` is what `run` is to return; ``event`` waits for delivery; ``waiting`` is an exit whose
    instruction is finished at the next run; ``cpuid`` answers CPUID.
    """

    def __init__(self, engine: Engine, memory: GuestMemory, lookup: cpuid.Lookup) -> None:
        self._engine = engine
        self._raw = engine.raw
        self._memory = memory
        self.cpuid = lookup
        self.exit: CpuExit | None = None
        self.event: Event | None = None
        self.shutdown = False
        self.protected: frozenset[str] = frozenset()  #: what becomes an InterceptExit
        self.waiting: HypercallExit | InterceptExit | MsrExit | None = None
        self._answered = False
        self._result: int | None = None
        self._from = self._to = 0

    # -- leaving --------------------------------------------------------------------------------

    def leave(self, exit_: CpuExit) -> None:
        """From a hook: `run` returns ``exit_``."""
        self.exit = exit_
        self._engine.stop()

    def leave_fault(self, gpa: int, access: Access) -> None:
        """From a hook: `run` returns a second-stage fault."""
        self.leave(Stage2Fault(gpa, access))

    def look(self) -> None:
        """Let guest memory use the control registers of now."""
        q = self._raw.q
        self._memory.enter(
            q[raw_layout.CR0], q[raw_layout.CR3], q[raw_layout.CR4], self._engine.msrs.efer
        )

    # -- events ---------------------------------------------------------------------------------

    def deliver(self) -> CpuExit | None:
        """Deliver `event`; an exit if that is not possible now or ever."""
        event = self.event
        assert event is not None
        if event.rip is None:
            event = replace(event, rip=self._raw.q[raw_layout.RIP])
        self._raw.forget_exception()
        self.look()
        try:
            alive = resolve(self._raw, self._memory, self._engine.rflags(), event)
        except Stage2Miss as miss:
            return Stage2Fault(miss.gpa, miss.access)
        except Unsupported as why:
            self.event = None
            return CpuError(str(why))
        self.event = None
        if not alive:
            self.shutdown = True
            return ShutdownExit("triple fault")
        return None

    def _raise(self, event: Event) -> None:
        """From a hook: the instruction at RIP causes ``event``."""
        self.event = event
        exit_ = self.deliver()
        if exit_ is not None:
            self.leave(exit_)

    def raise_fault(self, fault: GuestFault) -> None:
        """From a hook: the instruction at RIP causes ``fault``."""
        self._raise(Event(fault.vector, fault.error_code, self._raw.q[raw_layout.RIP], fault.cr2))

    # -- instructions ---------------------------------------------------------------------------

    def _instruction(self, rip: int) -> Instruction | None:
        self.look()
        try:
            return recognise(self._memory.code(self._raw.linear(rip), self._raw.cpl == 3))
        except (GuestFault, Unsupported):
            return None

    def length_at(self, rip: int, name: str) -> int | None:
        """Length of the instruction ``name`` at ``rip``; None: an error exit is on its way.

        Stage2Miss if its page was zapped since it was fetched.
        """
        found = self._instruction(rip)
        if found is None or found.name != name:
            self.leave(CpuError(f"no {name} found at RIP {rip:#x}"))
            return None
        return found.length

    def handle(self, number: int) -> None:
        """From a hook: exit or exception ``number``."""
        try:
            self._handle(number)
        except Stage2Miss as miss:  # zapped since it was fetched: it is met again
            self._raw.forget_exception()
            self.leave_fault(miss.gpa, miss.access)

    def _handle(self, number: int) -> None:
        raw = self._raw
        code = number - vmcb.VMEXIT
        rip = raw.q[raw_layout.RIP]
        if number < vmcb.VMEXIT:
            self._software_interrupt(number, rip)
        elif 0 <= code - vmcb.EXIT_EXCEPTION < 32:
            self._exception(code - vmcb.EXIT_EXCEPTION, rip)
        elif code == vmcb.EXIT_CPUID:
            self._cpuid(rip)
        elif code == vmcb.EXIT_MSR:
            self._msr(rip, bool(raw.d[raw_layout.ERROR_CODE] & 1))
        elif code == vmcb.EXIT_HLT:
            length = self.length_at(rip, "hlt")
            if length is not None and "hlt" in self.protected:
                self._wait(InterceptExit("hlt", length), rip, length)
            elif length is not None:
                raw.end_instruction(rip + length)
                self.leave(HltExit())
        elif code == vmcb.EXIT_VMMCALL:
            found = self._instruction(rip)
            if found is None:
                self.leave(CpuError(f"no VMMCALL found at RIP {rip:#x}"))
            else:
                self._hypercall(found, rip)
        elif code == vmcb.EXIT_INVLPGA or vmcb.EXIT_VMRUN <= code <= vmcb.EXIT_SKINIT:
            # a guest without SVM of its own
            self._raise(Event(_UD, None, rip))
        elif code == vmcb.EXIT_SHUTDOWN:
            self.shutdown = True
            self.leave(ShutdownExit("triple fault"))
        else:
            self.leave(CpuError(f"unknown exit {number:#x} at RIP {rip:#x}"))

    def _software_interrupt(self, vector: int, rip: int) -> None:
        """INT n, INT3: RIP is already behind the instruction."""
        if not self._raw.d[raw_layout.EXCEPTION_IS_INT]:
            self.leave(CpuError(f"exception {vector} past its intercept at RIP {rip:#x}"))
            return
        length = 2
        if vector == _INT3:
            self.look()
            try:
                before = self._raw.linear(rip - 1)
                if self._memory.read(before, 1, user=self._raw.cpl == 3, fetch=True) == b"\xcc":
                    length = 1
            except (GuestFault, Stage2Miss, Unsupported):
                pass
        self._raise(Event(vector, None, rip, software=True, software_start=rip - length))

    def _exception(self, vector: int, rip: int) -> None:
        if vector == _UD:
            found = self._instruction(rip)
            if found is not None:
                if found.name in RING0_ONLY and self._raw.cpl != 0:
                    self._raise(Event(_GP, 0, rip))
                else:
                    self._hypercall(found, rip)
                return
        error = self._raw.d[raw_layout.ERROR_CODE] if vector in ERROR_CODE_VECTORS else None
        cr2 = self._engine.area.exit_info_2 if vector == _PF else None
        self._raise(Event(vector, error, rip, cr2))

    def _cpuid(self, rip: int) -> None:
        length = self.length_at(rip, "cpuid")
        if length is None:
            return
        if "cpuid" in self.protected:
            self._wait(InterceptExit("cpuid", length), rip, length)
            return
        q = self._raw.q
        leaf = self.cpuid(q[raw_layout.RAX] & _MASK32, q[raw_layout.RCX] & _MASK32)
        for word, value in zip(
            (raw_layout.RAX, raw_layout.RBX, raw_layout.RCX, raw_layout.RDX), leaf, strict=True
        ):
            q[word] = value
        self._raw.end_instruction(rip + length)

    def _msr(self, rip: int, is_write: bool) -> None:
        raw, msrs = self._raw, self._engine.msrs
        index = raw.q[raw_layout.RCX] & _MASK32
        value = (raw.q[raw_layout.RDX] & _MASK32) << 32 | raw.q[raw_layout.RAX] & _MASK32
        name = "wrmsr" if is_write else "rdmsr"
        length = self.length_at(rip, name)
        if length is None:
            return
        if index not in msrs and name in self.protected:
            self._wait(InterceptExit(name, length), rip, length)
            return
        if index not in msrs:
            self._wait(MsrExit(index, is_write, value if is_write else 0), rip, length)
            return
        if is_write:
            try:
                msrs.write(index, value)
            except GuestFault as fault:
                self.raise_fault(fault)
                return
        else:
            self._put_edx_eax(msrs.read(index))
        raw.end_instruction(rip + length)

    def _put_edx_eax(self, value: int) -> None:
        self._raw.q[raw_layout.RAX] = value & _MASK32
        self._raw.q[raw_layout.RDX] = value >> 32 & _MASK32

    def port_access(self, rip: int, port: int, size: int) -> CpuExit | None:
        """Between runs: the instruction at ``rip`` is IN or OUT; an exit if it is protected."""
        found = self._instruction(rip) if self.protected else None
        if found is None or not {found.name, found.name.removesuffix("s")} & self.protected:
            return None
        is_write = found.name.startswith("out")
        exit_ = InterceptExit(found.name, found.length, port, size, is_write)
        self._wait_for(exit_, rip, found.length)
        return exit_

    def repeated_input(self, rip: int) -> Instruction | None:
        """Between runs: the instruction at ``rip`` if it is a repeated INS."""
        found = self._instruction(rip)
        return found if found is not None and found.repeated and found.name == "ins" else None

    def _hypercall(self, found: Instruction, rip: int) -> None:
        if found.name in self.protected:
            self._wait(InterceptExit(found.name, found.length), rip, found.length)
            return
        q = self._raw.q
        args = (q[raw_layout.RBX], q[raw_layout.RCX], q[raw_layout.RDX], q[raw_layout.RSI])
        self._wait(HypercallExit(q[raw_layout.RAX], args, found.name), rip, found.length)

    # -- completion -----------------------------------------------------------------------------

    def _wait_for(
        self, exit_: HypercallExit | InterceptExit | MsrExit, rip: int, length: int
    ) -> None:
        self.waiting = exit_
        self._answered = False
        self._result = None
        self._from, self._to = rip, rip + length

    def _wait(self, exit_: HypercallExit | InterceptExit | MsrExit, rip: int, length: int) -> None:
        self._wait_for(exit_, rip, length)
        self.leave(exit_)

    @property
    def unanswered(self) -> MsrExit | None:
        """An RDMSR that nobody completed."""
        waiting = self.waiting
        if isinstance(waiting, MsrExit) and not waiting.is_write and not self._answered:
            return waiting
        return None

    def complete(self, data: bytes | int | None) -> None:
        """The answer to `waiting`."""
        if self.waiting is None:
            raise CpuStateError("complete: no exit waits for an answer")
        if isinstance(self.waiting, InterceptExit):
            raise CpuStateError(f"complete: {self.waiting} takes registers (set_regs), no answer")
        if isinstance(data, bytes):
            data = int.from_bytes(data, "little")
        if self.unanswered is not None and data is None:
            raise CpuStateError(f"complete: {self.waiting} needs a value")
        self._result = data
        self._answered = True

    def cancel(self) -> None:
        """`waiting` is no more: its instruction faults, or is met again."""
        self.waiting = None

    def finish_instruction(self) -> None:
        """Before the guest runs again: end the instruction of `waiting`."""
        waiting, self.waiting = self.waiting, None
        if waiting is None:
            return
        if self._result is not None:
            if isinstance(waiting, MsrExit):
                self._put_edx_eax(self._result & _MASK64)
            else:
                self._raw.q[raw_layout.RAX] = self._result & _MASK64
        # the user may have set RIP itself
        if self._raw.q[raw_layout.RIP] == self._from:
            self._raw.end_instruction(self._to)
