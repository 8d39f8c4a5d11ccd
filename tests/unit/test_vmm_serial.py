# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest

from kvmsim.vmm.serial import (
    FCR_CLEAR_RCVR,
    FCR_ENABLE,
    IER,
    IER_RDI,
    IER_THRI,
    IIR_FCR,
    IIR_FIFO_ENABLED,
    IIR_NO_INT,
    IIR_RDI,
    IIR_THRI,
    LCR,
    LCR_DLAB,
    LSR,
    LSR_DR,
    LSR_TEMT,
    LSR_THRE,
    MCR,
    MSR,
    RBR_THR,
    SCR,
    Serial16550,
)


def test_transmits_and_is_always_ready() -> None:
    port = Serial16550()
    assert port.write(RBR_THR, 0x41) == b"A"
    assert port.read(LSR) == LSR_THRE | LSR_TEMT


def test_receives_in_order_and_says_when_there_is_more() -> None:
    port = Serial16550()
    port.feed(b"ab")
    assert port.read(LSR) & LSR_DR
    assert port.read(RBR_THR) == ord("a")
    assert port.pending_input == 1
    assert port.read(LSR) & LSR_DR
    assert port.read(RBR_THR) == ord("b")
    assert not port.read(LSR) & LSR_DR
    assert port.read(RBR_THR) == 0


def test_more_than_a_fifo_of_input_is_not_lost() -> None:
    port = Serial16550()
    port.feed(bytes(range(200)))
    assert bytes(port.read(RBR_THR) for _ in range(200)) == bytes(range(200))


def test_interrupt_line_follows_input_only_if_enabled() -> None:
    port = Serial16550()
    port.feed(b"x")
    assert not port.interrupt
    assert not port.wakes_on_input
    port.write(IER, IER_RDI)
    assert port.interrupt
    assert port.wakes_on_input
    assert port.read(IIR_FCR) == IIR_RDI
    port.read(RBR_THR)
    assert not port.interrupt
    assert port.read(IIR_FCR) == IIR_NO_INT


def test_transmitter_interrupt_is_acknowledged_by_reading_iir() -> None:
    port = Serial16550()
    port.write(IER, IER_THRI)
    assert port.interrupt
    assert port.read(IIR_FCR) == IIR_THRI
    assert not port.interrupt
    port.write(RBR_THR, 0)
    assert port.read(IIR_FCR) == IIR_THRI
    assert port.read(IIR_FCR) == IIR_NO_INT


def test_received_data_comes_before_the_transmitter() -> None:
    port = Serial16550()
    port.write(IER, IER_THRI | IER_RDI)
    port.feed(b"x")
    assert port.read(IIR_FCR) == IIR_RDI
    port.read(RBR_THR)
    assert port.read(IIR_FCR) == IIR_THRI


def test_fifo_bits_and_clearing() -> None:
    port = Serial16550()
    port.feed(b"old")
    port.write(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RCVR)
    assert port.pending_input == 0
    assert port.read(IIR_FCR) == IIR_FIFO_ENABLED | IIR_NO_INT


def test_divisor_latch_hides_data_and_interrupt_registers() -> None:
    port = Serial16550()
    port.write(IER, IER_RDI)
    port.write(LCR, LCR_DLAB | 3)
    assert port.write(RBR_THR, 1) == b""
    port.write(IER, 2)
    assert (port.read(RBR_THR), port.read(IER)) == (1, 2)
    port.write(LCR, 3)
    assert port.read(IER) == IER_RDI
    assert port.read(LCR) == 3


def test_plain_registers_keep_their_bits() -> None:
    port = Serial16550()
    for register, written, kept in ((SCR, 0x5A, 0x5A), (MCR, 0xFF, 0x1F), (IER, 0xFF, 0x0F)):
        port.write(register, written)
        assert port.read(register) == kept
    before = (port.read(LSR), port.read(MSR))
    port.write(LSR, 0)
    port.write(MSR, 0)
    assert (port.read(LSR), port.read(MSR)) == before


@pytest.mark.parametrize("offset", [-1, 8])
def test_no_such_register(offset: int) -> None:
    port = Serial16550()
    with pytest.raises(ValueError, match="no register"):
        port.read(offset)
    with pytest.raises(ValueError, match="no register"):
        port.write(offset, 0)
