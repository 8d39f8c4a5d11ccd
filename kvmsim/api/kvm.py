# SPDX-License-Identifier: GPL-2.0-or-later
"""The KVM device itself: what it offers, and where VMs come from."""

from __future__ import annotations

import os
import warnings
from typing import Self

from kvmsim.api.memory import GuestMemfd
from kvmsim.api.real import RealTransport
from kvmsim.api.transport import Memory, Transport
from kvmsim.api.vm import Vm
from kvmsim.uapi import (
    KVM_API_VERSION,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    KVM_GET_API_VERSION,
    KVM_GET_VCPU_MMAP_SIZE,
)


class Kvm:
    """A KVM: ``Kvm("/dev/kvm")`` is the kernel's, ``Kvm(Simulation(…))`` the simulator.

    Closing it closes everything that came from it.  OSError if there is no such device.
    """

    def __init__(self, device: str | os.PathLike[str] | Transport = "/dev/kvm") -> None:
        if isinstance(device, str | os.PathLike):
            device = RealTransport(os.fspath(device))
        self._transport: Transport | None = device
        self._vms: list[Vm] = []
        self._memories: list[Memory] = []
        self._files: list[GuestMemfd] = []
        try:
            self.handle = device.open()
            version = device.ioctl(self.handle, KVM_GET_API_VERSION)
            if version != KVM_API_VERSION:
                raise RuntimeError(f"{device.name}: API version {version}, not {KVM_API_VERSION}")
            self._run_size = device.ioctl(self.handle, KVM_GET_VCPU_MMAP_SIZE)
        except BaseException:
            self.close()
            raise

    @property
    def transport(self) -> Transport:
        """How the device is reached; ValueError when closed."""
        if self._transport is None:
            raise ValueError("this KVM is closed")
        return self._transport

    @property
    def name(self) -> str:
        """The device's name."""
        return self.transport.name

    def check_extension(self, cap: int) -> int:
        """What is offered of a KVM_CAP_*: 0 if it is missing, else 1 or what the number means."""
        return self.transport.ioctl(self.handle, KVM_CHECK_EXTENSION, cap)

    def create_vm(self, type: int = 0) -> Vm:
        """KVM_CREATE_VM; KVM_CAP_VM_TYPES is the mask of types."""
        handle = self.transport.ioctl(self.handle, KVM_CREATE_VM, type)
        vm = Vm(self.transport, handle, type, self._run_size)
        self._vms.append(vm)
        return vm

    def allocate(self, size: int) -> Memory:
        """Allocate ordinary memory, page-aligned and zero: a shared side of slots."""
        memory = self.transport.allocate(size)
        self._memories.append(memory)
        return memory

    def open_file(self, path: str | os.PathLike[str]) -> GuestMemfd:
        """Open a private file that has a name on a privfs mount, instead of creating one.

        It can be bound as a guest_memfd is. The 2022 series has no other way.
        """
        handle = self.transport.open_file(path)
        size = os.fstat(self.transport.fileno(handle)).st_size
        file = GuestMemfd(self.transport, handle, size, 0)
        self._files.append(file)
        return file

    def close(self) -> None:
        """Close every VM, guest_memfd and memory that came from here. Idempotent."""
        transport, self._transport = self._transport, None
        self.handle = -1
        if transport is None:
            return
        for vm in self._vms:
            vm.close()
            vm.close_files()
        for file in self._files:
            file.close()
        for memory in self._memories:
            memory.close()
        transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_transport", None) is not None:
            warnings.warn(f"unclosed {type(self).__name__}", ResourceWarning, 2, self)
            self.close()
