# SPDX-License-Identifier: GPL-2.0-or-later
"""What one TDX module knows: its PAMT, its keys, its TDs. One a machine, whatever runs on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from hwemu.tdx.locks import Locks
from hwemu.tdx.pamt import Pamt, Tdmr
from hwemu.tdx.result import Memory
from hwemu.tdx.states import KeyState
from hwemu.tdx.td import Td, Vcpu


@dataclass(frozen=True, slots=True)
class Config:
    """What the platform gives. Widths are bits of addresses.

    ``gpa_width`` None means what each TD asks for (48 or 52); a number holds for all TDs, and bit
    ``gpa_width - 1`` is SHARED. ``report_key`` makes the MAC of reports: no secret of any kind.
    """

    tdmrs: tuple[Tdmr, ...]
    hkids: range = range(32, 64)
    packages: int = 1
    lps: int = 64
    hpa_width: int = 46
    gpa_width: int | None = None
    tdcs_pages: int = 6
    tdvps_pages: int = 6
    report_key: bytes = bytes(32)

    def package(self, lp: int) -> int:
        """Return the package of a logical processor."""
        if not 0 <= lp < self.lps:
            raise ValueError(f"logical processor {lp}: there are {self.lps}")
        return lp * self.packages // self.lps


@dataclass(slots=True)
class KeyEntry:
    """A private HKID: ``dirty`` is a bitmap of packages whose caches may hold its lines."""

    state: KeyState = KeyState.FREE
    dirty: int = 0


#: TDH.PHYMEM.CACHE.WB was interrupted in a package when these HKIDs were flushed.
Interrupted = dict[int, tuple[int, ...]]


class Machine:
    """The state of a module, without its leaves."""

    def __init__(self, config: Config, memory: Memory) -> None:
        if config.tdcs_pages < 4 or config.tdvps_pages < 1 or config.packages < 1:
            raise ValueError(f"TDX machine: TDCS needs 4 pages, TDVPS and packages 1: {config}")
        self.config: Final = config
        self.memory = memory
        self.pamt = Pamt(config.tdmrs)
        self.keys = {hkid: KeyEntry() for hkid in config.hkids}
        self.tds: dict[int, Td] = {}  #: by hpa of the TDR
        self.vcpus: dict[int, Td] = {}  #: TD by hpa of the TDVPR
        self.locks = Locks()
        self.interrupted: Interrupted = {}
        self.host_interrupt = False  #: an interrupt waits: leaves that look for one stop there

    def td(self, tdr: int) -> Td:
        """Return the TD whose TDR is at ``tdr``; LookupError if there is none."""
        return self.tds[tdr]

    def vcpu(self, tdvpr: int) -> Vcpu:
        """Return the vCPU whose TDVPR is at ``tdvpr``; LookupError if there is none."""
        return self.vcpus[tdvpr].vcpus[tdvpr]

    def shared_bit(self, td: Td) -> int:
        """Return the SHARED bit of the TD's guest-physical addresses, as a mask."""
        width = self.config.gpa_width or (52 if td.params.wide else 48)
        return 1 << width - 1

    def key(self) -> tuple[object, ...]:
        """A hashable value equal for machines that behave alike."""
        return (
            self.pamt.key((td.owner, td.epoch) for td in self.tds.values()),
            tuple((hkid, one.state, one.dirty) for hkid, one in self.keys.items()),
            tuple(td.key() for _, td in sorted(self.tds.items())),
            self.locks.key(), tuple(sorted(self.interrupted.items())), self.host_interrupt,
        )  # fmt: skip

    def copy_to(self, other: Machine, memory: Memory) -> None:
        """Make ``other`` equal to this one, over ``memory``."""
        other.memory = memory
        other.pamt = self.pamt.copy()
        other.keys = {hkid: replace(one) for hkid, one in self.keys.items()}
        other.tds = {hpa: td.copy() for hpa, td in self.tds.items()}
        other.vcpus = {tdvpr: other.tds[td.hpa] for tdvpr, td in self.vcpus.items()}
        other.locks = self.locks.copy()
        other.interrupted = dict(self.interrupted)
        other.host_interrupt = self.host_interrupt


def tdmrs(ranges: Sequence[tuple[int, int]]) -> tuple[Tdmr, ...]:
    """Return TDMRs of (base, size) in bytes, nothing reserved."""
    return tuple(Tdmr(base, size) for base, size in ranges)
