# SPDX-License-Identifier: GPL-2.0-or-later
"""What an instruction or an access ends in, as values.

Statuses are those of EAX (AMD APM vol. 3, RMPUPDATE, PSMASH, PVALIDATE, RMPADJUST, RMPQUERY);
fault bits those of #PF and of EXITINFO1 of #VMEXIT(NPF) (vol. 2, 15.25.6 and 15.36.10).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final, TypeAlias

from hwemu.snp.check import Fault


class RmpupdateStatus(enum.IntEnum):
    """EAX after RMPUPDATE."""

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_OVERLAP = 4


class PsmashStatus(enum.IntEnum):
    """EAX after PSMASH."""

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_BADADDR = 4


class RmpreadStatus(enum.IntEnum):
    """EAX after RMPREAD."""

    SUCCESS = 0
    FAIL_INPUT = 1


class GuestStatus(enum.IntEnum):
    """EAX after PVALIDATE, RMPADJUST and RMPQUERY.

    FAIL_NOUPDATE is the software's name for EAX 0 with CF set (``asm/sev.h``): nothing changed.
    """

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_SIZEMISMATCH = 6
    FAIL_NOUPDATE = 255


Status: TypeAlias = RmpupdateStatus | PsmashStatus | RmpreadStatus | GuestStatus


class PfError(enum.IntFlag):
    """Bits of the error code of #PF."""

    PRESENT = 1 << 0
    WRITE = 1 << 1
    USER = 1 << 2
    FETCH = 1 << 4
    RMP = 1 << 31


class NpfError(enum.IntFlag):
    """Bits of EXITINFO1 of #VMEXIT(NPF)."""

    PRESENT = 1 << 0
    WRITE = 1 << 1
    USER = 1 << 2
    FETCH = 1 << 4
    RMP = 1 << 31
    FINAL = 1 << 32  #: the guest-physical address itself, not an entry of the guest's tables
    WALK = 1 << 33  #: an entry of the guest's tables
    ENC = 1 << 34  #: the effective C-bit was 1
    SIZEM = 1 << 35  #: PVALIDATE or RMPADJUST of a part of a larger page
    VMPL = 1 << 36  #: the permission mask of the VMPL


#: Error code of #VC for a page that the guest has not validated (APM vol. 2, 15.36.10).
PAGE_NOT_VALIDATED: Final = 0x404


@dataclass(frozen=True, slots=True)
class Returned:
    """The instruction ended with a status; ``why`` is the rule that refused, "" for success."""

    status: Status
    why: str = ""

    @property
    def ok(self) -> bool:
        """Whether it did what was asked."""
        return self.status == 0

    @property
    def carry(self) -> bool:
        """CF: the page was already as asked."""
        return self.status is GuestStatus.FAIL_NOUPDATE

    @property
    def eax(self) -> int:
        """The register; 0 if only CF tells that nothing changed."""
        return 0 if self.carry else int(self.status)


@dataclass(frozen=True, slots=True)
class NestedPageFault:
    """#VMEXIT(NPF): the hypervisor decides."""

    error: NpfError
    why: str


@dataclass(frozen=True, slots=True)
class HostPageFault:
    """#PF in the host."""

    error: PfError
    why: str


@dataclass(frozen=True, slots=True)
class VcException:
    """#VC in the guest."""

    why: str
    code: int = PAGE_NOT_VALIDATED


@dataclass(frozen=True, slots=True)
class GeneralProtection:
    """#GP(0)."""

    why: str


GuestFault: TypeAlias = NestedPageFault | VcException | GeneralProtection


def guest_fault(fault: Fault, why: str, bits: NpfError) -> GuestFault:
    """Build the fault of a row that did not hold; ``bits`` describe the access."""
    match fault:
        case Fault.VC:
            return VcException(why)
        case Fault.GP:
            return GeneralProtection(why)
        case Fault.NPF_SIZEM:
            bits |= NpfError.SIZEM
        case Fault.NPF_VMPL:
            bits |= NpfError.VMPL
    return NestedPageFault(bits | NpfError.RMP, why)
