# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver of the ioctls that load pages into a confidential guest before it runs.

kvm_gmem_populate() of virt/kvm/guest_memfd.c (v6.18) and its callers: page by page, a signal is
looked for in between, and what was loaded stays.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from kvmsim.confidential.base import Confidential
from kvmsim.device.caller import Efault
from kvmsim.device.pending import Call as PendingCall
from kvmsim.device.pending import Outcome
from kvmsim.device.results import Failure
from kvmsim.populate import Populate
from kvmsim.uapi import KvmError
from kvmsim.vmm.launch import LaunchPage
from privfs.notifier.lane import LinkError


class Loading:
    """One call, in a thread of its own, since an owner may let it wait.

    ``page(n)`` is the n-th of ``npages`` pages; it may raise Efault. ``finish(done, failure)``
    tells the caller how far it came, and why no farther, and is the ioctl's answer; Efault.
    """

    def __init__(
        self,
        populate: Populate,
        guard: Confidential,
        npages: int,
        page: Callable[[int], LaunchPage],
        finish: Callable[[int, Failure | None], Outcome],
    ) -> None:
        self._populate = populate
        self._guard = guard
        self._npages = npages
        self._page = page
        self._finish = finish
        self._pending = PendingCall(self._cancel)
        self._cancelled = False

    def begin(self) -> PendingCall:
        """Start; the outcome comes to what is returned."""
        name = f"load {self._populate.running.label}"
        threading.Thread(target=self._drive, name=name).start()
        return self._pending

    def _cancel(self, _: PendingCall) -> None:
        self._cancelled = True

    def _drive(self) -> None:
        outcome: Outcome = Failure(errno.EIO, "internal error")
        try:
            outcome = self._load()
        finally:
            self._pending.finish(outcome)

    def _load(self) -> Outcome:
        failure = None
        done = 0
        while done < self._npages and failure is None:
            if self._cancelled:
                failure = Failure(errno.EINTR, "a signal is pending")
                break
            failure = self._one(done)
            done += failure is None
        try:
            return self._finish(done, failure)
        except Efault as error:
            return Failure(errno.EFAULT, str(error))

    def _one(self, number: int) -> Failure | None:
        try:
            self._populate.load(self._page(number), self._guard, lambda: self._cancelled)
        except KvmError as error:
            return Failure(error.errno, str(error))
        except Efault as error:
            return Failure(errno.EFAULT, str(error))
        except LinkError as error:
            return Failure(errno.EIO, str(error))
        return None
