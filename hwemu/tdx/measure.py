# SPDX-License-Identifier: GPL-2.0-or-later
"""What a TD is measured by: MRTD, RTMRs and the report, with the module's records and offsets.

MRTD is one SHA-384 over records of 128 bytes: the leaf's name, then at byte 16 the gpa; EXTEND's is
followed by the 256 bytes it measures (``tdh_mem_page_add.c``, ``tdh_mr_extend.c``). The report is
TDREPORT_STRUCT of 1024 bytes. Its MAC is a real HMAC-SHA-256, but its key is an argument that
whoever runs the simulator knows: it models the rule, and proves nothing to anybody.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Final, Protocol

HASH_SIZE: Final = 48
NO_HASH: Final = bytes(HASH_SIZE)
RTMRS: Final = 4
CHUNK: Final = 256  #: bytes that one TDH.MR.EXTEND measures

REPORT_SIZE: Final = 1024
REPORT_DATA_SIZE: Final = 64
REPORT_ALIGNMENT: Final = 1024
MAC_OFFSET: Final = 224  #: the MAC covers what lies before it
TCB_INFO_OFFSET: Final = 256
TCB_INFO_SIZE: Final = 239
TD_INFO_OFFSET: Final = 512
REPORT_TYPE: Final = 0x81  #: TDX, subtype 0, version 0

_RECORD: Final = struct.Struct("<16sQ104x")
_MAC_STRUCT: Final = struct.Struct("<I12x16s48s48s64s32x")
_TD_INFO: Final = struct.Struct("<QQ48s48s48s48s192s48s64x")


class Sha384(Protocol):
    """A hash under way, of hashlib."""

    def update(self, data: bytes, /) -> None:
        """Add ``data``."""

    def digest(self) -> bytes:
        """Return the hash of what was added; more may follow."""

    def copy(self) -> Sha384:
        """Return an independent copy."""


def page_added(sha: Sha384, gpa: int) -> None:
    """Measure that a page was added at ``gpa``."""
    sha.update(_RECORD.pack(b"MEM.PAGE.ADD", gpa))


def extended(sha: Sha384, gpa: int, chunk: bytes) -> None:
    """Measure ``chunk``, the 256 bytes at ``gpa``."""
    sha.update(_RECORD.pack(b"MR.EXTEND", gpa))
    sha.update(chunk)


def rtmr_extended(register: bytes, value: bytes) -> bytes:
    """Return an RTMR after ``value`` (48 bytes) has been added to it."""
    return hashlib.sha384(register + value).digest()


def td_info(
    attributes: int, xfam: int, mrtd: bytes, config: tuple[bytes, bytes, bytes], rtmr: list[bytes]
) -> bytes:
    """Return TDINFO_STRUCT; ``config`` is MRCONFIGID, MROWNER, MROWNERCONFIG."""
    return _TD_INFO.pack(attributes, xfam, mrtd, *config, b"".join(rtmr), NO_HASH)


def report(key: bytes, data: bytes, info: bytes) -> bytes:
    """Return TDREPORT_STRUCT over ``data`` (64 bytes) and ``info``, a TDINFO_STRUCT."""
    tcb_info = bytes(TCB_INFO_SIZE)
    head = _MAC_STRUCT.pack(
        REPORT_TYPE,
        bytes(16),
        hashlib.sha384(tcb_info).digest(),
        hashlib.sha384(info).digest(),
        data,
    )
    mac = hmac.digest(key, head, "sha256")
    return (head + mac + tcb_info).ljust(TD_INFO_OFFSET, b"\0") + info


def verified(key: bytes, mac_struct: bytes) -> bool:
    """Whether the first 256 bytes of a report were made with ``key``."""
    mac = hmac.digest(key, mac_struct[:MAC_OFFSET], "sha256")
    return hmac.compare_digest(mac, mac_struct[MAC_OFFSET : MAC_OFFSET + 32])
