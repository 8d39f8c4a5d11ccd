# SPDX-License-Identifier: GPL-2.0-or-later
"""The attestation report, at the offsets of the SEV-SNP firmware ABI (56860, ATTESTATION_REPORT).

The signature models who vouches for a report, not how: it is an HMAC-SHA-384 with a key of the
machine in place of ECDSA P-384, and SIGNATURE_ALGO says 0, an algorithm that does not exist.  So
no verifier of real reports takes one of these for real.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass, replace
from typing import Final

from hwemu.snp.guestcontext import GuestContext

REPORT_SIZE: Final = 0x4A0
SIGNED_SIZE: Final = 0x2A0
VERSION: Final = 2
SIGNATURE_ALGO: Final = 0

#: name: (offset, size in bytes); integers are little-endian.
OFFSETS: Final = {
    "version": (0x000, 4),
    "guest_svn": (0x004, 4),
    "policy": (0x008, 8),
    "family_id": (0x010, 16),
    "image_id": (0x020, 16),
    "vmpl": (0x030, 4),
    "signature_algo": (0x034, 4),
    "current_tcb": (0x038, 8),
    "platform_info": (0x040, 8),
    "flags": (0x048, 4),
    "report_data": (0x050, 64),
    "measurement": (0x090, 48),
    "host_data": (0x0C0, 32),
    "id_key_digest": (0x0E0, 48),
    "author_key_digest": (0x110, 48),
    "report_id": (0x140, 32),
    "report_id_ma": (0x160, 32),
    "reported_tcb": (0x180, 8),
    "chip_id": (0x1A0, 64),
    "committed_tcb": (0x1E0, 8),
    "launch_tcb": (0x1F0, 8),
    "signature": (0x2A0, 48),
}
_INTEGERS: Final = {1: "<B", 4: "<I", 8: "<Q"}


@dataclass(frozen=True, slots=True)
class Report:
    """The fields that are modelled; byte strings have the sizes of `OFFSETS`."""

    policy: int
    vmpl: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    report_id: bytes
    chip_id: bytes
    guest_svn: int = 0
    family_id: bytes = bytes(16)
    image_id: bytes = bytes(16)
    id_key_digest: bytes = bytes(48)
    author_key_digest: bytes = bytes(48)
    report_id_ma: bytes = b"\xff" * 32
    current_tcb: int = 0
    reported_tcb: int = 0
    committed_tcb: int = 0
    launch_tcb: int = 0
    platform_info: int = 0
    flags: int = 0
    version: int = VERSION
    signature_algo: int = SIGNATURE_ALGO

    @classmethod
    def of(cls, guest: GuestContext, data: bytes, vmpl: int, chip_id: bytes) -> Report:
        """Return what a machine reports of a guest, to one of its VMPLs that sends ``data``."""
        report = cls(
            guest.policy, vmpl, data, guest.digest, guest.host_data, guest.report_id, chip_id
        )
        block = guest.id_block
        if block is None:
            return report
        return replace(
            report, guest_svn=block.guest_svn, family_id=block.family_id,
            image_id=block.image_id, id_key_digest=block.id_key_digest,
        )  # fmt: skip


def pack(report: Report, key: bytes) -> bytes:
    """Return the 0x4a0 bytes, signed; ValueError if a field has another size."""
    raw = bytearray(REPORT_SIZE)
    for name, (offset, size) in OFFSETS.items():
        if name == "signature":
            continue
        value = getattr(report, name)
        if isinstance(value, int):
            struct.pack_into(_INTEGERS[size], raw, offset, value)
        elif len(value) != size:
            raise ValueError(f"attestation report with {name} of {len(value)} bytes: it has {size}")
        else:
            raw[offset : offset + size] = value
    raw[SIGNED_SIZE : SIGNED_SIZE + 48] = _signature(bytes(raw), key)
    return bytes(raw)


def unpack(raw: bytes) -> Report:
    """Read a report, signed or not; ValueError for another length."""
    if len(raw) != REPORT_SIZE:
        raise ValueError(f"attestation report of {len(raw)} bytes: it has {REPORT_SIZE}")
    values: dict[str, int | bytes] = {}
    for name, (offset, size) in OFFSETS.items():
        field = raw[offset : offset + size]
        if name == "signature":
            continue
        if size in _INTEGERS:
            values[name] = int.from_bytes(field, "little")
        else:
            values[name] = field
    return Report(**values)  # type: ignore[arg-type]


def verify(raw: bytes, key: bytes) -> bool:
    """Whether this machine vouches for a report."""
    if len(raw) != REPORT_SIZE:
        return False
    signature = raw[SIGNED_SIZE : SIGNED_SIZE + 48]
    return hmac.compare_digest(signature, _signature(raw, key))


def _signature(raw: bytes, key: bytes) -> bytes:
    return hmac.new(key, raw[:SIGNED_SIZE], hashlib.sha384).digest()
