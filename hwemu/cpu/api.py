# SPDX-License-Identifier: GPL-2.0-or-later
"""What a user of a vCPU engine sees: registers, exits and the `Cpu` protocol.

An engine runs guest code until something needs its user and then returns one exit value. Unless
an exit says otherwise nothing of the instruction that caused it has been executed, so that a
later `Cpu.run` executes it again.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from hwemu.cpu.cpuid import Lookup
    from hwemu.cpu.fpu import Fpu


class Access(enum.IntFlag):
    """What the guest tried to do with a page."""

    READ = 1
    WRITE = 2
    EXEC = 4


OnFault: TypeAlias = Callable[[int, Access], bool]
"""Called inside the engine with (gpa, access): True = the leaf is there now, try again."""


# -- exits --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage2Fault:
    """No second-stage leaf for ``gpa`` that allows ``access``; RIP is at the instruction.

    The guest's own page-table walks are WRITEs to the second stage (AMD APM vol. 2, 15.25.6).
    """

    gpa: int
    access: Access


@dataclass(frozen=True, slots=True)
class IoExit:
    """Port I/O of ``size`` bytes. A write has been executed; a read needs `Cpu.complete`.

    A repeated string input asks for ``count`` elements at once and is answered with all of them;
    of them, too, nothing has been executed.
    """

    port: int
    size: int
    is_write: bool
    data: bytes = b""
    count: int = 1


@dataclass(frozen=True, slots=True)
class MmioExit:
    """Memory-mapped I/O. A write has been executed; a read needs `Cpu.complete` and nothing of
    its instruction has been executed.

    ``gpa`` and ``size`` (1…8) are the access's own, aligned or not. One that crosses a page
    boundary is two, and one of 16 bytes two of 8, as KVM's emulator splits them.
    """

    gpa: int
    size: int
    is_write: bool
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class HltExit:
    """HLT was executed: wait for an interrupt."""


@dataclass(frozen=True, slots=True)
class HypercallExit:
    """A call to the host: ``instruction`` is its mnemonic, ``nr`` RAX, ``args`` RBX RCX RDX RSI.

    RIP is at the instruction; the next `Cpu.run` goes on behind it. `Cpu.complete` sets RAX;
    `Cpu.inject` of an exception (vector below 32) makes the instruction fault instead.
    """

    nr: int
    args: tuple[int, int, int, int]
    instruction: str


@dataclass(frozen=True, slots=True)
class InterceptExit:
    """An instruction that is not the guest's own to execute (`Cpu.protect`); RIP is at it.

    ``instruction`` is its mnemonic, ``length`` its bytes. Nothing of it has been executed: the user
    sets the registers that it would have changed. The next `Cpu.run` goes on behind it, unless RIP
    was set; `Cpu.inject` of an exception makes it fault instead. The last three tell of IN, OUT,
    INS and OUTS (``size`` in bytes).
    """

    instruction: str
    length: int
    port: int = 0
    size: int = 0
    is_write: bool = False


@dataclass(frozen=True, slots=True)
class MsrExit:
    """RDMSR or WRMSR of a register the engine does not keep.

    RIP is at the instruction. A read needs `Cpu.complete`; a write is taken as done by the next
    `Cpu.run`. `Cpu.inject` (13, 0) makes either fault instead.
    """

    index: int
    is_write: bool
    value: int = 0


@dataclass(frozen=True, slots=True)
class ShutdownExit:
    """Triple fault: the vCPU cannot go on until its registers are set again."""

    reason: str


@dataclass(frozen=True, slots=True)
class KickExit:
    """`Cpu.kick` was called; the guest is between two instructions."""


@dataclass(frozen=True, slots=True)
class CpuError:
    """The engine cannot emulate what the guest did; RIP is at the instruction.

    ``delivery``: it was delivering an event, which met a device there.
    """

    reason: str
    delivery: Stage2Fault | None = None


CpuExit: TypeAlias = (
    Stage2Fault
    | IoExit
    | MmioExit
    | HltExit
    | HypercallExit
    | InterceptExit
    | MsrExit
    | ShutdownExit
    | KickExit
    | CpuError
)


class CpuStateError(Exception):
    """A call that does not fit the vCPU's state, e.g. run() while a read waits for its data."""


# -- registers ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Regs:
    """General registers; all 64 bits wide, unsigned."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register with its hidden part.

    ``attributes`` as in a VMCB (AMD APM vol. 2, 15.5.1): descriptor bits 40–47 in bits 0–7,
    bits 52–55 in bits 8–11.
    """

    selector: int = 0
    base: int = 0
    limit: int = 0
    attributes: int = 0


@dataclass(frozen=True, slots=True)
class DescriptorTable:
    """GDTR or IDTR."""

    base: int = 0
    limit: int = 0


CODE64 = 0xA9B
CODE32 = 0xC9B
DATA = 0xC93
TSS64_BUSY = 0x08B
LDT_PRESENT = 0x082

CR0_PE, CR0_MP, CR0_ET, CR0_NE = 1 << 0, 1 << 1, 1 << 4, 1 << 5
CR0_WP, CR0_PG = 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT = 1 << 4, 1 << 5, 1 << 9, 1 << 10
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1 << 0, 1 << 8, 1 << 10, 1 << 11


