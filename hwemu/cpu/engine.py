# SPDX-License-Identifier: GPL-2.0-or-later
"""One Unicorn instance in SVM guest mode: entry, stops, flushes, and hooks that cannot leak.

What belongs to Unicorn and nothing else; what an exit means is `SvmCpu`'s business.

Stops. Unicorn looks for a stop after every memory access and resumes at the *current*
instruction: a read-modify-write that has stored runs again. With uc_struct.no_exit_request set it
looks only where a translation block begins, which is between two instructions. Without that byte
(``precise="quanta"``) guest code runs in slices of a fixed number of instructions and is never
stopped from outside.

emu_stop is lost while emu_start is still starting. So a kick is a flag, and `kick` repeats
emu_stop until the engine thread is known to have left generated code or to be in a hook, which
looks at the flag before it returns.

Limit: the translator leaks a temporary for some instructions (PUSHF, MOV from CR, x87, SGDT) and
does not check its table of 512, so some two hundred of them in a row without a branch end the
process. Guests are ours; a hostile one needs a process of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import unicorn as unicorn_package
from unicorn import unicorn_const, x86_const

from hwemu.arena import Arena
from hwemu.cpu import rawcontext as raw_layout
from hwemu.cpu import vmcb
from hwemu.cpu.api import Regs, Sregs
from hwemu.cpu.device import MAX_PAGES, PrivateTables
from hwemu.cpu.fpu import Fpu, read_fpu, write_fpu
from hwemu.cpu.rawcontext import EngineMismatchError
from hwemu.cpu.registers import ORDER
from hwemu.cpu.selfcheck import find_engine_state, host_state

# the binding is not typed
unicorn: Any = unicorn_package

Precise = Literal["exit-request", "quanta"]

AREA_HPA = 1 << 20
DEVICE_HPA = 1 << 21
_MAX_STEP_HOOKS = 1024  # instructions that talk to devices
QUANTUM = 20_000
"""Instructions per slice with precise="quanta"."""

_IDLE, _RUNNING, _STEPPING, _HOOKED = range(4)
_KICK_PAUSE_S = 20e-6


class Handlers(Protocol):
    """What the owner does inside the engine's hooks; none of these may block."""

    def on_interrupt(self, number: int) -> None:
        """An exception, a software interrupt, or 0x100 + SVM exit code."""

    def on_translation(self, address: int, size: int) -> None:
        """Code at a linear address is about to be translated."""

    def on_syscall(self) -> None:
        """SYSCALL; the engine adds 2 to RIP afterwards."""

    def on_port_read(self, port: int, size: int) -> int:
        """IN or INS."""

    def on_port_write(self, port: int, size: int, value: int) -> None:
        """OUT or OUTS."""

    def on_device_read(self, offset: int, size: int) -> int:
        """Load from the device window."""

    def on_load(self, address: int, size: int) -> None:
        """The stepped instruction is about to load ``size`` bytes at host-physical ``address``."""

    def on_device_write(self, offset: int, size: int, value: int) -> None:
        """Store to the device window."""


