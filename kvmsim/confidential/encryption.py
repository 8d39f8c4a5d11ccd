# SPDX-License-Identifier: GPL-2.0-or-later
"""Keys of the guests of one host, and where the plaintext of their pages is.

A guest has its key from TDH.MNG.KEY.CONFIG to TDH.MNG.KEY.FREEID, from SNP_ACTIVATE to
SNP_DECOMMISSION. With ``Encrypt.VIEW`` plaintext lies in its file, and what others see is computed
when they look (:mod:`kvmsim.confidential.hostview`). With ``Encrypt.BACKING`` ciphertext lies in
its file, from the first leaf for a page on; leaves point to shadow pages, which are written back,
cleared and let go of before an invalidation is acknowledged. None: no key, and no page differs.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from hwemu.encryptedaccess import Actor, Encrypt, PrivateMemory, Technology
from hwemu.encryption import SECRET_BYTES, KeyTable, PoolFullError, ShadowPages
from kvmsim.confidential.platform import Platform
from kvmsim.guard import GuardRefusal, Leaf
from kvmsim.hostmem import HostMemory
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE

#: Whose the page at an hpa is: technology and key id, None for one of the host's own.
Holder = Callable[[int], tuple[Technology, int] | None]

SHADOW_SIZE: Final = 1 << 30
"""Bytes of plaintext that a guest with ``Encrypt.BACKING`` may have at a time; sparse."""

_AROUND: Final = 16
_DONTFORK, _DONTDUMP = 10, 16


class Encryption:
    """The memory controllers of one host (`Platform.hardware`; its lock is held)."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._keys: dict[Technology, KeyTable] = {}
        self._views: dict[Technology, PrivateMemory] = {}
        self.holders: list[Holder] = []
        self.guests: dict[tuple[Technology, int], GuestPages] = {}

    def keys(self, technology: Technology) -> KeyTable:
        """The key ids of ``technology``; the secret behind them was drawn at first use."""
        return self._keys.setdefault(technology, KeyTable(os.urandom(SECRET_BYTES)))

    def view(self, technology: Technology) -> PrivateMemory:
        """Pages whose plaintext lies in place, and what has been poisoned."""
        if technology not in self._views:
            keys = self.keys(technology)
            self._views[technology] = PrivateMemory(technology, keys, self._platform.memory)
        return self._views[technology]

    def holder(self, hpa: int) -> tuple[Technology, int] | None:
        """Whose the page at ``hpa`` is."""
        for ask in self.holders:
            if (found := ask(hpa)) is not None:
                return found
        return None


class ModuleMemory:
    """Memory as the TDX module has it: whole lines heal poison, and sealed pages are opened."""

    def __init__(self, platform: Platform) -> None:
        self._memory = platform.memory
        self._encryption = platform.hardware(Encryption, Encryption)

    def read(self, hpa: int, size: int) -> bytes:
        """Bytes within a page."""
        guest = self._sealed(hpa)
        return self._memory.read(hpa, size) if guest is None else guest.read_plain(hpa, size)

    def write(self, hpa: int, data: bytes) -> None:
        """Store bytes within a page."""
        guest = self._sealed(hpa)
        if guest is None:
            self._memory.write(hpa, data)
        else:
            guest.write_plain(hpa, data)

    def zero(self, hpa: int, npages: int) -> None:
        """MOVDIR64B over pages that a TD accepts."""
        self._memory.zero(hpa, npages)
        self._encryption.view(Technology.TDX).assign(hpa, npages)

    def copy(self, source: int, target: int) -> None:
        """A page over another."""
        self._memory.copy(source, target)
        self._encryption.view(Technology.TDX).assign(target, 1)

    def _sealed(self, hpa: int) -> GuestPages | None:
        return next((g for g in self._encryption.guests.values() if g.is_sealed(hpa)), None)


