# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a vCPU meets devices: ports, device pages, and the attempts at one instruction.

Unicorn calls its port hooks in the middle of a block of translated code and cannot stop there, so
everything behind the instruction would run before the exit. The bay makes the rest of the block
void instead: the state at the instruction is kept, the second stage is emptied so that no memory
can be reached, and afterwards the instruction is run alone (`hwemu.cpu.device`).
"""

from __future__ import annotations

from collections import deque

from hwemu.cpu import rawcontext as raw_layout
from hwemu.cpu.api import CpuError, CpuExit, IoExit, Stage2Fault
from hwemu.cpu.delivery import Event
from hwemu.cpu.device import DeviceAccess, DeviceExit, read_ahead
from hwemu.cpu.engine import DEVICE_HPA, Engine
from hwemu.cpu.guestmemory import GuestFault, GuestMemory, Stage2Miss
from hwemu.cpu.intercept import Intercepts
from hwemu.cpu.syscall import port_allowed

_GP = 13


class DeviceBay:
    """Device accesses of one vCPU.

    ``device`` is the instruction in progress; ``outbox`` its writes that were not reported yet;
    ``stepping`` is set during an attempt, ``void`` from an unanswered access to the end of it.
    """

    def __init__(
        self, engine: Engine, memory: GuestMemory, intercepts: Intercepts, root_hpa: int
    ) -> None:
        self._engine = engine
        self._raw = engine.raw
        self._memory = memory
        self._intercepts = intercepts
        self._root_hpa = root_hpa
        self.device: DeviceAccess | None = None
        self.outbox: deque[DeviceExit] = deque()
        self.stepping = self.void = self.again = False
        self._port = (0, 0)
        self._saved = b""

    # -- inside the engine ----------------------------------------------------------------------

    def port_read(self, port: int, size: int) -> int:
        """Hook: IN or INS."""
        if self.stepping and self.device is not None:
            return self._known(self.device.read_port(port, size))
        self._meet_port(port, size)
        return 0

    def port_write(self, port: int, size: int, value: int) -> None:
        """Hook: OUT or OUTS."""
        if self.stepping and self.device is not None:
            self.device.write_port(port, size, value)
        else:
            self._meet_port(port, size)

    def memory_read(self, offset: int, size: int) -> int:
        """Hook: a load from the device window."""
        device = self.device
        if device is None:
            return 0
        gpa = device.pages[offset >> 12] | offset & 0xFFF
        return self._known(device.read_memory(gpa, size))

    def memory_load(self, address: int, size: int) -> None:
        """Hook: the instruction of an attempt loads from ``address``, of a device or of memory."""
        if self.device is not None:
            self.device.begin_load(address & 0xFFF, size)

    def memory_write(self, offset: int, size: int, value: int) -> None:
        """Hook: a store to the device window."""
        if self.device is not None:
            gpa = self.device.pages[offset >> 12] | offset & 0xFFF
            self.device.write_memory(gpa, size, value)

    def _known(self, value: int | None) -> int:
        if value is None:
            self._void_rest()
            return 0
        return value

    def _meet_port(self, port: int, size: int) -> None:
        if not self.void:
            self._port = (port, size)
            self._saved = self._raw.snapshot()
            self._void_rest()

    def _void_rest(self) -> None:
        """Nothing from here to the end of the block counts: it will be rolled back."""
        if not self.void:
            self.void = True
            self._engine.use_root(self._engine.tables.empty_root_hpa)
            self._engine.stop()

    # -- between runs ---------------------------------------------------------------------------

    def begin_port_access(self) -> CpuExit | None:
        """The block met IN or OUT: back to that instruction, to run it alone."""
        raw = self._raw
        self.void = False
        raw.restore(self._saved)
        raw.keep_rflags(self._engine.rflags())  # it was saved in a hook
        self._intercepts.look()
        rip = raw.q[raw_layout.RIP]
        try:
            if port_allowed(raw, self._memory, self._engine.rflags(), *self._port):
                protected = self._intercepts.port_access(rip, *self._port)
                if protected is not None:
                    return protected
                self.device = DeviceAccess(rip)
            else:
                self._intercepts.event = Event(_GP, 0, rip)
        except GuestFault as fault:
            self._intercepts.event = Event(fault.vector, fault.error_code, rip, fault.cr2)
        except Stage2Miss as miss:
            return Stage2Fault(miss.gpa, miss.access)
        return None

    def _elements(self, size: int) -> int:
        """How many elements the instruction at RIP asks a port for at once; Stage2Miss."""
        raw = self._raw
        found = self._intercepts.repeated_input(raw.q[raw_layout.RIP])
        if found is None:
            return 1
        bits = raw.code_bits
        if found.other_address:
            bits = 16 if bits == 32 else 32
        backwards = bool(self._engine.rflags() & raw_layout.DF_MASK)
        rcx = raw.q[raw_layout.RCX] & (1 << bits) - 1
        return read_ahead(size, rcx, raw.q[raw_layout.RDI], backwards=backwards)

    def add_page(self, gpa: int) -> bool:
        """The instruction at RIP takes the page of ``gpa`` as a device; False: too many pages."""
        rip = self._raw.q[raw_layout.RIP]
        if self.device is None or self.device.rip != rip:
            self.device = DeviceAccess(rip)
        if self.device.add_page(gpa):
            return True
        self.device = None
        return False

    def _ask(self, device: DeviceAccess) -> CpuExit | None:
        """What the attempt that was rolled back asks; a fault if that cannot be seen now."""
        if isinstance(device.unanswered, IoExit):
            try:
                device.ask_for(self._elements(device.unanswered.size))
            except Stage2Miss as miss:  # its code was zapped since it was fetched
                device.unanswered = None
                return Stage2Fault(miss.gpa, miss.access)
        return device.unanswered

    def attempt(self) -> CpuExit | None:
        """Try the device instruction once; None: it is done or to be tried again."""
        raw, engine, device = self._raw, self._engine, self.device
        if device is None or raw.q[raw_layout.RIP] != device.rip:
            self.device = None
            return None
        saved = raw.snapshot()
        if device.pages:
            window = {page: DEVICE_HPA + (at << 12) for at, page in enumerate(device.pages)}
            engine.use_root(engine.tables.build(window))
        device.begin_attempt()
        self._intercepts.exit = None
        self.stepping, self.again = True, False
        try:
            text = engine.step(loads=bool(device.pages))
        finally:
            self.stepping = self.void = False
            if device.pages:
                engine.use_root(self._root_hpa)
        exit_ = self._intercepts.exit
        if self.device is None:
            # the instruction raised an exception or was intercepted: not a device access at all
            return exit_
        cut = not engine.stepped and text is None and exit_ is None
        if device.unanswered or self.again or cut or isinstance(exit_, Stage2Fault):
            raw.restore(saved)
            engine.flush_tlb()
            # what was asked behind a fault may be another instruction's
            return exit_ if self.again or cut else self._ask(device) or exit_
        self.outbox.extend(device.writes())
        if device.done():
            self.device = None
        return exit_ if text is None else CpuError(text)
