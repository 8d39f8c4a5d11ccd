# SPDX-License-Identifier: GPL-2.0-or-later
"""``/dev/kvm`` itself: the host, its VMs, and the requests that need none.

kvm_dev_ioctl() of virt/kvm/kvm_main.c and kvm_arch_dev_ioctl() of arch/x86/kvm/x86.c (v6.18).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final, Self

from kvmsim.confidential.platform import Platform
from kvmsim.control import Control
from kvmsim.device import cpuid, machinecheck, msrs, sysattributes
from kvmsim.device.caller import Caller
from kvmsim.device.capabilities import VM_TYPES, Asked, check_extension
from kvmsim.device.gmem import FLAGS, GuestMemfds
from kvmsim.device.gmemfile import IN_PLACE_FLAGS, GmemFile
from kvmsim.device.report import vm_report
from kvmsim.device.results import FdKind, NewFd, Result
from kvmsim.device.table import Call, Level, Row, dispatch, table
from kvmsim.device.vm import VmDevice
from kvmsim.hostmem import HostMemory
from kvmsim.kind import VmKind
from kvmsim.running import RunningVm
from kvmsim.uapi import (
    KVM_API_VERSION,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    KVM_GET_API_VERSION,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_MAX_CPUID_ENTRIES,
    KVM_MAX_IO_MSRS,
    KVM_RUN_MMAP_SIZE,
    Abi,
    requests,
    structs,
)
from kvmsim.views.gather import vm_tables


class KvmDevice:
    """A simulated host with KVM: what a descriptor of /dev/kvm stands for.

    ``memory``: a directory on a privfs mount, for KVM_CREATE_GUEST_MEMFD; where there is no mount,
    nor that. ``abi``: today's
    interface, or that of the 2022 series. ``host``: the arena to use; of the process, if it has
    one. ``running``: the class that runs the VMs. ``in_place``: guest_memfds convert in place and
    keep the types (kvm.gmem_in_place_conversion of the series that is not merged), for all VMs.
    ``types``: what KVM_CREATE_VM takes, by number, if not what the interface has.
    ``control``: who tells ``kvmsim stat`` of the VMs. ``gmem_flags``: GUEST_MEMFD_FLAG_* that are
    offered where the mount has them. ``platform``: the confidential hardware of ``host``, if it
    has some. Any number of descriptors may stand for one device.
    """

    def __init__(
        self,
        memory: str | os.PathLike[str] | None = None,
        *,
        abi: Abi = "upstream",
        host: HostMemory | None = None,
        running: type[RunningVm] = RunningVm,
        in_place: bool = False,
        types: Mapping[int, VmKind] | None = None,
        control: Control | None = None,
        gmem_flags: int = FLAGS,
        platform: Platform | None = None,
    ) -> None:
        if in_place and abi == "v7":
            raise ValueError("v7 has no conversion in place")
        if types is not None and abi == "v7":
            raise ValueError("v7 has no VM types")
        self.types = VM_TYPES[abi] if types is None else types
        self.in_place = in_place
        self._control = control
        self.abi: Abi = abi
        self.running = running
        self._owns_host = host is None
        self.host = HostMemory() if host is None else host
        self.platform = Platform(self.host) if platform is None else platform
        self.gmem = None if memory is None else GuestMemfds(memory, gmem_flags)
        self.owners: dict[tuple[int, int], object] = {}
        self._lock = threading.Lock()
        self._vms: set[VmDevice] = set()

    def ioctl(self, request: int, argument: int, caller: Caller) -> Result:
        """One ioctl on a descriptor of /dev/kvm."""
        return dispatch(self, Level.SYSTEM, TABLE, request, argument, caller)

    def private_file(self, fd: int) -> GmemFile | None:
        """What answers for an open descriptor of this process, if it is a file of a VM of ours."""
        try:
            status = os.fstat(fd)
        except OSError:  # its mount is dead
            return None
        vm = self.owners.get((status.st_dev, status.st_ino))
        return GmemFile(vm, fd) if isinstance(vm, VmDevice) else None

    @property
    def mapped(self) -> set[tuple[int, int]]:
        """The files that the host may map, by (st_dev, st_ino)."""
        return set() if self.gmem is None else self.gmem.mapped

    def release(self) -> None:
        """A descriptor is gone: nothing goes with it."""

    def ends(self, vm: VmDevice) -> None:
        """The VM is about to be no more."""
        if self._control is not None:
            self._control.remove(vm.running.label)

    def forget(self, vm: VmDevice) -> None:
        """The VM is no more."""
        with self._lock:
            self._vms.discard(vm)

    def close(self) -> None:
        """Give the host back; every VM must have been released, else RuntimeError."""
        if self._vms:
            raise RuntimeError(f"{len(self._vms)} VMs of the device have open descriptors")
        if self._owns_host:
            self.host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- requests -----------------------------------------------------------------------------

    def get_api_version(self, call: Call) -> int:
        """KVM_GET_API_VERSION."""
        _no_argument(call)
        return KVM_API_VERSION

    def create_vm(self, call: Call) -> NewFd:
        """KVM_CREATE_VM."""
        kind = self.types.get(call.argument)
        if kind is None:
            raise call.refused(errno.EINVAL, f"VM type {call.argument} is not there")
        vm = VmDevice(self, kind, call.caller)
        with self._lock:
            self._vms.add(vm)
        if self._control is not None:
            tables = partial(vm_tables, vm.running)
            self._control.add(vm.running.label, partial(vm_report, vm), tables)
        return NewFd(FdKind.CONTROL, "anon_inode:kvm-vm", vm)

    def check_extension(self, call: Call) -> int:
        """KVM_CHECK_EXTENSION."""
        return check_extension(call.argument, self.asked(None))

    def asked(self, kind: VmKind | None) -> Asked:
        """What KVM_CHECK_EXTENSION's answers depend on; ``kind`` of a VM."""
        flags = None
        if self.gmem is not None and not self.gmem.missing:
            flags = IN_PLACE_FLAGS if self.in_place else self.gmem.flags
        return Asked(self.abi, kind, flags, self.in_place, self.types)

    def get_vcpu_mmap_size(self, call: Call) -> int:
        """KVM_GET_VCPU_MMAP_SIZE."""
        _no_argument(call)
        return KVM_RUN_MMAP_SIZE

    def get_supported_cpuid(self, call: Call) -> None:
        """KVM_GET_SUPPORTED_CPUID."""
        _write_cpuid(call, cpuid.SUPPORTED)

    def get_emulated_cpuid(self, call: Call) -> None:
        """KVM_GET_EMULATED_CPUID."""
        _write_cpuid(call, cpuid.EMULATED)

    def get_msr_index_list(self, call: Call) -> None:
        """KVM_GET_MSR_INDEX_LIST."""
        _write_indices(call, msrs.SAVED)

    def get_msr_feature_index_list(self, call: Call) -> None:
        """KVM_GET_MSR_FEATURE_INDEX_LIST."""
        _write_indices(call, tuple(msrs.FEATURES))

    def get_msrs(self, call: Call) -> int:
        """KVM_GET_MSRS of features: how many could be read, from the first on."""
        (count,) = call.read(structs.MSRS)
        if count >= KVM_MAX_IO_MSRS:
            raise call.refused(errno.E2BIG, f"{count} registers at once")
        data = call.fetch(count * structs.MSR_ENTRY.size, structs.MSRS.size)
        done = []
        for index, _ in structs.MSR_ENTRY.iter_unpack(data):
            if index not in msrs.FEATURES:
                break
            done.append(structs.MSR_ENTRY.pack(index, msrs.FEATURES[index]))
        call.write(b"".join(done), structs.MSRS.size)
        return len(done)

    def get_mce_cap_supported(self, call: Call) -> None:
        """KVM_X86_GET_MCE_CAP_SUPPORTED."""
        call.write(structs.U64_VALUE.pack(machinecheck.SUPPORTED))

    def has_device_attr(self, call: Call) -> None:
        """KVM_HAS_DEVICE_ATTR."""
        sysattributes.has(call, self.types)

    def get_device_attr(self, call: Call) -> None:
        """KVM_GET_DEVICE_ATTR."""
        sysattributes.get(call, self.types)