@dataclass(frozen=True, slots=True)
class Sregs:
    """Segments, descriptor tables and control registers (KVM's kvm_sregs)."""

    cs: Segment = Segment(0xF000, 0xFFFF0000, 0xFFFF, 0x09B)
    ds: Segment = Segment(0, 0, 0xFFFF, 0x093)
    es: Segment = Segment(0, 0, 0xFFFF, 0x093)
    fs: Segment = Segment(0, 0, 0xFFFF, 0x093)
    gs: Segment = Segment(0, 0, 0xFFFF, 0x093)
    ss: Segment = Segment(0, 0, 0xFFFF, 0x093)
    tr: Segment = Segment(0, 0, 0xFFFF, TSS64_BUSY)
    ldt: Segment = Segment(0, 0, 0xFFFF, LDT_PRESENT)
    gdt: DescriptorTable = DescriptorTable()
    idt: DescriptorTable = DescriptorTable()
    cr0: int = CR0_ET
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0

    @classmethod
    def long_mode(
        cls,
        cr3: int,
        *,
        gdt: DescriptorTable = DescriptorTable(),
        idt: DescriptorTable = DescriptorTable(),
        tr: Segment = Segment(0, 0, 0xFFFF, TSS64_BUSY),
        user: bool = False,
    ) -> Sregs:
        """64-bit mode with paging through ``cr3``; flat segments 0x08 (code) and 0x10 (data).

        ``user``: ring 3 with selectors 0x2b and 0x23, which is where SYSRET goes when
        STAR[63:48] is 0x1b.
        """
        dpl = 3 << 5 if user else 0
        code, data = (0x2B, 0x23) if user else (0x08, 0x10)
        flat = Segment(data, 0, 0xFFFF_FFFF, DATA | dpl)
        return cls(
            cs=Segment(code, 0, 0xFFFF_FFFF, CODE64 | dpl),
            ds=flat,
            es=flat,
            fs=flat,
            gs=flat,
            ss=flat,
            tr=tr,
            gdt=gdt,
            idt=idt,
            cr0=CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG,
            cr3=cr3,
            cr4=CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT,
            efer=EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE,
        )


# -- the protocol -------------------------------------------------------------------------------


class Cpu(Protocol):
    """One vCPU. Everything except `kick` belongs to one thread at a time.

    Guest memory is touched inside `run` and `run_mmio` only, so "in guest code" for a shootdown
    means exactly "inside one of these two calls".
    """

    @property
    def interruptible(self) -> bool:
        """True when an external interrupt may be injected: IF=1, no shadow, no event waiting."""
        ...

    @property
    def unfinished(self) -> bool:
        """True when what a device answered is not in the guest yet, or not all: see `settle`."""
        ...

    def run(self) -> CpuExit:
        """Run guest code until an exit. Raises what `on_fault` raised, or `CpuStateError`."""
        ...

    def run_mmio(self, gpa: int) -> CpuExit:
        """Go on after `Stage2Fault(gpa)` with the page of ``gpa`` taken as a device.

        Executes that one instruction; every access to the page becomes an `MmioExit`. After a
        read, `complete` and `run` go on with the same instruction.
        """
        ...

    def settle(self) -> CpuExit:
        """Finish the instruction of the last exit, whose answer was given, and run no other.

        `KickExit` when it is finished, at once if there is none; another exit that it causes
        comes first. Touches guest memory, as `run` does.
        """
        ...

    def kick(self) -> None:
        """From any thread: `run` returns soon. Never lost: between runs, the next one returns
        `KickExit` at once. One `KickExit` answers all kicks before it; no other exit does.
        """
        ...

    def flush(self, zapped: Iterable[tuple[int, int]] | None = None) -> None:
        """Forget every cached translation, and translated code.

        ``zapped`` names every (gpa, npages) range that was zapped since the last flush: only if
        code of these pages was translated is the translated code dropped. None: drop it.
        """
        ...

    def get_regs(self) -> Regs:
        """General registers now."""
        ...

    def set_regs(self, regs: Regs) -> None:
        """Set the general registers."""
        ...

    def get_sregs(self) -> Sregs:
        """Segments and control registers now."""
        ...

    def set_sregs(self, sregs: Sregs) -> None:
        """Set segments and control registers."""
        ...

    def watch_code(self) -> None:
        """From now on keep track of what translated code was made of, for `recheck_code`."""
        ...

    def recheck_code(self) -> None:
        """The host may have stored to guest memory: the next `run` forgets what it translated of
        pages that changed. Only a bounded number of pages is looked at.
        """
        ...

    def get_fpu(self) -> Fpu:
        """Registers of x87 and SSE now."""
        ...

    def set_fpu(self, fpu: Fpu) -> None:
        """Set the registers of x87 and SSE."""
        ...

    def get_msr(self, index: int) -> int | None:
        """Value of a model-specific register that the engine keeps; None: it does not."""
        ...

    def set_msr(self, index: int, value: int) -> bool:
        """Set such a register; False if it is not kept here or the processor refuses the value."""
        ...

    def protect(self, instructions: Collection[str]) -> None:
        """Make each of these instructions an `InterceptExit` from now on.

        Mnemonics of `hwemu.cpu.decode`; ``in`` and ``out`` mean the string forms as well. RDMSR and
        WRMSR of registers that the engine keeps stay the guest's own.
        """
        ...

    def set_cpuid(self, lookup: Lookup) -> None:
        """Answer CPUID with ``lookup`` from now on."""
        ...

    def inject(self, vector: int, error_code: int | None = None) -> None:
        """Deliver an event through the guest's IDT before the next instruction.

        A vector below 32 (except 2) is an exception of the instruction at RIP and cancels a
        hypercall or MSR access that waits for completion.
        """
        ...

    def repeat(self) -> None:
        """The instruction of the last `InterceptExit` is to be met again by the next `run`."""
        ...

    def complete(self, data: bytes | int | None = None) -> None:
        """Answer the last exit: the data read, or the result of a hypercall (RAX)."""
        ...

    def close(self) -> None:
        """Free the engine. Idempotent; `kick` afterwards does nothing."""
        ...
