# SPDX-License-Identifier: GPL-2.0-or-later
"""Completion status codes of the TDX module, and the operand ids in their low dwords.

A status is 64 bits: bit 63 error, 62 non-recoverable, 61 fatal, the class in 47:40, details in
39:32 and, where the code has one, the operand that was at fault in 31:0 (Intel TDX Module ABI
Reference Specification, "Function Completion Status"; ``tdx_error_codes_defs.h``).
"""

from __future__ import annotations

import enum
from typing import Final


class Status(enum.IntEnum):
    """Codes with a low dword of 0. Those without bit 63 are no errors, but nothing was done."""

    SUCCESS = 0x0000000000000000
    INTERRUPTED_RESUMABLE = 0x8000000300000000
    INTERRUPTED_RESTARTABLE = 0x8000000400000000
    OPERAND_INVALID = 0xC000010000000000
    OPERAND_ADDR_RANGE_ERROR = 0xC000010100000000
    OPERAND_BUSY = 0x8000020000000000
    PREVIOUS_TLB_EPOCH_BUSY = 0x8000020100000000
    OPERAND_BUSY_HOST_PRIORITY = 0x8000020400000000
    PAGE_METADATA_INCORRECT = 0xC000030000000000
    TD_ASSOCIATED_PAGES_EXIST = 0xC000040000000000
    TD_FATAL = 0xE000060400000000
    TD_NON_DEBUG = 0xC000060500000000
    TDCS_NOT_ALLOCATED = 0xC000060600000000
    LIFECYCLE_STATE_INCORRECT = 0xC000060700000000
    OP_STATE_INCORRECT = 0xC000060800000000
    NO_VCPUS = 0xC000060900000000
    TDCX_NUM_INCORRECT = 0xC000061000000000
    VCPU_STATE_INCORRECT = 0xC000070000000000
    VCPU_ASSOCIATED = 0x8000070100000000
    VCPU_NOT_ASSOCIATED = 0x8000070200000000
    NO_VALID_VE_INFO = 0xC000070400000000
    MAX_VCPUS_EXCEEDED = 0xC000070500000000
    TD_KEYS_NOT_CONFIGURED = 0x8000081000000000
    KEY_CONFIGURED = 0x0000081500000000
    WBCACHE_NOT_COMPLETE = 0x8000081700000000
    HKID_NOT_FREE = 0xC000082000000000
    NO_HKID_READY_TO_WBCACHE = 0x0000082100000000
    WBCACHE_RESUME_ERROR = 0xC000082300000000
    FLUSHVP_NOT_DONE = 0x8000082400000000
    EPT_WALK_FAILED = 0xC0000B0000000000
    EPT_ENTRY_NOT_PRESENT = 0xC0000B0300000000
    GPA_RANGE_NOT_BLOCKED = 0xC0000B0600000000
    GPA_RANGE_ALREADY_BLOCKED = 0x00000B0700000000
    TLB_TRACKING_NOT_DONE = 0xC0000B0800000000
    EPT_INVALID_PROMOTE_CONDITIONS = 0xC0000B0900000000
    PAGE_ALREADY_ACCEPTED = 0x00000B0A00000000
    PAGE_SIZE_MISMATCH = 0xC0000B0B00000000
    EPT_ENTRY_STATE_INCORRECT = 0xC0000B0D00000000
    EPT_PAGE_NOT_FREE = 0xC0000B0E00000000
    METADATA_FIELD_ID_INCORRECT = 0xC0000C0000000000
    INVALID_REPORTMACSTRUCT = 0xC000100100000000


class Operand(enum.IntEnum):
    """Operand ids: a register, or something that no register names."""

    RAX = 0
    RCX = 1
    RDX = 2
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    ATTRIBUTES = 64
    XFAM = 65
    EPTP_CONTROLS = 67
    MAX_VCPUS = 68
    NUM_L2_VMS = 71
    TDR = 128
    SEPT_TREE = 146
    RTMR = 168
    TD_EPOCH = 169
    OP_STATE = 172
    KOT = 186
    WBCACHE = 188


class TdxError(Exception):
    """A leaf that was refused; nothing has changed.

    ``status`` is the whole of RAX, ``rcx`` and ``rdx`` what the module leaves there (the S-EPT
    entry and its level and state where one was at fault), ``r8`` the size for PAGE.RECLAIM.
    """

    def __init__(
        self,
        status: Status,
        detail: int = 0,
        what: str = "",
        *,
        rcx: int = 0,
        rdx: int = 0,
        r8: int = 0,
    ) -> None:
        self.code: Final = status
        self.status: Final = int(status) | detail
        self.rcx: Final = rcx
        self.rdx: Final = rdx
        self.r8: Final = r8
        super().__init__(f"{name(self.status)}: {what}" if what else name(self.status))


def split(status: int) -> tuple[Status, int]:
    """Return the code and the low dword of a status; ValueError for a code that is not ours."""
    return Status(status & ~0xFFFFFFFF), status & 0xFFFFFFFF


def name(status: int) -> str:
    """Return a status as people write it: ``OPERAND_INVALID | RCX``, or in hex if unknown."""
    try:
        code, detail = split(status)
    except ValueError:
        return f"{status:#018x}"
    if not detail:
        return code.name
    known = {int(one): one.name for one in Operand}
    return f"{code.name} | {known.get(detail, f'{detail:#x}')}"
