# SPDX-License-Identifier: GPL-2.0-or-later
"""One TD (its TDR and TDCS) and its vCPUs (TDVPS), as the module remembers them.

TLB tracking (Intel TDX Module Base Specification, "TLB Tracking"): a TD counts epochs, and in two
counters the vCPUs that run in the current and in the previous one. TDH.MEM.TRACK begins an epoch
and is refused while a vCPU of the previous one runs, so there are never more than two.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field, replace
from typing import Final

from hwemu.tdx.entry import SeptState, encode
from hwemu.tdx.measure import NO_HASH, RTMRS, Sha384
from hwemu.tdx.sept import Sept
from hwemu.tdx.states import LifeCycle, OpState, VcpuState

SEPT_ROOT_TDCX: Final = 3  #: which TDCX page holds the root of the Secure EPT
ATTRIBUTE_DEBUG: Final = 1 << 0
ATTRIBUTE_SEPT_VE_DISABLE: Final = 1 << 28
#: What a TD may ask for: DEBUG, LASS, SEPT_VE_DISABLE, MIGRATABLE, PKS, KL, PERFMON.
ATTRIBUTES_FIXED0: Final = 1 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 31 | 1 << 63
XFAM_FIXED1: Final = 0x3  #: x87 and SSE: always there


@dataclass(frozen=True, slots=True)
class TdParams:
    """TD_PARAMS, as far as they are modelled. Hashes are 48 bytes."""

    attributes: int = 0
    xfam: int = XFAM_FIXED1
    max_vcpus: int = 1
    levels: int = 4  #: of the Secure EPT, 4 or 5
    wide: bool = False  #: GPAW: the SHARED bit is bit 51 instead of 47
    mr_config_id: bytes = NO_HASH
    mr_owner: bytes = NO_HASH
    mr_owner_config: bytes = NO_HASH


@dataclass(frozen=True, slots=True)
class VeInfo:
    """What TDG.VP.VEINFO.GET returns once."""

    reason: int
    qualification: int
    gla: int
    gpa: int


@dataclass(slots=True)
class Vcpu:
    """A vCPU: ``hpa`` of its TDVPR, the TDCX pages it has got, where it runs."""

    hpa: int
    pages: int = 1
    state: VcpuState = VcpuState.UNINITIALIZED
    index: int = -1
    lp: int | None = None  #: the logical processor it is associated with
    epoch: int = 0  #: the TD epoch it last entered in
    running: bool = False
    ve_info: VeInfo | None = None

    def key(self, td_epoch: int) -> tuple[object, ...]:
        """A hashable value equal for vCPUs that behave alike."""
        return (self.hpa, self.pages, self.state, self.index, self.lp,
                min(td_epoch - self.epoch, 2), self.running, self.ve_info)  # fmt: skip


@dataclass(slots=True)
class Td:
    """A TD: ``hpa`` of its TDR. ``children`` counts its 4 KiB pages, the TDR left out."""

    hpa: int
    hkid: int
    life_cycle: LifeCycle = LifeCycle.HKID_ASSIGNED
    fatal: bool = False
    packages: int = 0  #: bitmap of those with the key configured
    children: int = 0
    tdcx: tuple[int, ...] = ()
    op_state: OpState = OpState.UNINITIALIZED
    params: TdParams = field(default_factory=TdParams)
    sept: Sept | None = None
    epoch: int = 1
    refcount: list[int] = field(default_factory=lambda: [0, 0])  #: by the epoch's lowest bit
    vcpus: dict[int, Vcpu] = field(default_factory=dict)  #: by hpa of the TDVPR
    num_vcpus: int = 0  #: initialised
    associated: int = 0
    sha: Sha384 = field(default_factory=hashlib.sha384)
    mrtd: bytes = NO_HASH
    rtmr: list[bytes] = field(default_factory=lambda: [NO_HASH] * RTMRS)

    @property
    def owner(self) -> int:
        """How the PAMT names this TD: the page number of its TDR."""
        return self.hpa >> 12

    @property
    def running(self) -> int:
        """VCPUs that are in the guest now."""
        return self.refcount[0] + self.refcount[1]

    @property
    def tree(self) -> Sept:
        """The Secure EPT, which is there once the TD has all its TDCX pages."""
        if self.sept is None:
            raise LookupError(f"TD at {self.hpa:#x} has no Secure EPT yet")
        return self.sept

    def word(self, state: SeptState, hpa: int = 0) -> int:
        """Return an S-EPT entry as this TD wants it."""
        return encode(state, hpa, ve=not self.params.attributes & ATTRIBUTE_SEPT_VE_DISABLE)

    def tracked(self, bepoch: int) -> bool:
        """Whether no vCPU can hold a translation that was blocked in ``bepoch``."""
        if bepoch + 1 > self.epoch:
            return False
        return bepoch + 1 < self.epoch or not self.refcount[bepoch & 1]

    def enter(self, vcpu: Vcpu) -> bool:
        """The vCPU runs in the current epoch; True if it last ran in another."""
        moved = vcpu.epoch != self.epoch
        vcpu.epoch = self.epoch
        vcpu.running = True
        self.refcount[self.epoch & 1] += 1
        return moved

    def leave(self, vcpu: Vcpu) -> None:
        """The vCPU has left the guest."""
        vcpu.running = False
        self.refcount[vcpu.epoch & 1] -= 1

    def key(self) -> tuple[object, ...]:
        """A hashable value equal for TDs that behave alike; epochs count by their distance."""
        return (
            self.hpa, self.hkid, self.life_cycle, self.fatal, self.packages, self.children,
            self.tdcx, self.op_state, self.params, None if self.sept is None else self.sept.key(),
            self.refcount[self.epoch & 1], self.refcount[1 - (self.epoch & 1)],
            tuple(one.key(self.epoch) for _, one in sorted(self.vcpus.items())),
            self.num_vcpus, self.associated, self.sha.digest(), self.mrtd, tuple(self.rtmr),
        )  # fmt: skip

    def copy(self) -> Td:
        """An independent copy."""
        other = copy.copy(self)
        other.sept = None if self.sept is None else self.sept.copy()
        other.refcount = self.refcount.copy()
        other.vcpus = {hpa: replace(vcpu) for hpa, vcpu in self.vcpus.items()}
        other.sha = self.sha.copy()
        other.rtmr = self.rtmr.copy()
        return other
