# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's descriptor: its life, its vCPUs, and the ioctls that are not about memory.

kvm_vm_ioctl() of virt/kvm/kvm_main.c and kvm_arch_vm_ioctl() of arch/x86/kvm/x86.c (v6.18). The
VM lives until the last of its descriptors is released, its own and those of its vCPUs.
"""

from __future__ import annotations

import errno
import itertools
import threading
from typing import TYPE_CHECKING, Final

from hwemu.cpu.api import MsrExit
from kvmsim import exits
from kvmsim.device.caller import Caller
from kvmsim.device.capabilities import CLOCK_FLAGS, MAX_VCPUS, check_extension
from kvmsim.device.clock import Clock
from kvmsim.device.hypercall import FORWARDABLE
from kvmsim.device.launch import make_launch
from kvmsim.device.memory import VmMemory
from kvmsim.device.results import Failure, FdKind, NewFd, Result
from kvmsim.device.table import Call, Level, dispatch
from kvmsim.device.vcpu import VcpuDevice
from kvmsim.device.vmtable import TABLE
from kvmsim.kind import VmKind
from kvmsim.uapi import (
    KVM_CAP_EXIT_HYPERCALL,
    KVM_CAP_MAX_VCPU_ID,
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CLOCK_HOST_TSC,
    KVM_CLOCK_REALTIME,
    KVM_CLOCK_TSC_STABLE,
    KVM_MAX_IRQ_ROUTES,
    KVM_MAX_VCPU_IDS,
    KVM_RUN_MMAP_SIZE,
    KVMSIM_CAP_MAP_GPA_RANGES,
    PAGE_SIZE,
    structs,
)

if TYPE_CHECKING:
    from kvmsim.device.system import KvmDevice

_numbers: Final = itertools.count(1)
_MIN_MMU_PAGES: Final = 64  # KVM_MIN_ALLOC_MMU_PAGES
_TSS_LIMIT: Final = 0xFFFF_FFFF - 3 * PAGE_SIZE + 1


class VmDevice:
    """A VM of ``kind``, made by a caller with address space ``mm``."""

    def __init__(self, system: KvmDevice, kind: VmKind, caller: Caller) -> None:
        self.system = system
        self.host = system.host
        self.abi = system.abi
        self.kind = kind
        self.mm = caller.mm
        self.clock = Clock()
        self.forwarded_hypercalls = 0
        self.irqchip = False
        self._boot_cpu_id = 0
        self._max_vcpu_ids = 0  # 0: nobody has chosen
        self._lock = threading.Lock()  # KVM's kvm->lock
        self._vcpus: dict[int, VcpuDevice] = {}
        self._by_index: list[VcpuDevice] = []
        self._pins = 1
        self._released = False
        self._started = False
        self.running = system.running(
            self.host, 0, f"kvm{next(_numbers)}", abi=self.abi, kind=kind, supervisor=self,
            in_place=system.in_place,
        )  # fmt: skip
        self.memory = VmMemory(self, system.owners)
        self.launch = make_launch(self)

    # --- the descriptor -----------------------------------------------------------------------

    def ioctl(self, request: int, argument: int, caller: Caller) -> Result:
        """One ioctl on the VM's descriptor."""
        if caller.mm != self.mm or self.dead:
            return Failure(errno.EIO, self.dead or "the VM belongs to another address space")
        return dispatch(self, Level.VM, TABLE, request, argument, caller)

    @property
    def dead(self) -> str:
        """Why no ioctl works any more (kvm->vm_dead); empty if they do."""
        return self.running.stop_reason if self.running.stopping else ""

    def release(self) -> None:
        """The VM's own descriptor is gone; its vCPUs may live on."""
        with self._lock:
            if self._released:
                return
            self._released = True
        self.unpin()

    def pin(self) -> None:
        """Something is under way that needs the VM."""
        with self._lock:
            self._pins += 1

    def unpin(self) -> None:
        """One descriptor fewer; the last takes the VM with it."""
        with self._lock:
            self._pins -= 1
            last = self._pins == 0
        if last:
            self.system.ends(self)
            self.running.close()
            self.memory.close()
            self.system.forget(self)

    def start(self) -> None:
        """Have the runner run, once."""
        with self._lock:
            if not self._started and not self.running.stopping:
                self._started = True
                self.running.start(self._exited)

    # --- in the runner thread -----------------------------------------------------------------

    def _exited(self, index: int, left: exits.Exit) -> bool:
        self._by_index[index].exited(left)
        return True

    def enter(self, index: int) -> bool:
        """See :class:`kvmsim.running.Supervisor`."""
        return self._by_index[index].enter()

    def msr(self, index: int, access: MsrExit) -> int | None:
        """See :class:`kvmsim.running.Supervisor`."""
        return self._by_index[index].msr(access)

    def ended(self, why: str) -> None:
        """See :class:`kvmsim.running.Supervisor`."""
        for vcpu in list(self._by_index):
            vcpu.ended(why)

    # --- vCPUs --------------------------------------------------------------------------------

    def create_vcpu(self, call: Call) -> NewFd:
        """KVM_CREATE_VCPU."""
        number = call.argument & 0xFFFF_FFFF
        if call.argument >= KVM_MAX_VCPU_IDS:
            raise call.refused(errno.EINVAL, f"vCPU id {number}: below {KVM_MAX_VCPU_IDS}")
        with self._lock:
            if len(self._vcpus) >= MAX_VCPUS:
                raise call.refused(errno.EINVAL, f"there are {MAX_VCPUS} vCPUs already")
            self._max_vcpu_ids = self._max_vcpu_ids or KVM_MAX_VCPU_IDS
            if number >= self._max_vcpu_ids:
                raise call.refused(
                    errno.EINVAL, f"vCPU id {number}: KVM_CAP_MAX_VCPU_ID says {self._max_vcpu_ids}"
                )
            refused = None if self.launch is None else self.launch.vcpu_refused()
            if refused is not None:
                raise call.refused(*refused)
            if number in self._vcpus:
                raise call.refused(errno.EEXIST, f"there is a vCPU {number}")
            engine = self.running.add_vcpu()
            bsp = number == self._boot_cpu_id
            vcpu = VcpuDevice(self, number, engine, bsp=bsp)
            self._vcpus[number] = vcpu
            self._by_index.append(vcpu)
            self._pins += 1
        name = f"anon_inode:kvm-vcpu:{number}"
        return NewFd(FdKind.MAPPABLE, name, vcpu, size=KVM_RUN_MMAP_SIZE)

    @property
    def vcpus(self) -> tuple[VcpuDevice, ...]:
        """In the order of their making, which is that of their engines."""
        return tuple(self._by_index)

    def set_boot_cpu_id(self, call: Call) -> None:
        """KVM_SET_BOOT_CPU_ID."""
        with self._lock:
            if self._vcpus:
                raise call.refused(errno.EBUSY, "there are vCPUs already")
            limit = self._max_vcpu_ids or KVM_MAX_VCPU_IDS
            if call.argument > limit:
                raise call.refused(errno.EINVAL, f"vCPU id {call.argument}: no more than {limit}")
            self._boot_cpu_id = call.argument

    # --- capabilities -------------------------------------------------------------------------

    def check_extension(self, call: Call) -> int:
        """KVM_CHECK_EXTENSION of this VM."""
        return check_extension(call.argument, self.system.asked(self.kind))

    def enable_cap(self, call: Call) -> None:
        """KVM_ENABLE_CAP."""
        cap, flags, *arguments = call.read(structs.ENABLE_CAP)
        if flags:
            raise call.refused(errno.EINVAL, f"flags {flags:#x}: none is known")
        if cap == KVM_CAP_EXIT_HYPERCALL:
            if arguments[0] & ~FORWARDABLE:
                raise call.refused(errno.EINVAL, f"hypercalls {arguments[0]:#x}: only number 12")
            self.forwarded_hypercalls = arguments[0]
        elif cap == KVM_CAP_SPLIT_IRQCHIP and self.launch is not None:
            self._split_irqchip(call, arguments[0])
        elif cap == KVM_CAP_MAX_VCPU_ID:
            with self._lock:
                limit = arguments[0]
                if limit > KVM_MAX_VCPU_IDS or self._max_vcpu_ids not in (0, limit):
                    raise call.refused(errno.EINVAL, f"limit {limit}: out of range, or set before")
                if limit < self._boot_cpu_id:
                    raise call.refused(
                        errno.EINVAL, f"limit {limit}: the boot CPU has id {self._boot_cpu_id}"
                    )
                self._max_vcpu_ids = limit
        elif cap == KVMSIM_CAP_MAP_GPA_RANGES and self.abi == "upstream":
            if arguments[0] > 1:
                raise call.refused(errno.EINVAL, f"argument {arguments[0]:#x}: 1 for on, 0 for off")
            self.running.batches = bool(arguments[0])
        else:
            raise call.refused(errno.EINVAL, f"capability {cap} cannot be enabled")

    def _split_irqchip(self, call: Call, pins: int) -> None:
        """KVM_CAP_SPLIT_IRQCHIP: to a guest what KVM_CREATE_IRQCHIP is."""
        if pins > KVM_MAX_IRQ_ROUTES:
            raise call.refused(errno.EINVAL, f"{pins} pins of IOAPICs")
        with self._lock:
            if self.irqchip or self._vcpus:
                raise call.refused(errno.EEXIST, "there is one, or there are vCPUs already")
            self.irqchip = True

    # --- chips and clocks ---------------------------------------------------------------------

    def create_irqchip(self, call: Call) -> None:
        """KVM_CREATE_IRQCHIP: from here on HLT and INIT wait inside KVM_RUN."""
        with self._lock:
            if self.irqchip:
                raise call.refused(errno.EEXIST, "it was called before")
            if self._vcpus:
                raise call.refused(errno.EINVAL, "there are vCPUs already")
            self.irqchip = True

    def set_tss_addr(self, call: Call) -> None:
        """KVM_SET_TSS_ADDR: only VMX needs one."""
        if call.argument > _TSS_LIMIT:
            raise call.refused(errno.EINVAL, "three pages do not fit below 4 GiB")

    def set_identity_map_addr(self, call: Call) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: only VMX needs one."""
        call.read(structs.U64_VALUE)
        with self._lock:
            if self._vcpus:
                raise call.refused(errno.EINVAL, "there are vCPUs already")

    def set_nr_mmu_pages(self, call: Call) -> None:
        """KVM_SET_NR_MMU_PAGES: checked; second-stage tables are not limited by it."""
        if call.argument < _MIN_MMU_PAGES:
            raise call.refused(errno.EINVAL, f"{call.argument} pages, {_MIN_MMU_PAGES} are few")

    def get_clock(self, call: Call) -> None:
        """KVM_GET_CLOCK."""
        flags = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC
        now = self.clock.kvmclock_ns
        call.write(structs.CLOCK_DATA.pack(now, flags, self.clock.realtime_ns(), self.clock.tsc()))

    def set_clock(self, call: Call) -> None:
        """KVM_SET_CLOCK."""
        clock, flags, realtime, _ = call.read(structs.CLOCK_DATA)
        if flags & ~CLOCK_FLAGS:
            raise call.refused(errno.EINVAL, f"flags {flags:#x}: not all are known")
        if flags & KVM_CLOCK_REALTIME:
            clock += max(self.clock.realtime_ns() - realtime, 0)
        self.clock.set_kvmclock(clock)
        for vcpu in list(self._by_index):
            vcpu.clock.want()

    def get_tsc_khz(self, call: Call) -> int:
        """KVM_GET_TSC_KHZ."""
        return self.clock.tsc_khz

    def check_tsc_khz(self, call: Call) -> None:
        """KVM_SET_TSC_KHZ: 0 and the host's own frequency."""
        if call.argument not in (0, self.clock.tsc_khz):
            raise call.refused(errno.EINVAL, "the time stamp counter cannot be scaled")

    def create_device(self, call: Call) -> None:
        """KVM_CREATE_DEVICE."""
        kind, *_ = call.read(structs.CREATE_DEVICE)
        raise call.refused(errno.ENODEV, f"no device of type {kind}")
