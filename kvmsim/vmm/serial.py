# SPDX-License-Identifier: GPL-2.0-or-later
"""A 16550 UART without I/O: register reads and writes in, bytes out.

Registers and bits: National Semiconductor PC16550D data sheet, section 8; names as in
include/uapi/linux/serial_reg.h. The line is infinitely fast, so the transmitter is always empty;
input beyond the 16 bytes of the FIFO waits outside it and never overruns.
"""

from __future__ import annotations

from collections import deque
from typing import Final

REGISTERS: Final = 8
RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(REGISTERS)

IER_RDI: Final = 0x01
IER_THRI: Final = 0x02
IIR_NO_INT: Final = 0x01
IIR_THRI: Final = 0x02
IIR_RDI: Final = 0x04
IIR_FIFO_ENABLED: Final = 0xC0
FCR_ENABLE: Final = 0x01
FCR_CLEAR_RCVR: Final = 0x02
LCR_DLAB: Final = 0x80
LSR_DR: Final = 0x01
LSR_THRE: Final = 0x20
LSR_TEMT: Final = 0x40
MSR_CTS_DSR_DCD: Final = 0xB0


class Serial16550:
    """One UART. ``offset`` is 0…7 from its base port; values are bytes 0…255."""

    __slots__ = ("_divisor", "_fcr", "_ier", "_input", "_lcr", "_mcr", "_scr", "_thr_event")

    def __init__(self) -> None:
        self._input: deque[int] = deque()
        self._ier = 0
        self._fcr = 0
        self._lcr = 0
        self._mcr = 0
        self._scr = 0
        self._divisor = [12, 0]  # 9600 baud
        self._thr_event = False

    def feed(self, data: bytes) -> None:
        """Bytes arrive on the line."""
        self._input.extend(data)

    @property
    def pending_input(self) -> int:
        """Bytes that the guest has not read yet."""
        return len(self._input)

    @property
    def interrupt(self) -> bool:
        """The level of the interrupt line."""
        received = bool(self._ier & IER_RDI) and bool(self._input)
        return received or (bool(self._ier & IER_THRI) and self._thr_event)

    @property
    def wakes_on_input(self) -> bool:
        """Whether arriving bytes assert the interrupt line."""
        return bool(self._ier & IER_RDI)

    def read(self, offset: int) -> int:
        """Read a register, with its side effects."""
        if self._lcr & LCR_DLAB and offset in (RBR_THR, IER):
            return self._divisor[offset]
        match offset:
            case 0:
                return self._input.popleft() if self._input else 0
            case 1:
                return self._ier
            case 2:
                return self._identify()
            case 3:
                return self._lcr
            case 4:
                return self._mcr
            case 5:
                return LSR_THRE | LSR_TEMT | (LSR_DR if self._input else 0)
            case 6:
                return MSR_CTS_DSR_DCD
            case 7:
                return self._scr
        raise ValueError(f"16550 has no register {offset}")

    def write(self, offset: int, value: int) -> bytes:
        """Write a register; what the UART transmits because of it."""
        if self._lcr & LCR_DLAB and offset in (RBR_THR, IER):
            self._divisor[offset] = value
            return b""
        match offset:
            case 0:
                self._thr_event = True
                return bytes((value,))
            case 1:
                if value & IER_THRI and not self._ier & IER_THRI:
                    self._thr_event = True  # the holding register is empty already
                self._ier = value & 0x0F
            case 2:
                self._fcr = value & FCR_ENABLE
                if value & FCR_CLEAR_RCVR:
                    self._input.clear()
            case 3:
                self._lcr = value
            case 4:
                self._mcr = value & 0x1F
            case 5 | 6:
                pass  # read-only here, as in most clones
            case 7:
                self._scr = value
            case _:
                raise ValueError(f"16550 has no register {offset}")
        return b""

    def _identify(self) -> int:
        fifo = IIR_FIFO_ENABLED if self._fcr else 0
        if self._ier & IER_RDI and self._input:
            return fifo | IIR_RDI
        if self._ier & IER_THRI and self._thr_event:
            self._thr_event = False  # reading IIR acknowledges this source
            return fifo | IIR_THRI
        return fifo | IIR_NO_INT
