# SPDX-License-Identifier: GPL-2.0-or-later
"""Fill private memory before a VM runs: map its pages and copy source pages into them.

kvm_gmem_populate() of virt/kvm/guest_memfd.c (v6.18), which KVM_TDX_INIT_MEM_REGION and
KVM_SEV_SNP_LAUNCH_UPDATE stand on; the vCPU ioctl with a source page that the series' threads
asked for. Host software cannot write to private memory, so this is the only way in, and it is
shut once the first vCPU may run.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from functools import partial
from typing import Final

from kvmsim.attributes import Attributes
from kvmsim.confidential.base import Confidential
from kvmsim.effect import Access, Installed, LeaveGuest, NeedPage, PageGrant, Retry
from kvmsim.effect import RetryReason as Why
from kvmsim.exits import MemoryFaultExit
from kvmsim.fault import Fault
from kvmsim.memoryuse import MemoryUse, memory_use
from kvmsim.mmu import GuardRefusal
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE, KvmError
from kvmsim.vmm.launch import LaunchPage

_OPERATION: Final = "populate"
#: Seconds between two looks at whether the owner is still there.
_LOOK: Final = 0.2


def _never() -> bool:
    return False


class Populate:
    """Fills private pages of one VM that has not run."""

    def __init__(self, running: RunningVm) -> None:
        self.running: RunningVm = running
        self._done = Attributes()
        self._answered = threading.Condition(running.lock)

    def __call__(self, gpa: int, source: bytes, *, measure: bool = False) -> None:
        """Copy ``source``, whole pages, to bytes [gpa, gpa + len(source)).

        KvmError: EINVAL (started, unaligned, not private), EEXIST (populated before and not
        punched since), EOPNOTSUPP for ``measure``, which needs a kind of VM that measures its
        launch; LinkError as the owner's allocation refuses.  Pages before the one that failed
        stay filled, as the kernel's do.
        """
        size = len(source)
        if measure:
            raise KvmError(
                errno.EOPNOTSUPP, _OPERATION, "no launch is measured here", start=gpa, size=size
            )
        with self.running.lock:
            self._check(gpa, size)
            start, end = gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT
            parts = [
                (slot.file, slot.private_page(first), slot.private_page(last))
                for slot, first, last in self.running.vm.mmu.slots.find_range(start, end)
                if slot.file is not None
            ]
        for part in parts:  # so that a fault maps what lies around it, too
            self.running.private.allocate(*part)
        at = gpa
        while at < gpa + size:
            at += self._fill(at, memoryview(source)[at - gpa :], _never)

    def load(
        self, page: LaunchPage, guard: Confidential, interrupted: Callable[[], bool] = _never
    ) -> None:
        """Add a page to a guest whose hardware loads, and mostly measures, what it starts with.

        Errors as of a call; KvmError too if the hardware refuses, and (EINTR) if ``interrupted``
        becomes true while the owner lets it wait: nothing was added then.
        """
        size = len(page.data)
        with self.running.lock:
            if page.vcpu is None:
                self._check(page.gpa, size)
            try:
                staged = guard.stage(page)
            except GuardRefusal as refusal:
                raise KvmError(
                    refusal.errno, _OPERATION, refusal.reason, start=page.gpa, size=size
                ) from refusal
            if not staged:
                return
        try:
            self._fill(page.gpa, None, interrupted)
        except BaseException:
            with self.running.lock:
                guard.unstage(page)
            raise

    # --- checks (lock held) -------------------------------------------------------------------

    def _check(self, gpa: int, size: int) -> None:
        for number, reason, refused in _CHECKS:
            if refused(self, gpa, size):
                raise KvmError(number, _OPERATION, reason, start=gpa, size=size)

    def use(self, gpa: int, size: int) -> MemoryUse:
        """Pages of slots there, by attribute."""
        mmu = self.running.vm.mmu
        return memory_use(mmu, gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT)

    def filled(self, gpa: int, size: int) -> bool:
        """Whether a page there was populated; a punch, or a conversion, took its leaf away."""
        mapped, half = self.running.stage2.mapped, self.running.vm.kind.half(private=True)
        runs = self._done.runs(gpa >> PAGE_SHIFT, (gpa + size) >> PAGE_SHIFT)
        return any(
            run.value and any(mapped(run.start << PAGE_SHIFT | half, run.end - run.start))
            for run in runs
        )

    # --- one fault ----------------------------------------------------------------------------

    def _fill(self, gpa: int, source: memoryview | None, interrupted: Callable[[], bool]) -> int:
        """Map the page at ``gpa`` and copy to it and what was mapped behind it; bytes copied.

        Without a source the hardware has filled the one page.
        """
        half = self.running.vm.kind.half(private=True)
        fault = Fault(0, gpa | half, Access(write=True, length=PAGE_SIZE))
        again = False
        while True:
            grants: list[PageGrant] = []
            with self.running.lock:
                effect = self.running.vm.begin_fault(fault)
                send = None
                if isinstance(effect, NeedPage):
                    arrived = partial(self._arrived, grants)
                    send = self.running.ask_page(effect, arrived, again=again)
            if send is not None:
                send()
            with self.running.lock:
                if send is not None:
                    effect = self.running.vm.page_arrived(
                        fault, self._wait(gpa, grants, interrupted)
                    )
                # The copy is under the lock that a zap takes: what is invalidated is invalidated
                # before, and then there is no leaf, or after it.
                if isinstance(effect, Installed) and source is None:
                    self._done.set(gpa >> PAGE_SHIFT, (gpa >> PAGE_SHIFT) + 1, 1)
                    return PAGE_SIZE
                if isinstance(effect, Installed) and source is not None:
                    return self._copy(gpa, source, effect)
            again = effect == Retry(Why.INSTANCE)
            if isinstance(effect, LeaveGuest):
                raise self._refused(gpa, effect)
            if self.running.stopping:
                raise KvmError(errno.EIO, _OPERATION, self.running.stop_reason, start=gpa)

    def _copy(self, gpa: int, source: memoryview, installed: Installed) -> int:
        where = gpa | self.running.vm.kind.half(private=True)
        npages = installed.npages - (where - installed.gpa >> PAGE_SHIFT)
        at, hpa, npages = next(self.running.stage2.mapped(where, npages))
        assert at == where, "the first leaf is the one that was just stored"
        count = min(npages * PAGE_SIZE, len(source))
        self.running.host.write(hpa, bytes(source[:count]))
        self._done.set(gpa >> PAGE_SHIFT, (gpa + count) >> PAGE_SHIFT, 1)
        return count

    def _wait(
        self, gpa: int, grants: list[PageGrant], interrupted: Callable[[], bool]
    ) -> PageGrant:
        while not grants:
            if self.running.stopping:
                raise KvmError(errno.EIO, _OPERATION, self.running.stop_reason, start=gpa)
            if interrupted():
                raise KvmError(errno.EINTR, _OPERATION, "a signal is pending", start=gpa)
            self._answered.wait(_LOOK)
        return grants.pop()

    def _arrived(self, grants: list[PageGrant], grant: PageGrant) -> None:
        """Take the owner's answer (lock held)."""
        grants.append(grant)
        self._answered.notify_all()

    def _refused(self, gpa: int, left: LeaveGuest) -> KvmError:
        exit = left.exit
        number, reason = errno.EFAULT, type(exit).__name__
        if isinstance(exit, MemoryFaultExit):
            number, reason = exit.errno or errno.EFAULT, exit.reason or reason
        return KvmError(number, _OPERATION, reason, start=gpa, size=PAGE_SIZE)


_Check = tuple[int, str, Callable[[Populate, int, int], bool]]

# The kernel's callers refuse a VM that was finalized before they look at anything else.
_CHECKS: Final[tuple[_Check, ...]] = (
    (errno.EINVAL, "the VM has been started", lambda p, gpa, size: p.running.started),
    (errno.EINVAL, "not page-aligned", lambda p, gpa, size: bool((gpa | size) % PAGE_SIZE)),
    (errno.EINVAL, "no source page", lambda p, gpa, size: size <= 0),
    (
        errno.EINVAL,
        "not all of it is private memory: set its attribute first",
        lambda p, gpa, size: p.use(gpa, size) != MemoryUse(private=size >> PAGE_SHIFT),
    ),
    (errno.EEXIST, "part of it was populated before", lambda p, gpa, size: p.filled(gpa, size)),
)
