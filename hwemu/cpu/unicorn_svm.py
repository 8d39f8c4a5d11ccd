# SPDX-License-Identifier: GPL-2.0-or-later
"""`SvmCpu`: a vCPU on Unicorn 2.1.4 as an AMD SVM processor with our nested page table.

Unicorn's QEMU core knows VMRUN and nested paging but not #VMEXIT: an exit appears in UC_HOOK_INTR
as number 0x100 + exit code, still in guest state, at the instruction. Returning from the hook
retries the instruction, so demand faults never leave the engine. What the core gets wrong or
leaves out is put right here and in the files beside it.

One engine per vCPU; `lock` is atomic only because the vCPUs of a VM run one at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from hwemu.arena import Arena
from hwemu.cpu import cpuid, vmcb
from hwemu.cpu import rawcontext as raw_layout
from hwemu.cpu.api import (
    Access,
    CpuError,
    CpuExit,
    CpuStateError,
    KickExit,
    OnFault,
    Regs,
    ShutdownExit,
    Sregs,
    Stage2Fault,
)
from hwemu.cpu.codepages import CodePages
from hwemu.cpu.delivery import ERROR_CODE_VECTORS, Event
from hwemu.cpu.devicebay import DeviceBay
from hwemu.cpu.engine import Engine, Precise
from hwemu.cpu.fpu import Fpu
from hwemu.cpu.guestmemory import GuestFault, GuestMemory, Stage2Miss, Unsupported
from hwemu.cpu.intercept import Intercepts
from hwemu.cpu.msr import IN_SREGS, read_in_sregs, write_in_sregs
from hwemu.cpu.registers import read_regs, read_sregs, write_regs
from hwemu.cpu.syscall import enter_kernel

_NPF = vmcb.VMEXIT + vmcb.EXIT_NPF
_NMI = 2
_IF = 1 << 9
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


class SvmCpu:
    """vCPU ``index`` over ``arena`` and the table ``pool``, which begins at ``pool_hpa``.

    ``root_hpa`` is the nested CR3, inside the pool. ``on_fault(gpa, access)`` is called inside the
    engine and must not block: True = the leaf is there, go on without an exit. ``cpuid_table``
    maps leaves to (EAX, EBX, ECX, EDX). The arena and the pool must outlive the vCPU.
    """

    def __init__(
        self,
        arena: Arena,
        pool: object,
        pool_hpa: int,
        root_hpa: int,
        index: int = 0,
        on_fault: OnFault | None = None,
        *,
        cpuid_table: Mapping[int, cpuid.Leaf] = cpuid.DEFAULT,
        precise: Precise = "exit-request",
    ) -> None:
        self._on_fault = on_fault
        self._root_hpa = root_hpa
        self._closed = False
        # registers that wait for the next entry; None: the engine holds them
        self._regs: Regs | None = Regs()
        self._sregs: Sregs | None = Sregs()
        self._last_fault: Stage2Fault | None = None
        self._recheck = False

        self._engine = Engine(self, arena, pool, pool_hpa, root_hpa, precise)
        self._raw = self._engine.raw
        self._area = self._engine.area
        self._memory = GuestMemory(
            arena.words(),
            arena.hpa_base,
            memoryview(pool).cast("B").cast("Q"),  # type: ignore[arg-type]
            pool_hpa,
            (root_hpa - pool_hpa) >> 12,
            on_fault,
        )
        self._intercepts = Intercepts(self._engine, self._memory, cpuid.fixed(cpuid_table, index))
        self._code = CodePages()
        self._bay = DeviceBay(self._engine, self._memory, self._intercepts, root_hpa)
        self._engine.prove_entry()

    # -- inside the engine ----------------------------------------------------------------------

    def on_interrupt(self, number: int) -> None:
        """Hook: an exit or exception of the guest."""
        if self._bay.void:
            self._engine.stop()
            return
        if number != _NPF:
            if self._bay.stepping:
                # a handler is run like anything else: whole blocks, and kicks stop it
                self._bay.device = None
                self._engine.stop()
            self._intercepts.handle(number)
            return
        gpa = self._area.exit_info_2
        code = self._raw.d[raw_layout.ERROR_CODE]
        if code & vmcb.NPF_FETCH:
            access = Access.EXEC
        else:
            access = Access.WRITE if code & vmcb.NPF_WRITE else Access.READ
        if self._on_fault is not None and self._on_fault(gpa, access):
            if self._bay.stepping:
                # the engine would go on from here with whole blocks, not with one instruction
                self._bay.again = True
                self._engine.stop()
            return
        self._intercepts.leave_fault(gpa, access)

    def on_translation(self, address: int, size: int) -> None:
        """Hook: code of the guest is translated."""
        self._intercepts.look()
        self._code.note(self._code_gpa, address, size)

    def _code_gpa(self, address: int) -> int | None:
        try:
            return self._memory.translate(address, Access.EXEC, self._raw.cpl == 3)
        except (GuestFault, Stage2Miss, Unsupported):
            return None

    def on_syscall(self) -> None:
        """Hook: SYSCALL. The engine adds the instruction's length to RIP when this returns."""
        if self._bay.void:
            return
        raw = self._raw
        rip = raw.q[raw_layout.RIP]
        try:
            length = self._intercepts.length_at(rip, "syscall")
        except Stage2Miss as miss:
            self._intercepts.leave(CpuError(f"SYSCALL at RIP {rip:#x}: {miss}"))
            return
        if length is None:
            return
        try:
            enter_kernel(raw, self._engine.msrs, self._engine.rflags(), length)
        except GuestFault as fault:
            self._intercepts.raise_fault(fault)
        raw.q[raw_layout.RIP] = (raw.q[raw_layout.RIP] - length) & _MASK64

    def on_port_read(self, port: int, size: int) -> int:
        """Hook: IN or INS."""
        return self._bay.port_read(port, size)

    def on_port_write(self, port: int, size: int, value: int) -> None:
        """Hook: OUT or OUTS."""
        self._bay.port_write(port, size, value)

    def on_device_read(self, offset: int, size: int) -> int:
        """Hook: a load from the device window."""
        return self._bay.memory_read(offset, size)

    def on_load(self, address: int, size: int) -> None:
        """Hook: a load of an instruction that is stepped."""
        self._bay.memory_load(address, size)

    def on_device_write(self, offset: int, size: int, value: int) -> None:
        """Hook: a store to the device window."""
        self._bay.memory_write(offset, size, value)

    # -- running --------------------------------------------------------------------------------

    def run(self) -> CpuExit:
        """Run guest code until an exit (see `Cpu.run`)."""
        self._require_answer()
        if self._recheck:
            self._drop_changed_code()
        while True:
            if self._engine.kicked:
                self._engine.take_kick()
                return KickExit()
            if self._bay.outbox:
                return self._bay.outbox.popleft()
            exit_ = self._advance()
            if exit_ is not None:
                self._last_fault = exit_ if isinstance(exit_, Stage2Fault) else None
                return exit_

    def settle(self) -> CpuExit:
        """Finish the instruction that was answered, and no other (see `Cpu.settle`)."""
        self._require_answer()
        while True:
            if self._bay.outbox:
                return self._bay.outbox.popleft()
            text = self._enter_guest()
            if text is not None:
                return CpuError(text)
            self._intercepts.finish_instruction()
            if self._bay.device is None:
                return KickExit()
            exit_ = self._bay.attempt()
            if exit_ is not None:
                self._last_fault = exit_ if isinstance(exit_, Stage2Fault) else None
                return exit_

    def _require_answer(self) -> None:
        if self._closed:
            raise CpuStateError("run: the vCPU is closed")
        asked = self._bay.device.unanswered if self._bay.device else self._intercepts.unanswered
        if asked is not None:
            raise CpuStateError(f"run: complete() must answer {asked} first")

    def _enter_guest(self) -> str | None:
        """Bring the registers that were set into the engine; an error as text."""
        if self._regs is not None and self._sregs is not None:
            text = self._engine.enter(self._regs, self._sregs, self._root_hpa)
            if text is not None:
                return f"the processor refuses this state: {text}"
            self._regs = self._sregs = None
        return None

    def _advance(self) -> CpuExit | None:
        intercepts = self._intercepts
        text = self._enter_guest()
        if text is not None:
            return CpuError(text)
        if intercepts.shutdown:
            return ShutdownExit("triple fault")
        intercepts.finish_instruction()
        if self._bay.device is not None:
            return self._bay.attempt()
        if intercepts.event is not None:
            exit_ = intercepts.deliver()
            if exit_ is not None:
                return exit_
            self._raw.keep_rflags(self._engine.rflags())
        intercepts.exit = None
        text = self._engine.start()
        if self._bay.void:
            return self._bay.begin_port_access()
        return intercepts.exit if text is None else CpuError(text)

    def run_mmio(self, gpa: int) -> CpuExit:
        """Go on after `Stage2Fault(gpa)` with that page as a device (see `Cpu.run_mmio`)."""
        self._require_answer()
        fault = self._last_fault
        if fault is None or fault.gpa >> 12 != gpa >> 12:
            raise CpuStateError(f"run_mmio of gpa {gpa:#x}: the last exit was no fault there")
        self._intercepts.look()
        if self._intercepts.event is not None:
            return CpuError(f"gpa {gpa:#x} is a device: no event can be delivered to it", fault)
        if fault.access & Access.EXEC or self._memory.is_guest_table(gpa):
            return CpuError(f"gpa {gpa:#x} is a device: no code and no page table can be there")
        if not self._bay.add_page(gpa):
            return CpuError(f"one instruction touches three device pages, gpa {gpa:#x} the last")
        return self.run()

    def kick(self) -> None:
        """Make `run` return soon, from any thread (see `Cpu.kick`)."""
        self._engine.kick()

    def flush(self, zapped: Iterable[tuple[int, int]] | None = None) -> None:
        """Forget cached translations, and translated code that a zap took (see `Cpu.flush`)."""
        if zapped is None or self._code.touched_by(zapped):
            self._engine.flush()
            self._code.clear()
        else:
            self._engine.flush_tlb()

    # -- state ----------------------------------------------------------------------------------

    def get_regs(self) -> Regs:
        """General registers now."""
        if self._regs is not None:
            return self._regs
        return read_regs(self._raw, self._engine.rflags())

    def set_regs(self, regs: Regs) -> None:
        """Set the general registers; ends a shutdown."""
        self._intercepts.shutdown = False
        if self._regs is not None:
            self._regs = regs
        else:
            write_regs(self._raw, regs)

    def get_sregs(self) -> Sregs:
        """Segments and control registers now."""
        if self._sregs is not None:
            return self._sregs
        return read_sregs(self._raw, self._engine.msrs.efer)

    def set_sregs(self, sregs: Sregs) -> None:
        """Set segments and control registers; ends a shutdown."""
        self._regs = self.get_regs()
        self._sregs = sregs
        self._intercepts.shutdown = False

    def watch_code(self) -> None:
        """See stores of the host to translated code, when `recheck_code` asks."""
        self._code.watch(self._memory.checksum)

    def recheck_code(self) -> None:
        """The host may have stored to guest memory (see `Cpu.recheck_code`)."""
        self._recheck = True

    def _drop_changed_code(self) -> None:
        self._recheck = False
        if self._code.changed():
            self._engine.flush()
            self._code.clear()

    def get_fpu(self) -> Fpu:
        """Registers of x87 and SSE now."""
        return self._engine.read_fpu()

    def set_fpu(self, fpu: Fpu) -> None:
        """Set the registers of x87 and SSE."""
        self._engine.write_fpu(fpu)

    def get_msr(self, index: int) -> int | None:
        """Value of a model-specific register that the engine keeps; None: it does not."""
        if self._sregs is not None and index in IN_SREGS:
            return read_in_sregs(self._sregs, index)
        return self._engine.msrs.read(index) if index in self._engine.msrs else None

    def set_msr(self, index: int, value: int) -> bool:
        """Set such a register; False if it is not kept here or the processor refuses the value."""
        if index not in self._engine.msrs:
            return False
        try:
            if self._sregs is not None and index in IN_SREGS:
                self._sregs = write_in_sregs(self._sregs, index, value)
            else:
                self._engine.msrs.write(index, value)
        except GuestFault:
            return False
        return True

    def protect(self, instructions: Collection[str]) -> None:
        """Make each of these instructions an `InterceptExit` (see `Cpu.protect`)."""
        self._intercepts.protected = frozenset(instructions)

    def set_cpuid(self, lookup: cpuid.Lookup) -> None:
        """Answer CPUID with ``lookup`` from now on."""
        self._intercepts.cpuid = lookup

    @property
    def interruptible(self) -> bool:
        """True when an external interrupt may be injected now."""
        intercepts = self._intercepts
        if intercepts.event or intercepts.waiting or self._bay.device or intercepts.shutdown:
            return False
        if self._regs is not None:
            return bool(self._regs.rflags & _IF)
        shadow = self._raw.d[raw_layout.HFLAGS] & raw_layout.HF_INHIBIT_IRQ
        return bool(self._raw.q[raw_layout.EFLAGS] & _IF) and not shadow

    @property
    def unfinished(self) -> bool:
        """True when what a device answered is not in the guest yet (see `Cpu.unfinished`)."""
        return self._bay.device is not None and self._bay.device.answered

    def inject(self, vector: int, error_code: int | None = None) -> None:
        """Deliver an event before the next instruction (see `Cpu.inject`)."""
        if not 0 <= vector <= 255:
            raise ValueError(f"inject of vector {vector}: there are 256")
        if self._intercepts.event is not None:
            raise CpuStateError(f"inject of vector {vector}: another event waits; run first")
        external = vector >= 32 or vector == _NMI
        if not external and vector in ERROR_CODE_VECTORS:
            error_code = error_code or 0
        elif error_code is not None:
            raise ValueError(f"inject of vector {vector}: it has no error code")
        if not external:
            self._intercepts.cancel()
        self._intercepts.event = Event(vector, error_code, None, external=external)

    def repeat(self) -> None:
        """Meet the instruction of the last `InterceptExit` again (see `Cpu.repeat`)."""
        self._intercepts.cancel()

    def complete(self, data: bytes | int | None = None) -> None:
        """Answer the last exit (see `Cpu.complete`)."""
        device = self._bay.device
        if device is None or device.unanswered is None:
            self._intercepts.complete(data)
            return
        size = device.asked
        if isinstance(data, int):
            data = data.to_bytes(size, "little")
        if data is None or len(data) != size:
            raise CpuStateError(f"complete: {device.unanswered} needs {size} bytes")
        device.answer(data)

    def close(self) -> None:
        """Free the engine (see `Cpu.close`)."""
        if not self._closed:
            self._closed = True
            self._engine.close()
            self._memory.release()