class _Pool:
    """Memory for shadow pages, in the arena and here."""

    def __init__(self, host: HostMemory, size: int) -> None:
        self._host = host
        fd = os.memfd_create("kvmsim shadow pages", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            self.memory = mmap.mmap(fd, size)
            for advice in (_DONTFORK, _DONTDUMP):
                self.memory.madvise(advice)
            self.hpa = host.place(fd, 0, size)
        finally:
            os.close(fd)
        self.size = size

    def close(self) -> None:
        self._host.retire(self.hpa, self.size)
        self.memory.close()


class GuestPages:
    """Key and pages of one guest, from its making to `close` (lock of VM and platform held)."""

    def __init__(
        self,
        platform: Platform,
        running: RunningVm,
        technology: Technology,
        key_id: int,
        mode: Encrypt | None,
    ) -> None:
        self.running = running
        self.mode = mode if technology.encrypts else None
        self.key_id = key_id
        self._encryption = platform.hardware(Encryption, Encryption)
        self._technology = technology
        self._keys = self._encryption.keys(technology)
        self._view = self._encryption.view(technology)
        self._shadow: ShadowPages | None = None
        self._pool: _Pool | None = None
        self._sealed = np.zeros(0, np.bool_)
        self._ram, size = platform.ram
        if self.mode is Encrypt.BACKING:
            self._pool = _Pool(platform.host, SHADOW_SIZE)
            view = memoryview(self._pool.memory)
            self._shadow = ShadowPages(self._keys, platform.memory, view, self._pool.hpa)
            self._backed = PrivateMemory(technology, self._keys, platform.memory, self._shadow)
            self._sealed = np.zeros(size >> PAGE_SHIFT, np.bool_)
        self._keys.create(key_id)
        self._encryption.guests[technology, key_id] = self

    def memory(self, hpa: int) -> PrivateMemory:
        """Where accesses to the page at ``hpa`` are decided."""
        return self._backed if self.is_sealed(hpa) else self._view

    def is_sealed(self, hpa: int) -> bool:
        """Whether ciphertext lies there, and the plaintext somewhere else."""
        page = hpa - self._ram >> PAGE_SHIFT
        return 0 <= page < len(self._sealed) and bool(self._sealed[page])

    def leaves(self, gfn: int, leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
        """What to store for the pages that the hardware lets in: those around ``gfn``, if only
        a shadow page has their plaintext. GuardRefusal (ENOMEM) if there is no shadow page.
        """
        if self._shadow is None:
            return leaves
        return tuple(run for leaf in leaves for run in self._opened(gfn, leaf))

    def _opened(self, gfn: int, leaf: Leaf) -> Iterator[Leaf]:
        assert self._shadow is not None
        start = max(leaf.gfn, gfn & -_AROUND)
        first, where, count = start, 0, 0
        for at in range(start, min(leaf.gfn + leaf.npages, (gfn & -_AROUND) + _AROUND)):
            hpa = leaf.hpa + (at - leaf.gfn << PAGE_SHIFT)
            try:
                shadow = self._shadow.open(self.key_id, hpa, plain=not self.is_sealed(hpa))
            except PoolFullError as error:
                raise GuardRefusal(errno.ENOMEM, f"gfn {at:#x}: {error}") from error
            self._seal(hpa, 1, sealed=True)
            if count and shadow != where + (count << PAGE_SHIFT):
                yield Leaf(first, count, where)
                count = 0
            if not count:
                first, where = at, shadow
            count += 1
        if count:
            yield Leaf(first, count, where)

    def poisoned(self, hpa: int, npages: int = 1) -> bool:
        """Whether the guest's access to one of these pages is a machine check."""
        return self._view.poisoned(hpa, npages * PAGE_SIZE)

    def forget(self, hpa: int, npages: int) -> None:
        """What these pages held is no more: TDH.MEM.PAGE.REMOVE, and what comes of a release.

        No vCPU reaches a shadow page of theirs.
        """
        self._view.assign(hpa, npages)
        if self._shadow is not None:
            self._shadow.drop(hpa, npages, write_back=False)
            self._seal(hpa, npages, sealed=False)

    def moved(self, old: int, new: int, npages: int) -> None:
        """They are at ``new``, and as poisoned as they were."""
        self._view.moved(old, new, npages)

    def release(self, hpa: int, npages: int) -> None:
        """They go to their owner, with what the guest stored last, as ciphertext."""
        if self._shadow is not None:
            self._shadow.drop(hpa, npages)
        self.forget(hpa, npages)

    def read_plain(self, hpa: int, size: int) -> bytes:
        """What the guest has at a sealed page."""
        return self._backed.read(Actor.OWNER, self.key_id, hpa, size).data or b""

    def write_plain(self, hpa: int, data: bytes) -> None:
        """Store for the guest at a sealed page."""
        self._backed.write(Actor.OWNER, self.key_id, hpa, data)

    def close(self) -> None:
        """The key is destroyed, and no plaintext is left behind; no vCPU runs again."""
        del self._encryption.guests[self._technology, self.key_id]
        self._keys.destroy(self.key_id)
        if self._shadow is not None and self._pool is not None:
            self._shadow.drop(self._ram, len(self._sealed), write_back=False)
            self._shadow.close()
            self._pool.close()
            self._shadow = self._pool = None
            self._sealed = np.zeros(0, np.bool_)

    def describe(self) -> dict[str, int | str]:
        """Key id, mode, and how many shadow pages are open."""
        told: dict[str, int | str] = {"key_id": self.key_id}
        told["encrypt"] = "none" if self.mode is None else self.mode.value
        if self._shadow is not None:
            told["shadow_pages"] = len(self._shadow)
        return told

    def _seal(self, hpa: int, npages: int, *, sealed: bool) -> None:
        first = hpa - self._ram >> PAGE_SHIFT
        self._sealed[max(first, 0) : max(first + npages, 0)] = sealed
