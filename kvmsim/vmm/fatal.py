# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest says when it gives up, from the words of a system event.

TDX: KVM hands on all 16 registers of TDVMCALL<ReportFatalError>, in their order of encoding
(Documentation/virt/kvm/api.rst). Intel's GHCI, 3.4: R12 has the error code in bits 31:0 and in bit
63 whether R13 is a gpa; a message of up to 64 bytes is in R14, R15, RBX, RDI, RSI, R8, R9, RDX.
SNP: the word of the GHCB MSR (GHCB specification, 2.3.1, "termination request"): reason set in
bits 15:12, reason in bits 23:16.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from kvmsim.uapi import KVM_SYSTEM_EVENT_SEV_TERM, KVM_SYSTEM_EVENT_TDX_FATAL

_REGISTERS: Final = 16
_R12, _R13 = 12, 13
_MESSAGE: Final = (14, 15, 3, 7, 6, 8, 9, 2)
_GPA_VALID: Final = 1 << 63


def gave_up(event: int, words: Sequence[int]) -> str:
    """A line for a person; of an event that is not known the words as they are."""
    if event == KVM_SYSTEM_EVENT_TDX_FATAL and len(words) == _REGISTERS:
        text = f"TDVMCALL<ReportFatalError> code {words[_R12] & 0xFFFF_FFFF:#x}"
        if words[_R12] & _GPA_VALID:
            text += f", gpa {words[_R13]:#x}"
        message = struct.pack("<8Q", *(words[index] for index in _MESSAGE)).rstrip(b"\0")
        said = message.decode("ascii", "ignore")
        shown = said and message.isascii() and said.isprintable()
        return f"{text}: {said}" if shown else text
    if event == KVM_SYSTEM_EVENT_SEV_TERM and len(words) == 1:
        (word,) = words
        return f"termination request, reason set {word >> 12 & 0xF}, reason {word >> 16 & 0xFF}"
    return f"system event {event}: {' '.join(f'{word:#x}' for word in words)}"
