# SPDX-License-Identifier: GPL-2.0-or-later
"""TD_PARAMS, which the host hands to TDH.MNG.INIT, and the fields that TDH.MNG.RD reads.

Offsets are those of ``td_params_t``, field ids those of ``tdr_tdcs_fields_lookup.h`` (TDX 1.5). A
field of several elements has its first element's id here; the next ones follow it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hwemu.tdx.status import Operand, Status, TdxError
from hwemu.tdx.td import ATTRIBUTES_FIXED0, XFAM_FIXED1, Td, TdParams

TD_PARAMS_SIZE: Final = 1024
#: attributes, XFAM, max vCPUs, L2 VMs, MSR controls, EPTP controls, flags, TSC, three hashes
_PARAMS: Final = struct.Struct("<QQHBB4xQQH38x48s48s48s")
_FIRST_TWO_LEVELS: Final = 6  #: memory type WB in bits 2:0 of the EPTP controls
_GPAW: Final = 1
_TSC: Final = 40  #: in units of 25 MHz


def pack_params(params: TdParams) -> bytes:
    """Return TD_PARAMS as the host would write it."""
    eptp = _FIRST_TWO_LEVELS | params.levels - 1 << 3
    head = _PARAMS.pack(
        params.attributes, params.xfam, params.max_vcpus, 0, 0, eptp, _GPAW if params.wide else 0,
        _TSC, params.mr_config_id, params.mr_owner, params.mr_owner_config,
    )  # fmt: skip
    return head.ljust(TD_PARAMS_SIZE, b"\0")


def parse_params(data: bytes) -> TdParams:
    """Return the parameters of a TD, or raise OPERAND_INVALID with the field's operand id.

    One code for all: the module asks ATTRIBUTES first, then XFAM, vCPUs, L2 VMs, EPTP.
    """
    (attributes, xfam, vcpus, l2, _, eptp, flags, _, config, owner, owner_config) = (
        _PARAMS.unpack_from(data)
    )
    levels = (eptp >> 3 & 7) + 1
    wide = bool(flags & _GPAW)
    for wrong, operand, what in (
        (attributes & ~ATTRIBUTES_FIXED0, Operand.ATTRIBUTES, f"attributes {attributes:#x}"),
        (~xfam & XFAM_FIXED1, Operand.XFAM, f"XFAM {xfam:#x}"),
        (not vcpus, Operand.MAX_VCPUS, "no vCPUs"),
        (l2, Operand.NUM_L2_VMS, f"{l2} L2 VMs"),
        (
            eptp & 7 != _FIRST_TWO_LEVELS
            or eptp >> 6
            or levels not in (4, 5)
            or (wide and levels == 4),
            Operand.EPTP_CONTROLS,
            f"EPTP controls {eptp:#x}",
        ),
    ):
        if wrong:
            raise TdxError(Status.OPERAND_INVALID, operand, f"TDH.MNG.INIT: {what}")
    return TdParams(attributes, xfam, vcpus, levels, wide, config, owner, owner_config)


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a TDR or TDCS."""

    name: str
    read: Callable[[Td], int]


def _quads(name: str, first: int, read: Callable[[Td], bytes]) -> dict[int, Field]:
    def quad(number: int) -> Callable[[Td], int]:
        return lambda td: int.from_bytes(read(td)[8 * number : 8 * number + 8], "little")

    return {first + number: Field(f"{name}[{number}]", quad(number)) for number in range(6)}


FIELDS: Final[dict[int, Field]] = {
    0x8010000000000001: Field("TDR.FATAL", lambda td: int(td.fatal)),
    0x8010000200000002: Field("TDR.NUM_TDCX", lambda td: len(td.tdcx)),
    0x8010000300000004: Field("TDR.CHLDCNT", lambda td: td.children),
    0x8010000200000005: Field("TDR.LIFECYCLE_STATE", lambda td: int(td.life_cycle)),
    0x8110000100000001: Field("TDR.HKID", lambda td: td.hkid),
    0x8110000300000002: Field("TDR.PKG_CONFIG_BITMAP", lambda td: td.packages),
    0x9010000200000001: Field("TDCS.NUM_VCPUS", lambda td: td.num_vcpus),
    0x9010000200000002: Field("TDCS.NUM_ASSOC_VCPUS", lambda td: td.associated),
    0x9010000200000004: Field("TDCS.OP_STATE", lambda td: int(td.op_state)),
    0x1110000300000000: Field("TDCS.ATTRIBUTES", lambda td: td.params.attributes),
    0x1110000300000001: Field("TDCS.XFAM", lambda td: td.params.xfam),
    0x1110000200000002: Field("TDCS.MAX_VCPUS", lambda td: td.params.max_vcpus),
    0x1110000000000003: Field("TDCS.GPAW", lambda td: int(td.params.wide)),
    0x9210000300000000: Field("TDCS.TD_EPOCH", lambda td: td.epoch),
    0x9210000100000001: Field("TDCS.REFCOUNT[0]", lambda td: td.refcount[0]),
    0x9210000100000002: Field("TDCS.REFCOUNT[1]", lambda td: td.refcount[1]),
    **_quads("TDCS.MRTD", 0x1310000300000000, lambda td: td.mrtd),
    **_quads("TDCS.RTMR[0]", 0x1310000300000040, lambda td: td.rtmr[0]),
    **_quads("TDCS.RTMR[1]", 0x1310000300000046, lambda td: td.rtmr[1]),
    **_quads("TDCS.RTMR[2]", 0x131000030000004C, lambda td: td.rtmr[2]),
    **_quads("TDCS.RTMR[3]", 0x1310000300000052, lambda td: td.rtmr[3]),
}
