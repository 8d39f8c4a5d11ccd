# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames as the host's software and devices meet them, and what that comes to."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

from hwemu.encryptedaccess import Actor, Met
from hwemu.encryptedaccess import Outcome as Happened
from kvmsim.attack.outcome import Layer, Outcome, concealed, noticed, refused, succeeds

_OUTCOMES: Final[Mapping[Happened, Outcome]] = MappingProxyType(
    {
        Happened.ZEROS: concealed(Layer.MEMORY, "zeros"),
        Happened.CIPHERTEXT: concealed(Layer.MEMORY, "ciphertext"),
        Happened.NOISE: concealed(Layer.MEMORY, "noise"),
        Happened.MACHINE_CHECK: noticed(Layer.MEMORY, "#MC"),
        Happened.PAGE_FAULT: refused(Layer.RMP, "#PF(RMP)"),
        Happened.NESTED_FAULT: refused(Layer.RMP, "#NPF(RMP)"),
        Happened.STAGE2_ABORT: refused(Layer.EL2, "SIGSEGV"),
        Happened.IO_FAULT: refused(Layer.IOMMU, "I/O page fault"),
    }
)


class Frames(Protocol):
    """Memory by host-physical address (:class:`kvmsim.confidential.hostview.HostView`)."""

    def read(self, hpa: int, size: int, actor: Actor = Actor.HOST) -> Met:
        """What ``actor`` reads."""

    def write(self, hpa: int, data: bytes, actor: Actor = Actor.HOST) -> Met:
        """What comes of a store."""


class Bus:
    """Deeds against what lies at ``hpa``."""

    def __init__(self, frames: Frames) -> None:
        self.frames = frames

    def read(self, hpa: int, secret: bytes, actor: Actor = Actor.HOST) -> Outcome:
        """Try to read ``secret``."""
        met = self.frames.read(hpa, len(secret), actor)
        return succeeds("the guest's bytes") if met.data == secret else _OUTCOMES[met.outcome]

    def write(self, hpa: int, data: bytes, actor: Actor = Actor.HOST) -> Outcome:
        """Try to have the guest read ``data``, or at least something else than it wrote."""
        met = self.frames.write(hpa, data, actor)
        if met.outcome in _OUTCOMES:
            return _OUTCOMES[met.outcome]
        after = self.frames.read(hpa, len(data), Actor.OWNER)
        if after.data is None:
            return _OUTCOMES[after.outcome]
        return succeeds("the host's bytes" if after.data == data else "noise")

    def replay(self, hpa: int, old: bytes, new: bytes) -> Outcome:
        """Note what is there when the guest has ``old``, put it back when it has ``new``."""
        size = len(old)
        self.frames.write(hpa, old, Actor.OWNER)
        noted = self.frames.read(hpa, size)
        if noted.data is None:
            return _OUTCOMES[noted.outcome]
        self.frames.write(hpa, new, Actor.OWNER)
        ended = self.write(hpa, noted.data)
        again = self.frames.read(hpa, size, Actor.OWNER)
        return succeeds("the old content") if again.data == old else ended
