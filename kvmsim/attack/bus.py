# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames as the memory controller shows them, to those who are not their guest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

from hwemu.encryptedaccess import Actor, PrivateMemory, Technology
from hwemu.encryptedaccess import Outcome as Met
from hwemu.encryption import SECRET_BYTES, Buffer, KeyTable
from kvmsim.attack.outcome import Layer, Outcome, concealed, noticed, refused, succeeds

#: Key ids of the victim and of another guest.
VICTIM, RIVAL = 1, 2
_OUTCOMES: Final[Mapping[Met, Outcome]] = MappingProxyType(
    {
        Met.ZEROS: concealed(Layer.MEMORY, "zeros"),
        Met.CIPHERTEXT: concealed(Layer.MEMORY, "ciphertext"),
        Met.NOISE: concealed(Layer.MEMORY, "noise"),
        Met.MACHINE_CHECK: noticed(Layer.MEMORY, "#MC"),
        Met.PAGE_FAULT: refused(Layer.RMP, "#PF(RMP)"),
        Met.NESTED_FAULT: refused(Layer.RMP, "#NPF(RMP)"),
        Met.STAGE2_ABORT: refused(Layer.EL2, "SIGSEGV"),
        Met.IO_FAULT: refused(Layer.IOMMU, "I/O page fault"),
    }
)


class Memory(Protocol):
    """Bytes by host-physical address."""

    def read(self, hpa: int, length: int) -> Buffer:
        """Bytes [``hpa``, ``hpa + length``)."""

    def write(self, hpa: int, data: Buffer) -> None:
        """Store bytes."""


class Bus:
    """Accesses to frames of a guest that `technology` protects, with keys of this boot."""

    def __init__(self, technology: Technology, memory: Memory) -> None:
        keys = KeyTable(os.urandom(SECRET_BYTES))
        keys.create(VICTIM)
        keys.create(RIVAL)
        self._memory = PrivateMemory(technology, keys, memory)

    def read(self, actor: Actor, hpa: int, secret: bytes) -> Outcome:
        """Try to read ``secret`` at ``hpa``."""
        using = RIVAL if actor is Actor.OTHER else None
        met = self._memory.read(actor, VICTIM, hpa, len(secret), using=using)
        if met.data == secret:
            return succeeds("the guest's bytes")
        return _OUTCOMES[met.outcome]

    def write(self, actor: Actor, hpa: int, data: bytes) -> Outcome:
        """Try to have the guest read something else than it wrote at ``hpa``."""
        before = self._memory.read(Actor.OWNER, VICTIM, hpa, len(data)).data
        using = RIVAL if actor is Actor.OTHER else None
        met = self._memory.write(actor, VICTIM, hpa, data, using=using)
        if met.outcome in _OUTCOMES:
            return _OUTCOMES[met.outcome]
        after = self._memory.read(Actor.OWNER, VICTIM, hpa, len(data))
        if after.outcome in _OUTCOMES:
            return _OUTCOMES[after.outcome]
        if after.data == before:
            return concealed(Layer.MEMORY, "nothing changed")
        return succeeds("the host's bytes" if after.data == data else "noise")

    def record(self, hpa: int, length: int) -> bytes:
        """What the host can note of memory, to put it back later; b"" for nothing."""
        return self._memory.read(Actor.HOST, VICTIM, hpa, length).data or b""

    def put_back(self, hpa: int, data: bytes) -> None:
        """Store what was recorded."""
        self._memory.write(Actor.HOST, VICTIM, hpa, data)

    def own_read(self, hpa: int, length: int) -> bytes | None:
        """What the guest reads there; None: a machine check."""
        return self._memory.read(Actor.OWNER, VICTIM, hpa, length).data

    def own_write(self, hpa: int, data: bytes) -> None:
        """The guest stores."""
        self._memory.write(Actor.OWNER, VICTIM, hpa, data)
