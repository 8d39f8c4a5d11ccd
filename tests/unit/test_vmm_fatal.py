# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's last words, out of registers."""

from __future__ import annotations

import struct

from kvmsim.uapi import KVM_SYSTEM_EVENT_SEV_TERM, KVM_SYSTEM_EVENT_TDX_FATAL
from kvmsim.vmm.fatal import gave_up

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 = range(16)
HOLD_TEXT = (R14, R15, RBX, RDI, RSI, R8, R9, RDX)


def registers(text: bytes = b"", **values: int) -> tuple[int, ...]:
    found = [0xDEAD] * 16
    found[R12], found[R13] = values.get("r12", 0), values.get("r13", 0)
    for index, word in zip(HOLD_TEXT, struct.unpack("<8Q", text.ljust(64, b"\0")), strict=True):
        found[index] = word
    return tuple(found)


def test_a_message_of_a_td() -> None:
    said = gave_up(KVM_SYSTEM_EVENT_TDX_FATAL, registers(b"no room for the kernel", r12=7))
    assert said == "TDVMCALL<ReportFatalError> code 0x7: no room for the kernel"
    longest = bytes(range(0x20, 0x60))
    assert gave_up(KVM_SYSTEM_EVENT_TDX_FATAL, registers(longest)).endswith(longest.decode())


def test_what_is_no_text_is_not_shown() -> None:
    said = gave_up(KVM_SYSTEM_EVENT_TDX_FATAL, registers(b"\x1b[2J", r12=1 << 63 | 2, r13=0x5000))
    assert said == "TDVMCALL<ReportFatalError> code 0x2, gpa 0x5000"
    assert gave_up(KVM_SYSTEM_EVENT_TDX_FATAL, registers(b"\xff")).endswith("code 0x0")


def test_a_termination_request() -> None:
    said = gave_up(KVM_SYSTEM_EVENT_SEV_TERM, (0x02_3100,))
    assert said == "termination request, reason set 3, reason 2"


def test_other_events() -> None:
    assert gave_up(99, (1, 0x20)) == "system event 99: 0x1 0x20"
    assert gave_up(KVM_SYSTEM_EVENT_TDX_FATAL, (1,)).endswith(": 0x1")
