# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's hands on shared pages of a file that converts in place, on a VM at work.

:mod:`kvmsim.hostaccess` decides; here the owner is asked and bytes are copied. Whoever holds a
:class:`HostPin` has no pointer: each use looks, under the VM's lock, whether the pin still holds,
and copies under the same lock. So whoever takes the pages away waits for no host.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from typing import Final, Self

from kvmsim.asking import Asking
from kvmsim.effect import NeedPage, Retry, RetryReason
from kvmsim.hostaccess import HostAccess, HostEffect, HostRefused, Opened
from kvmsim.region import PrivateFile
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE, KvmError

_OPERATION: Final = "host access"


class HostPin:
    """Bytes [offset, offset + size) of a file in hand, until :meth:`close`.

    While it is held KVM_SET_MEMORY_ATTRIBUTES2 to private answers EAGAIN. A punch takes it away.
    """

    def __init__(self, running: RunningVm, access: HostAccess, offset: int, size: int) -> None:
        self.offset = offset
        self.size = size
        self._running = running
        self._access = access
        self._after: Callable[[], None] | None = None

    @property
    def held(self) -> bool:
        """Whether its pages are still there: neither closed nor punched."""
        with self._running.lock:
            return self._access.held(self._running.vm.mmu)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; KvmError: EFAULT if they are not in hand (any more)."""
        with self._running.lock:
            return b"".join(
                self._running.host.read(hpa, size) for hpa, size in self._parts(offset, length)
            )

    def write(self, offset: int, data: bytes) -> None:
        """Store in the file; KvmError as :meth:`read`, and nothing is stored."""
        at = 0
        with self._running.lock:
            for hpa, size in list(self._parts(offset, len(data))):
                self._running.host.write(hpa, data[at : at + size])
                at += size

    def on_close(self, after: Callable[[], None]) -> None:
        """Have ``after`` called once, when this was closed."""
        self._after = after

    def close(self) -> None:
        """Let go. Idempotent."""
        with self._running.lock:
            self._access.close(self._running.vm.mmu)
            after, self._after = self._after, None
        if after is not None:
            after()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (hpa, bytes) of a range in order (lock held)."""
        end = offset + length
        if not self.offset <= offset <= end <= self.offset + self.size:
            raise _refused(errno.EFAULT, "not all of it is in hand", offset, length)
        if not self._access.held(self._running.vm.mmu):
            raise _refused(errno.EFAULT, "the pages were taken away", offset, length)
        guard = self._running.guard
        for place in self._access.places:
            start = place.page << PAGE_SHIFT
            first, last = max(offset, start), min(end, start + place.npages * PAGE_SIZE)
            if first < last:
                hpa = place.hpa + first - start
                if guard is not None and not guard.host_reaches(hpa, last - first):
                    raise _refused(errno.EFAULT, "the guest has not shared it", offset, length)
                yield hpa, last - first


class HostPages:
    """Where the host gets pages of one VM's files. ``changes`` is held over each conversion."""

    def __init__(self, running: RunningVm, changes: threading.Lock) -> None:
        self._running = running
        self._changes = changes
        self._asking = Asking(running, _OPERATION)

    def pin(self, file: PrivateFile, offset: int, size: int, *, write: bool = True) -> HostPin:
        """Have the pages of bytes [offset, offset + size) in hand (no lock held).

        KvmError: EFAULT where an index is private, EINVAL outside the file, else why the owner
        has no page.
        """
        access = HostAccess(file.id, offset >> PAGE_SHIFT, -(-(offset + size) // PAGE_SIZE), write)
        mmu = self._running.vm.mmu
        effect: HostEffect = Retry(RetryReason.INVALIDATED)
        again = False
        try:
            while isinstance(effect, Retry | NeedPage):
                if isinstance(effect, NeedPage):
                    grant = self._asking.page(effect, again=again)
                    with self._running.lock:
                        effect = self._admit(access.page_arrived(mmu, grant))
                    continue
                again = effect.reason is RetryReason.INSTANCE
                if effect.reason is RetryReason.IN_PROGRESS:
                    with self._changes:
                        pass  # the conversion has ended
                with self._running.lock:
                    effect = self._admit(access.step(mmu))
        except BaseException:
            with self._running.lock:
                access.close(mmu)
            raise
        if isinstance(effect, HostRefused):
            raise _refused(effect.errno, effect.reason, effect.page << PAGE_SHIFT, PAGE_SIZE)
        return HostPin(self._running, access, offset, size)

    def _admit(self, effect: HostEffect) -> HostEffect:
        """Let what is in hand be touched (lock held)."""
        for place in effect.places if isinstance(effect, Opened) else ():
            self._running.host.admit(place.hpa, place.npages * PAGE_SIZE)
        return effect


def _refused(number: int, reason: str, offset: int, size: int) -> KvmError:
    return KvmError(number, _OPERATION, reason, start=offset, size=size)
