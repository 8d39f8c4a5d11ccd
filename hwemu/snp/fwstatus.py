# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands of the AMD-SP by number, its statuses by name, and the refusal that carries one.

Numbers: ``enum sev_cmd`` in ``include/linux/psp-sev.h``; statuses: ``sev_ret_code`` in
``include/uapi/linux/psp-sev.h``, as in the SEV-SNP firmware ABI (56860) and the SEV API (55766).
"""

from __future__ import annotations

import enum


class Command(enum.IntEnum):
    """Commands that are modelled."""

    SNP_INIT = 0x081
    SNP_DF_FLUSH = 0x084
    SNP_DECOMMISSION = 0x090
    SNP_ACTIVATE = 0x091
    SNP_GUEST_STATUS = 0x092
    SNP_GCTX_CREATE = 0x093
    SNP_GUEST_REQUEST = 0x094
    SNP_LAUNCH_START = 0x0A0
    SNP_LAUNCH_UPDATE = 0x0A1
    SNP_LAUNCH_FINISH = 0x0A2
    SNP_PAGE_MOVE = 0x0C2
    SNP_MD_INIT = 0x0C3
    SNP_PAGE_RECLAIM = 0x0C7
    SNP_PAGE_UNSMASH = 0x0C8


class FwStatus(enum.IntEnum):
    """Status of a command."""

    SUCCESS = 0x00
    INVALID_PLATFORM_STATE = 0x01
    INVALID_GUEST_STATE = 0x02
    INVALID_CONFIG = 0x03
    INVALID_LENGTH = 0x04
    ALREADY_OWNED = 0x05
    INVALID_CERTIFICATE = 0x06
    POLICY_FAILURE = 0x07
    INACTIVE = 0x08
    INVALID_ADDRESS = 0x09
    BAD_SIGNATURE = 0x0A
    BAD_MEASUREMENT = 0x0B
    ASID_OWNED = 0x0C
    INVALID_ASID = 0x0D
    WBINVD_REQUIRED = 0x0E
    DFFLUSH_REQUIRED = 0x0F
    INVALID_GUEST = 0x10
    INVALID_COMMAND = 0x11
    ACTIVE = 0x12
    HWERROR_PLATFORM = 0x13
    HWERROR_UNSAFE = 0x14
    UNSUPPORTED = 0x15
    INVALID_PARAM = 0x16
    RESOURCE_LIMIT = 0x17
    SECURE_DATA_INVALID = 0x18
    INVALID_PAGE_SIZE = 0x19
    INVALID_PAGE_STATE = 0x1A
    INVALID_MDATA_ENTRY = 0x1B
    INVALID_PAGE_OWNER = 0x1C
    AEAD_OFLOW = 0x1D
    EXIT_RING_BUFFER = 0x1F
    RMP_INIT_REQUIRED = 0x20
    BAD_SVN = 0x21
    BAD_VERSION = 0x22
    SHUTDOWN_REQUIRED = 0x23
    UPDATE_FAILED = 0x24
    RESTORE_REQUIRED = 0x25
    RMP_INITIALIZATION_FAILED = 0x26
    INVALID_KEY = 0x27


class FirmwareRefused(Exception):
    """A command that the AMD-SP refuses; nothing has changed, but where a command says so."""

    def __init__(self, status: FwStatus, what: str) -> None:
        self.status = status
        super().__init__(f"{status.name} ({status.value:#x}): {what}")
