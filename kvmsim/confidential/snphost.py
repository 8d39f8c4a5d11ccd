# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host has for SEV-SNP: its RMP and its AMD-SP."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from hwemu.encryptedaccess import Technology
from hwemu.snp.asids import AsidState
from hwemu.snp.firmware import Firmware
from hwemu.snp.hostops import NewState, rmpupdate
from hwemu.snp.rmp import Rmp
from kvmsim.confidential.encryption import Encryption
from kvmsim.confidential.platform import Platform
from kvmsim.guard import GuardRefusal
from kvmsim.uapi import PAGE_SHIFT

_FIRMWARE_KEY: Final = 0xFFFF  #: of the AMD-SP's own pages; no ASID is as large


@dataclass(frozen=True, slots=True)
class SnpHost:
    """The RMP and the AMD-SP of one host (the platform's lock held)."""

    rmp: Rmp
    firmware: Firmware

    def update(self, pfn: int, new: NewState) -> None:
        """RMPUPDATE; GuardRefusal if it fails."""
        answer = rmpupdate(self.rmp, pfn, new)
        if not answer.ok:
            raise GuardRefusal(errno.EIO, f"RMPUPDATE of frame {pfn:#x}: {answer}")

    def free_asid(self) -> int:
        """An ASID that nobody has; what caches hold of others is flushed first if it must be
        (sev_flush_asids()).
        """
        for flushed in (False, True):
            if flushed:
                self.firmware.wbinvd()
                self.firmware.df_flush()
            for asid in range(1, self.rmp.max_asid + 1):
                if self.firmware.asid_state(asid) is AsidState.FREE:
                    return asid
        raise GuardRefusal(errno.EBUSY, f"all {self.rmp.max_asid} ASIDs are guests'")


def make_host(platform: Platform) -> SnpHost:
    """An RMP over the host's memory, all of it the hypervisor's, and a firmware after SNP_INIT."""
    base, size = platform.ram
    rmp = Rmp(size >> PAGE_SHIFT, start=base >> PAGE_SHIFT)
    firmware = Firmware(rmp, platform.frames)
    firmware.init()
    encryption = platform.hardware(Encryption, Encryption)
    encryption.keys(Technology.SNP).create(_FIRMWARE_KEY)

    def holder(hpa: int) -> tuple[Technology, int] | None:
        """The ASID in the RMP; pages of the AMD-SP have none."""
        pfn = hpa >> PAGE_SHIFT
        if not rmp.covered(pfn) or not (entry := rmp.entry(pfn)).assigned:
            return None
        return Technology.SNP, entry.asid or _FIRMWARE_KEY

    encryption.holders.append(holder)
    return SnpHost(rmp, firmware)