def _no_argument(call: Call) -> None:
    if call.argument:
        raise call.refused(errno.EINVAL, "the argument must be 0")


def _write_cpuid(call: Call, entries: Sequence[cpuid.Entry]) -> None:
    """kvm_dev_ioctl_get_cpuid()."""
    (room,) = call.read(structs.CPUID2)
    if room < 1 or min(room, KVM_MAX_CPUID_ENTRIES) < len(entries):
        raise call.refused(errno.E2BIG, f"room for {room} entries, there are {len(entries)}")
    call.write(b"".join(entry.pack() for entry in entries), structs.CPUID2.size)
    call.write(structs.CPUID2.pack(len(entries)))


def _write_indices(call: Call, indices: tuple[int, ...]) -> None:
    (room,) = call.read(structs.MSR_LIST)
    call.write(structs.MSR_LIST.pack(len(indices)))
    if room < len(indices):
        raise call.refused(errno.E2BIG, f"room for {room} indices, there are {len(indices)}")
    packed = b"".join(index.to_bytes(4, "little") for index in indices)
    call.write(packed, structs.MSR_LIST.size)


TABLE: Final = table(
    (
        Row(KVM_GET_API_VERSION, KvmDevice.get_api_version, "12", "EINVAL: argument not 0"),
        Row(KVM_CREATE_VM, KvmDevice.create_vm,
            "types 0, KVM_X86_SW_PROTECTED_VM, KVM_X86_SNP_VM, KVM_X86_TDX_VM, and 30: gpa bit 39 "
            "selects the side; v7: 0 is that",
            "EINVAL: other types"),
        Row(KVM_CHECK_EXTENSION, KvmDevice.check_extension, "only what is there"),
        Row(KVM_GET_VCPU_MMAP_SIZE, KvmDevice.get_vcpu_mmap_size, "three pages",
            "EINVAL: argument not 0"),
        Row(requests.KVM_GET_SUPPORTED_CPUID, KvmDevice.get_supported_cpuid,
            "the engine's processor", "E2BIG: no room"),
        Row(requests.KVM_GET_EMULATED_CPUID, KvmDevice.get_emulated_cpuid, "nothing",
            "E2BIG: no room"),
        Row(requests.KVM_GET_MSR_INDEX_LIST, KvmDevice.get_msr_index_list,
            "all that KVM_SET_MSRS takes back", "E2BIG: no room; the count is told"),
        Row(requests.KVM_GET_MSR_FEATURE_INDEX_LIST, KvmDevice.get_msr_feature_index_list,
            "two", "E2BIG: no room; the count is told"),
        Row(requests.KVM_GET_MSRS, KvmDevice.get_msrs, "feature registers",
            "E2BIG: 256 or more"),
        Row(requests.KVM_X86_GET_MCE_CAP_SUPPORTED, KvmDevice.get_mce_cap_supported, "all"),
        Row(requests.KVM_HAS_DEVICE_ATTR, KvmDevice.has_device_attr,
            "the same", "ENXIO: others"),
        Row(requests.KVM_GET_DEVICE_ATTR, KvmDevice.get_device_attr,
            "KVM_X86_XCOMP_GUEST_SUPP: no XSAVE; where there are SNP guests, "
            "KVM_X86_SEV_VMSA_FEATURES: none", "ENXIO: others"),
    )
)  # fmt: skip
"""By request number."""
