# SPDX-License-Identifier: GPL-2.0-or-later
"""The host of a guest of plain SEV: the model alone, since nobody's KVM runs one here.

Memory is encrypted by ASID and page address, and nobody writes down whose a page is. The second
stage is the host's, so what an attack there leads to is what the guest's key makes of the frame.
"""

from __future__ import annotations

import os
from typing import Final

from hwemu.encryptedaccess import Actor, Met, PrivateMemory, Technology
from hwemu.encryption import PAGE_SIZE, SECRET_BYTES, Buffer, KeyTable
from hwemu.snp.sev import Sev
from kvmsim.attack.bus import Bus
from kvmsim.attack.guest import FORGED, SECRET
from kvmsim.attack.outcome import Layer, Outcome, concealed, succeeds

_VICTIM, _RIVAL = 1, 2  # key ids
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


class _Frames:
    """Memory of the guest with key id `_VICTIM`."""

    def __init__(self) -> None:
        keys = KeyTable(os.urandom(SECRET_BYTES))
        keys.create(_VICTIM)
        keys.create(_RIVAL)
        self._memory = PrivateMemory(Technology.SEV, keys, _Ram())

    def read(self, hpa: int, size: int, actor: Actor = Actor.HOST) -> Met:
        using = _RIVAL if actor is Actor.OTHER else None
        return self._memory.read(actor, _VICTIM, hpa, size, using=using)

    def write(self, hpa: int, data: bytes, actor: Actor = Actor.HOST) -> Met:
        using = _RIVAL if actor is Actor.OTHER else None
        return self._memory.write(actor, _VICTIM, hpa, data, using=using)


class SevHost:
    """Frame 0 holds the secret, frame 1 another page of the same guest's. gpas do not matter."""

    def __init__(self) -> None:
        self._frames = _Frames()
        self._bus = Bus(self._frames)

    def _prepared(self) -> Bus:
        for hpa, word in ((0, _SECRET), (PAGE_SIZE, _FORGED)):
            self._frames.write(hpa, word.ljust(PAGE_SIZE, b"\0"), Actor.OWNER)
        return self._bus

    def read(self, gpa: int) -> Outcome:
        """SEV API: ciphertext."""
        return self._prepared().read(0, _SECRET)

    def write(self, gpa: int) -> Outcome:
        """No integrity: the guest reads what its key makes of it."""
        return self._prepared().write(0, _FORGED)

    def replay(self, gpa: int) -> Outcome:
        """No freshness either."""
        page, other = (word.ljust(PAGE_SIZE, b"\0") for word in (_SECRET, _FORGED))
        return self._bus.replay(0, page, other)

    def dma(self, gpa: int) -> Outcome:
        """A device is not asked for a key."""
        return self._prepared().write(0, _FORGED, Actor.DEVICE)

    def alias(self, gpa: int, spare: int) -> Outcome:
        """Two gpas, one frame, one key."""
        self._prepared()
        seen = self._frames.read(0, _WORD, Actor.OWNER).data
        return succeeds("the page at both gpas") if seen == _SECRET else _noise()

    def claim(self, gpa: int) -> Outcome:
        """Another ASID's key."""
        return self._prepared().read(0, _SECRET, Actor.OTHER)

    def other_side(self, gpa: int) -> Outcome:
        """C-bit 0: no key."""
        return self._prepared().read(0, _SECRET)

    def split(self, gpa: int) -> Outcome:
        """The leaf now leads to frame 1."""
        return self.remap(gpa)

    def remap(self, gpa: int) -> Outcome:
        """Another page of the guest's own, at this gpa."""
        self._prepared()
        seen = self._frames.read(PAGE_SIZE, _WORD, Actor.OWNER).data
        return succeeds("another page's content") if seen == _FORGED else _noise()

    def refill(self, gpa: int) -> Outcome:
        """The frame is given back, cleared, and mapped again."""
        return self._prepared().write(0, bytes(_WORD))

    def measured(self, image: bytes) -> bytes:
        """LAUNCH_MEASURE of a guest that is loaded with ``image``."""
        frames = _Image(image)
        sev = Sev(frames, last_asid=1)
        handle = sev.launch_start(policy=0)
        sev.activate(handle, 1)
        sev.launch_update_data(handle, 0, 0, len(frames) * PAGE_SIZE)
        return sev.launch_measure(handle).measure


class _Image:
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