class Engine:
    """A Uc with the arena, the table pool and a private host area mapped."""

    def __init__(
        self,
        handlers: Handlers,
        arena: Arena,
        pool: object,
        pool_hpa: int,
        root_hpa: int,
        precise: Precise = "exit-request",
    ) -> None:
        self.version = str(unicorn.__version__)
        if self.version != raw_layout.SUPPORTED:
            raise EngineMismatchError(self.version, "another version is installed")
        self._handlers = handlers
        self._precise: Precise = precise
        self._failure: BaseException | None = None
        self._kicked = False
        self._stopping = False
        self._entry_exits: list[int] | None = None
        self._state = _IDLE
        self._lock = threading.Lock()
        self._closed = False
        self._step_hooks: dict[int, int] = {}
        self.stepped = False  #: the last step came as far as its instruction
        self._translations = 0

        self._uc = unicorn.Uc(
            unicorn_const.UC_ARCH_X86, unicorn_const.UC_MODE_64, x86_const.UC_CPU_X86_EPYC
        )
        try:
            self._build(arena, pool, pool_hpa, root_hpa, self.version)
        except BaseException:
            self.close()
            raise

    def _build(
        self, arena: Arena, pool: object, pool_hpa: int, root_hpa: int, version: str
    ) -> None:
        uc = self._uc
        uc.ctl_exits_enabled(True)
        uc.ctl_set_exits([])
        self._area_map = mmap.mmap(-1, vmcb.AREA_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area_view = memoryview(self._area_map)
        self.area = vmcb.HostArea(area_view, AREA_HPA)
        pool_view = memoryview(pool).cast("B")  # type: ignore[arg-type]
        self._pool_view = pool_view
        pool_address = _address_of(pool_view)
        if pool_address % 4096 or pool_hpa % 4096:
            raise ValueError("SvmCpu: the table pool must begin at a page boundary")
        rwx = unicorn_const.UC_PROT_ALL
        uc.mem_map_ptr(AREA_HPA, vmcb.AREA_SIZE, rwx, _address_of(area_view))
        uc.mem_map_ptr(pool_hpa, pool_view.nbytes, rwx, pool_address)
        uc.mem_map_ptr(arena.hpa_base, arena.size, rwx, arena.address)
        uc.mmio_map(DEVICE_HPA, MAX_PAGES * 4096, self._device_read, None, self._device_write, None)
        words = self.area.words
        first = vmcb.PRIVATE_TABLES // 8
        self.tables = PrivateTables(
            words[first:], AREA_HPA + vmcb.PRIVATE_TABLES, pool_view.cast("Q"), pool_hpa, root_hpa
        )
        self.raw, self.msrs = find_engine_state(
            uc, AREA_HPA + vmcb.HOST_SAVE, version, stops_between_blocks=self._precise != "quanta"
        )
        self._host_state = host_state(self.raw)
        uc.hook_add(unicorn_const.UC_HOOK_INTR, self._interrupt)
        uc.hook_add(unicorn_const.UC_HOOK_EDGE_GENERATED, self._translation)
        for instruction, hook in (
            (x86_const.UC_X86_INS_SYSCALL, self._syscall),
            (x86_const.UC_X86_INS_IN, self._port_read),
            (x86_const.UC_X86_INS_OUT, self._port_write),
        ):
            uc.hook_add(unicorn_const.UC_HOOK_INSN, hook, None, 1, 0, instruction)

    # -- hooks ----------------------------------------------------------------------------------

    def _hooked(self, handler: Callable[..., Any], *arguments: int) -> Any:
        """Run a handler as a hook: an exception stops the engine and comes out of `start`."""
        before, self._state = self._state, _HOOKED
        try:
            return handler(*arguments)
        except BaseException as error:
            if self._failure is None:
                self._failure = error
            self._stopping = True
            return 0
        finally:
            # in this order: a kick that saw a hook counts on this look at its flag
            self._state = before
            if self._stopping or (self._kicked and before == _RUNNING):
                self._uc.emu_stop()

    def _interrupt(self, _uc: object, number: int, _data: object) -> None:
        if self._entry_exits is not None:
            self._entry_exits.append(number)
            self._uc.emu_stop()
            return
        self._hooked(self._handlers.on_interrupt, number)

    def _translation(self, _uc: object, block: Any, _before: object, _data: object) -> None:
        self._translations += 1
        if self._entry_exits is None:
            self._hooked(self._handlers.on_translation, block.pc, block.size)

    def _syscall(self, _uc: object, _data: object) -> None:
        self._hooked(self._handlers.on_syscall)

    def _port_read(self, _uc: object, port: int, size: int, _data: object) -> Any:
        return self._hooked(self._handlers.on_port_read, port, size)

    def _port_write(self, _uc: object, port: int, size: int, value: int, _data: object) -> None:
        self._hooked(self._handlers.on_port_write, port, size, value)

    def _device_read(self, _uc: object, offset: int, size: int, _data: object) -> Any:
        return self._hooked(self._handlers.on_device_read, offset, size)

    def _memory_load(
        self, _uc: object, _kind: int, address: int, size: int, _value: int, _data: object
    ) -> None:
        self._hooked(self._handlers.on_load, address, size)

    def _device_write(self, _uc: object, offset: int, size: int, value: int, _data: object) -> None:
        self._hooked(self._handlers.on_device_write, offset, size, value)

    # -- running --------------------------------------------------------------------------------

    def load(self, regs: Regs, sregs: Sregs, nested_cr3: int) -> None:
        """Make the next `start` enter the guest with this state, by VMLOAD and VMRUN.

        So the processor itself derives all its hidden state from it.
        """
        self.area.fill(regs, sregs, self.msrs.vmload(), nested_cr3)
        raw = self.raw
        raw.bytes[: len(self._host_state)] = self._host_state
        raw.q[raw_layout.RIP] = AREA_HPA + vmcb.STUB
        for word, name in enumerate(ORDER):
            raw.q[word] = getattr(regs, name)
        raw.q[raw_layout.RAX] = self.area.vmcb_hpa
        self.flush()

    def enter(self, regs: Regs, sregs: Sregs, root_hpa: int) -> str | None:
        """Bring the guest into this state with nothing executed; an error as text.

        Enters with an empty second stage: the first fetch faults and the processor is in guest
        state at the first instruction. Then the real root takes its place.
        """
        self.load(regs, sregs, self.tables.empty_root_hpa)
        self._entry_exits = []
        try:
            text = self._emulate(_STEPPING, 0 if self._precise == "exit-request" else QUANTUM)
        finally:
            exits, self._entry_exits = self._entry_exits, None
        if text is None and exits != [vmcb.VMEXIT + vmcb.EXIT_NPF]:
            text = f"exits {exits}"
        if text is None and not self.raw.in_guest:
            text = "VMRUN did not enter the guest"
        if text is None:
            self.use_root(root_hpa)
        return text

    def prove_entry(self) -> None:
        """Enter an empty guest and look at every field that has a known value then.

        Twice: the very first block of an engine has none before it and is not reported.
        """
        cr3 = 0x1234_5000
        for _ in range(2):
            text = self.enter(Regs(), Sregs.long_mode(cr3), self.tables.empty_root_hpa)
        if text is None and self.area.exit_info_2 != cr3:
            text = f"the faulting address reads {self.area.exit_info_2:#x}, not {cr3:#x}"
        if text is None and not self._translations:
            text = "it does not say what it translates"
        if text is not None:
            raise EngineMismatchError(self.version, f"entry into an empty guest: {text}")
        self.raw.check(self.version, self.area.vmcb_hpa)

    def start(self) -> str | None:
        """Run until a hook called `stop`, a kick, or the end of a slice; an engine error as text.

        Raises what a hook raised.
        """
        count = 0 if self._precise == "exit-request" else QUANTUM
        return self._emulate(_RUNNING, count)

    def step(self, *, loads: bool = False) -> str | None:
        """Run one instruction (one iteration of a repeated one); kicks wait until it is done.

        ``loads``: say where it loads from, before the load. Not for longer than an instruction:
        while such a hook is there, every access of translated code takes the slow way.
        """
        if not loads:
            return self._step()
        hook = self._uc.hook_add(unicorn_const.UC_HOOK_MEM_READ, self._memory_load)
        try:
            return self._step()
        finally:
            self._uc.hook_del(hook)

    def _step(self) -> str | None:
        raw = self.raw
        rip = raw.linear(int(raw.q[raw_layout.RIP]))  # hooks are by linear address
        self.stepped = self._precise == "quanta"
        if self.stepped:
            return self._emulate(_STEPPING, 1)
        self._hook_step(rip)
        raw.run_one_instruction_next()
        try:
            return self._emulate(_STEPPING, 0)
        finally:
            raw.forget_single_instruction()

    def _hook_step(self, rip: int) -> None:
        """Have `_stepped` called at ``rip``, from now on.

        Translated code calls a hook by address, also after the hook is deleted: so it stays, and
        is deleted only with all translated code.
        """
        if rip in self._step_hooks:
            return
        if len(self._step_hooks) == _MAX_STEP_HOOKS:
            self.flush()
            for hook in self._step_hooks.values():
                self._uc.hook_del(hook)
            self._step_hooks.clear()
        self._step_hooks[rip] = self._uc.hook_add(
            unicorn_const.UC_HOOK_CODE, self._stepped, None, rip, rip
        )

    def _stepped(self, _uc: object, _address: int, _size: int, _data: object) -> None:
        if self._state == _STEPPING:
            # the block holds this one instruction: the stop is seen behind it
            self.stepped = True
            self._uc.emu_stop()

    def _emulate(self, state: int, count: int) -> str | None:
        self._stopping = False
        # Under the lock that a kick holds from its look at the state to the end of emu_stop: one
        # that was meant for the last run must not cut this one short, which may be a single step.
        with self._lock:
            self._state = state
        try:
            # behind the line above: a kick before it is seen here, one after it calls emu_stop
            if self._kicked and state == _RUNNING:
                return None
            self._uc.emu_start(self.raw.q[raw_layout.RIP], 0, 0, count)
        except unicorn.UcError as error:
            if self._failure is None:
                return f"{error} at RIP {self.raw.q[raw_layout.RIP]:#x}"
        finally:
            self._state = _IDLE
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return None

    def stop(self) -> None:
        """From a hook: leave the engine when the hook returns."""
        self._stopping = True

    def kick(self) -> None:
        """From any thread: make `start` return soon."""
        self._kicked = True
        if self._precise == "quanta":
            return
        while True:
            with self._lock:
                if self._closed or self._state != _RUNNING or not self._kicked:
                    return
                self._uc.emu_stop()
            time.sleep(_KICK_PAUSE_S)

    @property
    def kicked(self) -> bool:
        """A kick waits to be answered."""
        return self._kicked

    def take_kick(self) -> None:
        """All kicks so far are answered."""
        self._kicked = False

    # -- translations ---------------------------------------------------------------------------

    def flush_tlb(self) -> None:
        """Forget cached translations."""
        self._uc.ctl(unicorn_const.UC_CTL_TLB_FLUSH, unicorn_const.UC_CTL_IO_WRITE)

    def flush(self) -> None:
        """Forget cached translations and translated code, which outlives its page otherwise."""
        self._uc.ctl_flush_tb()
        self.flush_tlb()

    def use_root(self, root_hpa: int) -> None:
        """Walk from another root, with nothing cached."""
        self.raw.q[raw_layout.NESTED_CR3] = root_hpa
        self.flush_tlb()

    def read_fpu(self) -> Fpu:
        """x87 and SSE registers."""
        return read_fpu(self._uc)

    def write_fpu(self, fpu: Fpu) -> None:
        """Set the x87 and SSE registers."""
        write_fpu(self._uc, fpu)

    def rflags(self) -> int:
        """RFLAGS, computed from where the engine keeps its parts."""
        return int(self._uc.reg_read(x86_const.UC_X86_REG_RFLAGS))

    def close(self) -> None:
        """Free the engine; kicks from then on do nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for view in ("raw", "tables"):
            if hasattr(self, view):
                getattr(self, view).release()
        # frees the engine now instead of at a garbage collection: it points into our memory
        self._uc._Uc__finalizer()
        if hasattr(self, "area"):
            self.area.words.release()
            self._pool_view.release()


def _address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
