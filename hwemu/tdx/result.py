# SPDX-License-Identifier: GPL-2.0-or-later
"""What a leaf answers, what it asks of the CPU side, and the memory it works on."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from hwemu.tdx.status import Status


class Memory(Protocol):
    """The pages behind host-physical addresses, as the module reaches them with a TD's key.

    Addresses and sizes are bytes. Only pages of TDs, and what the host hands over, are touched.
    """

    def copy(self, source: int, target: int) -> None:
        """Copy one page of 4 KiB."""

    def zero(self, hpa: int, npages: int) -> None:
        """Fill ``npages`` pages of 4 KiB with zeros."""

    def read(self, hpa: int, size: int) -> bytes:
        """Return ``size`` bytes at ``hpa``, within one page."""

    def write(self, hpa: int, data: bytes) -> None:
        """Store ``data`` at ``hpa``, within one page."""


class NoMemory:
    """A memory without content: reads as zeros. Enough where only the rules matter."""

    def copy(self, source: int, target: int) -> None:
        """Do nothing."""

    def zero(self, hpa: int, npages: int) -> None:
        """Do nothing."""

    def read(self, hpa: int, size: int) -> bytes:
        """Return zeros."""
        return bytes(size)

    def write(self, hpa: int, data: bytes) -> None:
        """Do nothing."""


class ExitReason(enum.IntEnum):
    """Basic exit reasons of VMX (SDM vol. 3, appendix C) that a TD exit carries here."""

    EXTERNAL_INTERRUPT = 1
    EPT_VIOLATION = 48
    TDCALL = 77  #: TDG.VP.VMCALL


class Extended(enum.IntEnum):
    """Types of an extended exit qualification (``vmx_eeq_type_t``)."""

    NONE = 0
    ACCEPT = 1
    PENDING = 6


@dataclass(frozen=True, slots=True)
class FlushTlb:
    """Drop every translation of the TD that this vCPU's processor holds."""

    tdr: int
    vcpu: int  #: address of the TDVPR


@dataclass(frozen=True, slots=True)
class TdExit:
    """The vCPU has left the TD; VP.ENTER returns to the host with this.

    ``qualification`` as of an EPT violation: 1 read, 2 write, 4 fetch. ``extended`` has its type
    in 3:0; ACCEPT has in 63:32 the level asked for (2:0), the level reached (5:3), the entry's
    state (13:6) and whether it is a leaf (14).
    """

    vcpu: int
    reason: ExitReason
    qualification: int = 0
    gpa: int = 0
    extended: int = 0
    registers: tuple[tuple[str, int], ...] = ()  #: those that TDG.VP.VMCALL passes


@dataclass(frozen=True, slots=True)
class VirtualException:
    """The guest takes #VE (vector 20); TDG.VP.VEINFO.GET tells it the rest."""

    vcpu: int
    gpa: int
    qualification: int


@dataclass(frozen=True, slots=True)
class DoubleFault:
    """The guest takes #DF: a #VE, and it has not fetched what the last one was about."""

    vcpu: int


@dataclass(frozen=True, slots=True)
class Translation:
    """A private access that goes through: where to, how large the page is, and its rights."""

    hpa: int
    level: int
    rights: int  #: 1 read, 2 write, 4 fetch


@dataclass(frozen=True, slots=True)
class SharedAccess:
    """The address has the SHARED bit: the host's own EPT translates it."""

    gpa: int  #: without the bit


Effect = FlushTlb | TdExit | VirtualException | DoubleFault
Access = Translation | SharedAccess | TdExit | VirtualException | DoubleFault


@dataclass(frozen=True, slots=True)
class Result:
    """The registers after a leaf, by name, and what the CPU side must do, in order."""

    status: int = int(Status.SUCCESS)
    rcx: int = 0
    rdx: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    effects: tuple[Effect, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the leaf did what it was asked."""
        return self.status == Status.SUCCESS
