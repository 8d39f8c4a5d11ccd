# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory as the host's own software and devices meet it, by host-physical address.

Whose a page is the hardware's tables say (PAMT, RMP, the hypervisor's page states), and what comes
of an access `hwemu.encryptedaccess.RULES`. Nothing here is the guest's own way to its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hwemu.encryptedaccess import RULES, Actor, Met, Operation, Outcome, Technology
from kvmsim.confidential.encryption import Encryption, GuestPages
from kvmsim.confidential.platform import Platform
from kvmsim.mmu import Zapped
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE


class _Part(NamedTuple):
    hpa: int
    size: int
    technology: Technology | None  #: None: a page of the host's own
    key_id: int


class HostView:
    """The memory of one host. Pages of a file must be there: no owner hears of a touch."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._encryption = platform.hardware(Encryption, Encryption)

    def read(self, hpa: int, size: int, actor: Actor = Actor.HOST) -> Met:
        """What ``actor`` reads: its outcome, and the bytes if there are any.

        Of a range in which outcomes differ it is the first that is not ``DONE``; data is None if
        any part is refused. `KeyDestroyedError` for pages of a guest that is gone, which are its
        still.
        """
        outcome, data = Outcome.DONE, bytearray()
        with self._platform.lock:
            for part in self._parts(hpa, size):
                met = self._read(part, actor)
                if outcome is Outcome.DONE:
                    outcome = met.outcome
                if met.data is None:
                    return met
                data += met.data
        return Met(outcome, bytes(data))

    def write(self, hpa: int, data: bytes, actor: Actor = Actor.HOST) -> Met:
        """Store what may be stored; if part of it is refused nothing is.

        No lock is held: where a page is poisoned it waits for its guest's vCPUs.
        """
        met, poisoned = self.store(hpa, data, actor)
        self.settle(poisoned)
        return met

    def store(
        self, hpa: int, data: bytes, actor: Actor = Actor.HOST
    ) -> tuple[Met, list[tuple[RunningVm, int, int]]]:
        """The same without the wait, also under a VM's lock; what is left is for `settle`."""
        outcome, poisoned = Outcome.DONE, list[tuple[RunningVm, int, int]]()
        with self._platform.lock:
            parts = list(self._parts(hpa, len(data)))
            for part in parts:
                if part.technology is None:
                    continue
                found = RULES[part.technology, actor, Operation.WRITE].outcome
                if found not in (Outcome.POISONS, Outcome.GARBLES):
                    return Met(found), poisoned
                outcome = found
            for part in parts:
                piece = data[part.hpa - hpa :][: part.size]
                guest = self._write(part, piece, actor)
                if guest is not None:
                    poisoned.append((guest.running, part.hpa, part.size))
        return Met(outcome), poisoned

    def settle(self, poisoned: list[tuple[RunningVm, int, int]]) -> None:
        """Have guests find out at their next access (no lock held)."""
        for running, hpa, size in poisoned:
            take_leaves(running, hpa, size)

    def _read(self, part: _Part, actor: Actor) -> Met:
        if part.technology is None:
            return Met(Outcome.DONE, self._platform.memory.read(part.hpa, part.size))
        guest = self._encryption.guests.get((part.technology, part.key_id))
        if guest is None:
            memory = self._encryption.view(part.technology)
        else:
            memory = guest.memory(part.hpa)
            rule = RULES[part.technology, actor, Operation.READ].outcome
            if guest.mode is None and rule is Outcome.CIPHERTEXT:
                return Met(Outcome.DONE, self._platform.memory.read(part.hpa, part.size))
        return memory.read(actor, part.key_id, part.hpa, part.size)

    def _write(self, part: _Part, data: bytes, actor: Actor) -> GuestPages | None:
        """The guest whose leaves must go, so that its next access is seen."""
        if part.technology is None:
            self._platform.memory.write(part.hpa, data)
            return None
        self._encryption.view(part.technology).write(actor, part.key_id, part.hpa, data)
        return self._encryption.guests.get((part.technology, part.key_id))

    def _parts(self, hpa: int, size: int) -> Iterator[_Part]:
        at, end = hpa, hpa + size
        while at < end:
            upto = min(end, (at & -PAGE_SIZE) + PAGE_SIZE)
            technology, key_id = self._encryption.holder(at) or (None, 0)
            yield _Part(at, upto - at, technology, key_id)
            at = upto


def hpa_of(running: RunningVm, gpa: int, size: int = 1) -> int:
    """Where private memory at ``gpa`` lies; ValueError unless all ``size`` bytes are there.

    VM's lock held; while it is, nobody takes them away.
    """
    gfn = gpa >> PAGE_SHIFT
    slot = running.vm.mmu.slots.find(gfn)
    if slot is not None and slot.file is not None:
        page = slot.private_page(gfn)
        for file, start, end, hpa in running.private.pieces():
            if file == slot.file and start <= page < end:
                found = hpa + (page - start << PAGE_SHIFT)
                npages = -(-(gpa % PAGE_SIZE + size) // PAGE_SIZE)
                inside = gfn + npages <= slot.end_gfn and page + npages <= end
                if inside and running.host.resident(found, npages * PAGE_SIZE) == [(0, npages)]:
                    return found + gpa % PAGE_SIZE
    raise ValueError(f"gpa {gpa:#x}+{size:#x}: no private memory of a file is there now")


def take_leaves(running: RunningVm, hpa: int, size: int) -> None:
    """Have the guest fault at its next access to these host pages (no lock held)."""
    half = running.vm.kind.half(private=True)
    gone, leaves = [], 0
    with running.lock:
        for file, start, end, base in running.private.pieces():
            first, last = max(hpa, base), min(hpa + size, base + (end - start << PAGE_SHIFT))
            if first >= last:
                continue
            low = start + (first - base >> PAGE_SHIFT)
            high = start + (last - 1 - base >> PAGE_SHIFT) + 1
            for _, gfn, stop in running.vm.mmu.slots.find_file(file, low, high):
                found = running.stage2.whole_leaves(gfn << PAGE_SHIFT | half, stop - gfn)
                leaves += running.stage2.zap(*found)
                gone.append(found)
    running.flush_zapped(Zapped(tuple(gone), leaves))
