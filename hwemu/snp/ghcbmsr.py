# SPDX-License-Identifier: GPL-2.0-or-later
"""The GHCB MSR protocol: requests and responses of one 64-bit word.

Bits 11:0 say what it is, the rest are fields; one row a message.  Source: SEV-ES GHCB
standardization (56421), and ``arch/x86/include/asm/sev-common.h`` for the names.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


class Info(enum.IntEnum):
    """GHCBInfo, bits 11:0; 0 is the gpa of a GHCB page."""

    GHCB_GPA = 0x000
    SEV_INFO_RESP = 0x001
    SEV_INFO_REQ = 0x002
    CPUID_REQ = 0x004
    CPUID_RESP = 0x005
    AP_RESET_HOLD_REQ = 0x006
    AP_RESET_HOLD_RESP = 0x007
    PREF_GPA_REQ = 0x010
    PREF_GPA_RESP = 0x011
    REG_GPA_REQ = 0x012
    REG_GPA_RESP = 0x013
    PSC_REQ = 0x014
    PSC_RESP = 0x015
    VMPL_REQ = 0x016
    VMPL_RESP = 0x017
    HV_FT_REQ = 0x080
    HV_FT_RESP = 0x081
    TERM_REQ = 0x100


#: (lowest bit, width) of each field of a message.
FIELDS: Final[Mapping[Info, Mapping[str, tuple[int, int]]]] = {
    Info.GHCB_GPA: {"gfn": (12, 52)},
    Info.SEV_INFO_RESP: {"cbit": (24, 8), "min": (32, 16), "max": (48, 16)},
    Info.SEV_INFO_REQ: {},
    Info.CPUID_REQ: {"register": (30, 2), "function": (32, 32)},
    Info.CPUID_RESP: {"register": (30, 2), "value": (32, 32)},
    Info.AP_RESET_HOLD_REQ: {},
    Info.AP_RESET_HOLD_RESP: {"result": (12, 52)},
    Info.PREF_GPA_REQ: {},
    Info.PREF_GPA_RESP: {"gfn": (12, 52)},
    Info.REG_GPA_REQ: {"gfn": (12, 52)},
    Info.REG_GPA_RESP: {"gfn": (12, 52)},
    Info.PSC_REQ: {"gfn": (12, 40), "operation": (52, 4)},
    Info.PSC_RESP: {"error": (32, 32)},
    Info.VMPL_REQ: {"vmpl": (32, 8)},
    Info.VMPL_RESP: {"error": (32, 32)},
    Info.HV_FT_REQ: {},
    Info.HV_FT_RESP: {"features": (12, 52)},
    Info.TERM_REQ: {"reason_set": (12, 4), "reason": (16, 8)},
}

#: gfn of PREF_GPA_RESP without a preference, and of REG_GPA_RESP for a refusal.
NO_GFN: Final = (1 << 52) - 1
#: ``GHCB_MSR_PSC_RESP_ERROR``: the generic error of a page state change.
PSC_RESP_ERROR: Final = 1 << 31

#: The answer that each request may have.
ANSWERS: Final = {
    Info.SEV_INFO_REQ: Info.SEV_INFO_RESP,
    Info.CPUID_REQ: Info.CPUID_RESP,
    Info.AP_RESET_HOLD_REQ: Info.AP_RESET_HOLD_RESP,
    Info.PREF_GPA_REQ: Info.PREF_GPA_RESP,
    Info.REG_GPA_REQ: Info.REG_GPA_RESP,
    Info.PSC_REQ: Info.PSC_RESP,
    Info.VMPL_REQ: Info.VMPL_RESP,
    Info.HV_FT_REQ: Info.HV_FT_RESP,
}


class Feature(enum.IntFlag):
    """Features of a hypervisor (HV_FT_RESP and NAE event 0x8000_FFFD)."""

    SNP = 1 << 0
    AP_CREATION = 1 << 1
    RESTRICTED_INJECTION = 1 << 2
    RESTRICTED_INJECTION_TIMER = 1 << 3
    APIC_ID_LIST = 1 << 4
    MULTI_VMPL = 1 << 5


class Termination(enum.IntEnum):
    """Reasons of set 0; set 1 is the guest's own (Linux: ``SEV_TERM_SET_LINUX``)."""

    GENERAL = 0
    PROTOCOL_UNSUPPORTED = 1
    SNP_UNSUPPORTED = 2


@dataclass(frozen=True, slots=True)
class MsrMessage:
    """A word of the protocol by its fields."""

    info: Info
    fields: Mapping[str, int]

    def encode(self) -> int:
        """Return the word; ValueError for a field that is unknown, missing or too large."""
        layout = FIELDS[self.info]
        if set(layout) != set(self.fields):
            raise ValueError(
                f"GHCB MSR {self.info.name} with {sorted(self.fields)}: it has {sorted(layout)}"
            )
        word = int(self.info)
        for name, (bit, width) in layout.items():
            value = self.fields[name]
            if not 0 <= value < 1 << width:
                raise ValueError(
                    f"GHCB MSR {self.info.name} with {name} {value:#x}: it has {width} bits"
                )
            word |= value << bit
        return word


def message(info: Info, **fields: int) -> int:
    """Return the word of a message."""
    return MsrMessage(info, fields).encode()


def decode(word: int) -> MsrMessage:
    """Return what a word says; ValueError for one that says nothing known."""
    if not 0 <= word < 1 << 64:
        raise ValueError(f"GHCB MSR {word:#x}: it has 64 bits")
    try:
        info = Info(word & 0xFFF)
    except ValueError:
        raise ValueError(f"GHCB MSR {word:#x}: {word & 0xFFF:#x} is no known request") from None
    layout = FIELDS[info]
    return MsrMessage(
        info, {name: word >> bit & (1 << width) - 1 for name, (bit, width) in layout.items()}
    )
