# SPDX-License-Identifier: GPL-2.0-or-later
"""The host at a frame of a guest that runs: as hardware's tables and keys let it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from hwemu.encryptedaccess import Actor
from kvmsim.attack.bus import Bus
from kvmsim.attack.guest import FORGED, SECRET, Ended, LabGuest
from kvmsim.attack.outcome import AttackError, Layer, Outcome, noticed, succeeds
from kvmsim.confidential.hostview import HostView
from kvmsim.confidential.platform import Platform
from kvmsim.uapi import EHWPOISON, PAGE_SHIFT

_SECRET: Final = SECRET.to_bytes(8, "little")
_FORGED: Final = FORGED.to_bytes(8, "little")
MACHINE_CHECK: Final = noticed(Layer.MEMORY, "#MC")


class FrameHost(ABC):
    """Contents; who may map a frame is the technology's own."""

    def __init__(self, guest: LabGuest, platform: Platform) -> None:
        self._guest = guest
        self._platform = platform
        self._bus = Bus(HostView(platform))

    def read(self, gpa: int) -> Outcome:
        """A load of the host's."""
        return self._bus.read(self._owned(gpa), _SECRET)

    def write(self, gpa: int) -> Outcome:
        """A store of the host's; where it poisons the page, the guest has to meet that."""
        ended = self._bus.write(self._owned(gpa), _FORGED)
        if ended == MACHINE_CHECK:
            self._meets_poison(gpa)
        elif self._guest.peek(gpa) != SECRET:
            raise AttackError(f"{ended}, and the guest finds something else at {gpa:#x}")
        return ended

    def replay(self, gpa: int) -> Outcome:
        """What the host sees now, stored again when the guest has gone on."""
        hpa = self._owned(gpa)
        noted = self._bus.frames.read(hpa, len(_SECRET))
        if noted.data is None:
            return self._bus.read(hpa, _SECRET)
        self._guest.poke(gpa, FORGED)
        ended = self._bus.write(hpa, noted.data)
        if ended != MACHINE_CHECK and self._guest.peek(gpa) == SECRET:
            return succeeds("the old content")
        return ended

    def dma(self, gpa: int) -> Outcome:
        """A store of a device's."""
        return self._bus.write(self._owned(gpa), _FORGED, Actor.DEVICE)

    @abstractmethod
    def _owned(self, gpa: int) -> int:
        """Where the page is; AttackError unless the hardware says that it is the guest's."""

    def _meets_poison(self, gpa: int) -> None:
        try:
            answer = self._guest.ask(f"peek {gpa:#x}")
        except Ended:
            left = self._guest.faults[-1] if self._guest.faults else None
            if (
                left is not None
                and left.gpa >> PAGE_SHIFT == gpa >> PAGE_SHIFT
                and (left.errno == EHWPOISON)
            ):
                return
            raise
        raise AttackError(f"the guest goes on with a poisoned page: {answer}")
