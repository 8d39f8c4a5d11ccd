# SPDX-License-Identifier: GPL-2.0-or-later
"""The clock of KVM's guests: pages of theirs that are written when they ask for it by an MSR.

kvm_write_system_time(), kvm_guest_time_update(), kvm_set_guest_paused() and
kvm_write_wall_clock() of arch/x86/kvm/x86.c (v6.18). As there a page is written again when the
clock was set, not because memory came back: a guest that converts or punches its clock page writes
the MSR again.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from kvmsim import pvclock
from kvmsim.device.guestpage import GuestPage
from kvmsim.device.msrs import MsrStore
from kvmsim.uapi import KvmError
from privfs.notifier.lane import LinkError

if TYPE_CHECKING:
    from kvmsim.device.vm import VmDevice

log = logging.getLogger(__name__)

_SYSTEM_TIME: Final = (pvclock.MSR_KVM_SYSTEM_TIME, pvclock.MSR_KVM_SYSTEM_TIME_NEW)
_WALL_CLOCK: Final = (pvclock.MSR_KVM_WALL_CLOCK, pvclock.MSR_KVM_WALL_CLOCK_NEW)


class KvmClock:
    """The clock page of one vCPU, and the wall clock that it may ask for."""

    def __init__(self, vm: VmDevice, msrs: MsrStore) -> None:
        self._vm = vm
        self._page = GuestPage(vm.running, "kvmclock")
        self._wall = GuestPage(vm.running, "kvmclock")
        self._wanted = False
        self._wall_wanted = False
        self._stopped = False
        for index in (*_SYSTEM_TIME, *_WALL_CLOCK):
            msrs.watch(index, partial(self._written, index))

    @property
    def active(self) -> bool:
        """Whether the guest has a clock page (KVM: pv_time.active)."""
        return self._page.active

    def want(self, *, stopped: bool = False) -> None:
        """Write the page before the guest goes on, if there is one (KVM_REQ_CLOCK_UPDATE)."""
        self._stopped = self._stopped or stopped
        self._wanted = True

    def enter(self) -> None:
        """What was wanted, before an entry: runner thread, no vCPU of the VM is in guest code."""
        if self._wanted:
            self._wanted = self._page.active and not self._done(self._page, self._time_info)
        if self._wall_wanted:
            self._wall_wanted = not self._done(self._wall, self._wall_clock)
            if not self._wall_wanted:
                self._wall.deactivate()

    def close(self) -> None:
        """Let go of the pages."""
        self._page.deactivate()
        self._wall.deactivate()

    def _written(self, index: int, value: int) -> None:
        if index in _WALL_CLOCK:
            self._wall_wanted = self._use(self._wall, value, pvclock.WALL_CLOCK.size)
            return
        self._page.deactivate()
        if value & pvclock.ENABLED:
            gpa = value & ~pvclock.ENABLED
            self._wanted = self._use(self._page, gpa, pvclock.TIME_INFO.size)

    def _use(self, page: GuestPage, gpa: int, size: int) -> bool:
        try:
            number = page.activate(gpa, size)
        except (KvmError, LinkError) as error:  # the VM ends
            log.info("%s", error)
            return False
        if number not in (0, errno.EAGAIN):
            log.info("kvmclock at gpa %#x+%#x: %s", gpa, size, errno.errorcode.get(number))
        return page.active

    def _done(self, page: GuestPage, change: Callable[[bytes], bytes]) -> bool:
        """Write a page; False: try again at the next entry."""
        try:
            return page.update(change) != errno.EAGAIN
        except (KvmError, LinkError) as error:  # the VM ends
            log.info("%s", error)
            return True

    def _time_info(self, old: bytes) -> bytes:
        clock = self._vm.clock
        stopped, self._stopped = self._stopped, False
        scale = pvclock.Scale.of(clock.tsc_khz)
        # RDTSC of the guest is the host's, whatever MSR_IA32_TSC was set to.
        return pvclock.time_info(old, clock.tsc(), clock.kvmclock_ns, scale, stopped=stopped)

    def _wall_clock(self, old: bytes) -> bytes:
        clock = self._vm.clock
        return pvclock.wall_clock(old, clock.realtime_ns() - clock.kvmclock_ns)
