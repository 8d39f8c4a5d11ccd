# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages between a guest and the AMD-SP, through a hypervisor that neither trusts.

The header is that of the SEV-SNP firmware ABI (56860, "Guest Messages", and
``struct snp_guest_msg_hdr`` in ``asm/sev.h``).  What is modelled is who may say what, in which
order: the tag is an HMAC with the VMPCK of the VMPL and the payload stays readable (ALGO 0), in
place of AES-256-GCM (1).
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hwemu.snp.fwstatus import FirmwareRefused, FwStatus
from hwemu.snp.rmpentry import PAGE_SIZE, VMPLS

HEADER_SIZE: Final = 0x60
MAX_PAYLOAD: Final = PAGE_SIZE - HEADER_SIZE
ALGO: Final = 0
#: tag, sequence, reserved, algo, version, header size, type, version, size, reserved, vmpck.
_HEADER: Final = struct.Struct("<32sQ8xBBHBBHIB35x")
assert _HEADER.size == HEADER_SIZE

#: REPORT_DATA and VMPL of MSG_REPORT_REQ.
REPORT_REQUEST: Final = struct.Struct("<64sI28x")
#: STATUS and REPORT_SIZE of MSG_REPORT_RSP.
REPORT_RESPONSE: Final = struct.Struct("<II24x")


class MessageType(enum.IntEnum):
    """MSG_TYPE; others exist and are not answered."""

    REPORT_REQ = 5
    REPORT_RSP = 6


@dataclass(frozen=True, slots=True)
class Message:
    """A message under the key of one VMPL."""

    kind: int
    payload: bytes
    vmpck: int
    sequence: int

    def seal(self, key: bytes) -> bytes:
        """Return header and payload; ValueError if it is longer than a page."""
        if len(self.payload) > MAX_PAYLOAD:
            raise ValueError(f"guest message of {len(self.payload)} bytes: at most {MAX_PAYLOAD}")
        raw = _HEADER.pack(
            bytes(32), self.sequence, ALGO, 1, HEADER_SIZE, self.kind, 1, len(self.payload), 0,
            self.vmpck,
        )  # fmt: skip
        raw += self.payload
        return _tag(raw, key) + raw[32:]


def _tag(raw: bytes, key: bytes) -> bytes:
    return hmac.new(key, raw[32:], hashlib.sha256).digest()


def unseal(raw: bytes, key: bytes) -> Message | None:
    """Return a message, or None if it was not made with this key (or is none)."""
    if len(raw) < HEADER_SIZE:
        return None
    tag, sequence, algo, version, size, kind, _, length, _, vmpck = _HEADER.unpack_from(raw)
    body = raw[: HEADER_SIZE + length]
    known = (algo, version, size) == (ALGO, 1, HEADER_SIZE) and len(body) == HEADER_SIZE + length
    if not known or not hmac.compare_digest(tag, _tag(body, key)):
        return None
    return Message(kind, body[HEADER_SIZE:], vmpck, sequence)


def open_request(raw: bytes, keys: Sequence[bytes], counts: Sequence[int]) -> Message:
    """Return a request of a guest whose keys and message counts these are, or FirmwareRefused."""
    vmpck = raw[0x3C] if len(raw) > 0x3C else VMPLS
    if vmpck >= VMPLS:
        raise FirmwareRefused(FwStatus.INVALID_PARAM, f"guest message under VMPCK {vmpck}")
    message = unseal(raw, keys[vmpck])
    if message is None:
        raise FirmwareRefused(
            FwStatus.BAD_MEASUREMENT, f"guest message not made with VMPCK{vmpck} of this guest"
        )
    if message.sequence != counts[vmpck] + 1:
        raise FirmwareRefused(
            FwStatus.INVALID_PARAM,
            f"guest message {message.sequence} under VMPCK{vmpck}: {counts[vmpck] + 1} is next",
        )
    if message.kind != MessageType.REPORT_REQ:
        raise FirmwareRefused(FwStatus.INVALID_PARAM, f"guest message of type {message.kind}")
    return message


def report_request(message: Message) -> tuple[bytes, int] | None:
    """Return REPORT_DATA and VMPL; None if it is malformed or asks for a higher privilege."""
    if len(message.payload) != REPORT_REQUEST.size:
        return None
    data, vmpl = REPORT_REQUEST.unpack(message.payload)
    if not message.vmpck <= vmpl < VMPLS or any(message.payload[0x44:]):
        return None
    return data, vmpl
