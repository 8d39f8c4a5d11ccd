# SPDX-License-Identifier: GPL-2.0-or-later
"""What the AMD-SP knows of a guest, and the states of its life.

Source: SEV-SNP firmware ABI (56860), "Guest State Machine" and the commands' pages.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from hwemu.snp.fwstatus import Command
from hwemu.snp.launch import NO_DIGEST
from hwemu.snp.rmpentry import VMPLS


class GuestState(enum.Enum):
    """``GSTATE`` of a guest."""

    INIT = "INIT"
    LAUNCH = "LAUNCH"
    RUNNING = "RUNNING"

    def __str__(self) -> str:
        return self.value


_I, _L, _R = GuestState
#: Which commands a guest takes in which state, and what it is in afterwards; None: it is gone.
TRANSITIONS: Final[dict[tuple[GuestState, Command], GuestState | None]] = {
    (_I, Command.SNP_LAUNCH_START): _L,
    (_I, Command.SNP_GUEST_STATUS): _I,
    (_I, Command.SNP_DECOMMISSION): None,
    (_L, Command.SNP_ACTIVATE): _L,
    (_L, Command.SNP_LAUNCH_UPDATE): _L,
    (_L, Command.SNP_LAUNCH_FINISH): _R,
    (_L, Command.SNP_MD_INIT): _L,
    (_L, Command.SNP_PAGE_MOVE): _L,
    (_L, Command.SNP_GUEST_STATUS): _L,
    (_L, Command.SNP_DECOMMISSION): None,
    (_R, Command.SNP_ACTIVATE): _R,
    (_R, Command.SNP_MD_INIT): _R,
    (_R, Command.SNP_PAGE_MOVE): _R,
    (_R, Command.SNP_GUEST_REQUEST): _R,
    (_R, Command.SNP_GUEST_STATUS): _R,
    (_R, Command.SNP_DECOMMISSION): None,
}


class Policy(enum.IntFlag):
    """Bits of POLICY; bits 7:0 and 15:8 are the least ABI minor and major version."""

    SMT = 1 << 16
    MUST_BE_ONE = 1 << 17
    MIGRATE_MA = 1 << 18
    DEBUG = 1 << 19
    SINGLE_SOCKET = 1 << 20
    PAGE_SWAP_DISABLE = 1 << 25


POLICY_RESERVED: Final = ((1 << 64) - 1) & ~((1 << 26) - 1)
ABI_MAJOR: Final = 1
ABI_MINOR: Final = 55


def policy_allowed(policy: int, *, smt: bool) -> bool:
    """Whether this firmware takes a guest with a policy, on a machine with or without SMT."""
    major, minor = policy >> 8 & 0xFF, policy & 0xFF
    return (
        0 <= policy < 1 << 64
        and not policy & POLICY_RESERVED
        and bool(policy & Policy.MUST_BE_ONE)
        and (bool(policy & Policy.SMT) or not smt)
        and (major, minor) <= (ABI_MAJOR, ABI_MINOR)
    )


@dataclass(frozen=True, slots=True)
class IdBlock:
    """An ID block: what its author expects of a launch (56860, "ID Block").

    Whether the author signed it is not modelled: ``id_key_digest`` is taken as it comes.
    """

    launch_digest: bytes
    policy: int
    family_id: bytes = bytes(16)
    image_id: bytes = bytes(16)
    version: int = 1
    guest_svn: int = 0
    id_key_digest: bytes = bytes(48)

    #: LD, FAMILY_ID, IMAGE_ID, VERSION, GUEST_SVN, POLICY: 0x60 bytes.
    def pack(self) -> bytes:
        """Return the block without the key."""
        return _ID_BLOCK.pack(
            self.launch_digest, self.family_id, self.image_id, self.version, self.guest_svn,
            self.policy,
        )  # fmt: skip

    @classmethod
    def unpack(cls, raw: bytes) -> IdBlock:
        """Read a block; ValueError for another length."""
        if len(raw) != _ID_BLOCK.size:
            raise ValueError(f"ID block of {len(raw)} bytes: it has {_ID_BLOCK.size}")
        digest, family, image, version, svn, policy = _ID_BLOCK.unpack(raw)
        return cls(digest, policy, family, image, version, svn)


_ID_BLOCK: Final = struct.Struct("<48s16s16sIIQ")


#: VERSION, IMI_EN, FMS, reserved, GOSVW, VMPCK0..3 of a secrets page (``struct snp_secrets_page``).
_SECRETS: Final = struct.Struct("<IIII16s32s32s32s32s")
SECRETS_VERSION: Final = 3


@dataclass(frozen=True, slots=True)
class GuestContext:
    """A guest as its context page describes it; ``asid`` 0 means inactive.

    ``keys`` are the VMPCKs, one a VMPL; ``sequence`` counts the messages under each.
    """

    state: GuestState = GuestState.INIT
    asid: int = 0
    policy: int = 0
    imi: bool = False
    digest: bytes = NO_DIGEST
    host_data: bytes = bytes(32)
    id_block: IdBlock | None = None
    gosvw: bytes = bytes(16)
    report_id: bytes = bytes(32)
    keys: tuple[bytes, ...] = (bytes(32),) * VMPLS
    sequence: tuple[int, ...] = (0,) * VMPLS

    def __repr__(self) -> str:
        # keys stay out of logs
        return f"GuestContext({self.state}, asid={self.asid}, policy={self.policy:#x})"

    def secrets(self) -> bytes:
        """Return what a secrets page begins with; the rest of it is zero."""
        return _SECRETS.pack(SECRETS_VERSION, self.imi, 0, 0, self.gosvw, *self.keys)

    def key(self) -> tuple[object, ...]:
        """Return what its future depends on, without the keys that were made up for it."""
        return (
            self.state.value, self.asid, self.policy, self.imi, self.digest, self.host_data,
            self.gosvw, self.sequence,
        )  # fmt: skip
