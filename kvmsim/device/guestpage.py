# SPDX-License-Identifier: GPL-2.0-or-later
"""A few bytes of guest memory that a device model reads or writes, through a gfn_to_pfn cache.

:mod:`kvmsim.gpc` decides; here the owner is asked and bytes are copied. Each use checks the cache
and copies under the VM's lock, in which every invalidation makes it invalid before it is
acknowledged: what was taken away is never written.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from kvmsim.asking import Asking
from kvmsim.device.dirtylog import LoggingStage2
from kvmsim.effect import NeedPage, Retry, RetryReason
from kvmsim.gpc import GfnToPfnCache, GpcEffect, Refreshed
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE


class GuestPage:
    """``operation`` is for messages. Calls by one thread at a time, which may wait."""

    def __init__(self, running: RunningVm, operation: str) -> None:
        self._running = running
        self._asking = Asking(running, operation)
        self._cache = GfnToPfnCache()

    @property
    def active(self) -> bool:
        """Whether it has a gpa."""
        return self._cache.active

    def activate(self, gpa: int, length: int) -> int:
        """Use ``length`` bytes at ``gpa`` (of either side) from now on: 0 or an errno.

        EINVAL, if they cross a page, leaves it as it was before; after others :meth:`update` may
        be tried again.
        """
        mmu = self._running.vm.mmu
        with self._running.lock:
            effect = self._cache.activate(mmu, gpa & ~mmu.kind.side_bit, length)
        return self._settle(effect)

    def deactivate(self) -> None:
        """Let go. Idempotent."""
        with self._running.lock:
            self._cache.deactivate(self._running.vm.mmu)

    def update(self, change: Callable[[bytes], bytes]) -> int:
        """Replace the bytes by ``change`` of them, at once for every vCPU: 0 or an errno.

        EFAULT: private, read-only, or no memory there; EAGAIN: it is being taken away; else why
        the owner has no page. Nothing is written then. No vCPU of the VM may be in guest code.
        """
        cache, mmu, host = self._cache, self._running.vm.mmu, self._running.host
        while True:
            with self._running.lock:
                if cache.check(mmu, write=True):
                    assert cache.hpa is not None
                    host.write(cache.hpa, change(host.read(cache.hpa, cache.length)))
                    if isinstance(mmu.stage2, LoggingStage2):
                        mmu.stage2.mark(cache.gpa >> PAGE_SHIFT)
                    return 0
                if cache.check(mmu):
                    return errno.EFAULT
                effect = cache.refresh(mmu)
            number = self._settle(effect)
            if number:
                return number

    def read(self) -> bytes | None:
        """The bytes, None: private, no memory there, or it is being taken away."""
        cache, mmu, host = self._cache, self._running.vm.mmu, self._running.host
        while True:
            with self._running.lock:
                if cache.check(mmu):
                    assert cache.hpa is not None
                    return host.read(cache.hpa, cache.length)
                effect = cache.refresh(mmu)
            if self._settle(effect):
                return None

    def _settle(self, effect: GpcEffect) -> int:
        """Go on until the cache is refreshed, or cannot be."""
        again = False
        while not isinstance(effect, Refreshed):
            if isinstance(effect, NeedPage):
                grant = self._asking.page(effect, again=again)
                with self._running.lock:
                    effect = self._cache.page_arrived(self._running.vm.mmu, grant)
                    if isinstance(effect, Refreshed) and effect.hpa is not None:
                        self._running.host.admit(effect.hpa & -PAGE_SIZE, PAGE_SIZE)
                continue
            if effect.reason is RetryReason.IN_PROGRESS:
                return errno.EAGAIN
            again = effect == Retry(RetryReason.INSTANCE)
            with self._running.lock:
                effect = self._cache.refresh(self._running.vm.mmu)
        return effect.errno
