# SPDX-License-Identifier: GPL-2.0-or-later
"""The host of a guest of plain SEV: the model alone, since nobody's KVM runs one here.

Memory is encrypted by ASID and page address, and nobody writes down whose a page is. The second
stage is the host's, so what an attack there leads to is what the guest's key makes of the frame.
"""

from __future__ import annotations

from typing import Final

from hwemu.encryptedaccess import Actor, Technology
from hwemu.encryption import PAGE_SIZE, Buffer
from hwemu.snp.sev import Sev
from kvmsim.attack.bus import Bus
from kvmsim.attack.guest import FORGED, SECRET
from kvmsim.attack.outcome import Layer, Outcome, concealed, succeeds

_WORD: Final = 8
_FRAMES: Final = 4
_SECRET: Final = SECRET.to_bytes(_WORD, "little")
_FORGED: Final = FORGED.to_bytes(_WORD, "little")


class _Ram:
    def __init__(self) -> None:
        self._bytes = bytearray(_FRAMES * PAGE_SIZE)

    def read(self, hpa: int, length: int) -> bytes:
        return bytes(self._bytes[hpa : hpa + length])

    def write(self, hpa: int, data: Buffer) -> None:
        self._bytes[hpa : hpa + len(data)] = data


class SevHost:
    """Frame 0 holds the secret, frame 1 another page of the same guest's. gpas do not matter."""

    def __init__(self) -> None:
        self._bus = Bus(Technology.SEV, _Ram())

    def _prepared(self) -> Bus:
        self._bus.own_write(0, _SECRET.ljust(PAGE_SIZE, b"\0"))
        self._bus.own_write(PAGE_SIZE, _FORGED.ljust(PAGE_SIZE, b"\0"))
        return self._bus

    def read(self, gpa: int) -> Outcome:
        """SEV API: ciphertext."""
        return self._prepared().read(Actor.HOST, 0, _SECRET)

    def write(self, gpa: int) -> Outcome:
        """No integrity: the guest reads what its key makes of it."""
        return self._prepared().write(Actor.HOST, 0, _FORGED)

    def replay(self, gpa: int) -> Outcome:
        """No freshness either."""
        bus = self._prepared()
        old = bus.record(0, PAGE_SIZE)
        bus.own_write(0, _FORGED)
        bus.put_back(0, old)
        again = bus.own_read(0, _WORD)
        return succeeds("the old content") if again == _SECRET else succeeds("noise")

    def dma(self, gpa: int) -> Outcome:
        """A device is not asked for a key."""
        return self._prepared().write(Actor.DEVICE, 0, _FORGED)

    def alias(self, gpa: int, spare: int) -> Outcome:
        """Two gpas, one frame, one key."""
        seen = self._prepared().own_read(0, _WORD)
        return succeeds("the page at both gpas") if seen == _SECRET else _noise()

    def claim(self, gpa: int) -> Outcome:
        """Another ASID's key."""
        return self._prepared().read(Actor.OTHER, 0, _SECRET)

    def other_side(self, gpa: int) -> Outcome:
        """C-bit 0: no key."""
        return self._prepared().read(Actor.HOST, 0, _SECRET)

    def split(self, gpa: int) -> Outcome:
        """The leaf now leads to frame 1."""
        return self.remap(gpa)

    def remap(self, gpa: int) -> Outcome:
        """Another page of the guest's own, at this gpa."""
        seen = self._prepared().own_read(PAGE_SIZE, _WORD)
        return succeeds("another page's content") if seen == _FORGED else _noise()

    def refill(self, gpa: int) -> Outcome:
        """The frame is given back, cleared, and mapped again."""
        return self._prepared().write(Actor.HOST, 0, bytes(_WORD))

    def measured(self, image: bytes) -> bytes:
        """LAUNCH_MEASURE of a guest that is loaded with ``image``."""
        frames = _Frames(image)
        sev = Sev(frames, last_asid=1)
        handle = sev.launch_start(policy=0)
        sev.activate(handle, 1)
        sev.launch_update_data(handle, 0, 0, len(frames) * PAGE_SIZE)
        return sev.launch_measure(handle).measure


class _Frames:
    """The pages of an image as frames, for the AMD-SP."""

    def __init__(self, image: bytes) -> None:
        self._pages = [
            image[at : at + PAGE_SIZE].ljust(PAGE_SIZE, b"\0")
            for at in range(0, len(image), PAGE_SIZE)
        ]

    def __len__(self) -> int:
        return len(self._pages)

    def read(self, pfn: int) -> bytes:
        return self._pages[pfn]

    def write(self, pfn: int, contents: bytes) -> None:
        self._pages[pfn] = contents

    def zero(self, pfn: int) -> None:
        self._pages[pfn] = bytes(PAGE_SIZE)

    def copy(self, source: int, target: int) -> None:
        self._pages[target] = self._pages[source]


def _noise() -> Outcome:
    return concealed(Layer.MEMORY, "noise")
