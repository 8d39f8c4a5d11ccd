# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM: its memory slots, attributes and vCPUs."""

from __future__ import annotations

from typing import Self

from kvmsim.api.confidential import SnpLaunch, TdLaunch
from kvmsim.api.memory import GuestMemfd, Memslot
from kvmsim.api.transport import Memory, Transport
from kvmsim.api.vcpu import Vcpu
from kvmsim.uapi import (
    ABIS,
    CREATE_GUEST_MEMFD,
    ENC_REGION,
    KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_GUEST_MEMFD,
    KVM_CREATE_VCPU,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_MEMORY_ENCRYPT_REG_REGION,
    KVM_MEMORY_ENCRYPT_UNREG_REGION,
    KVM_SET_MEMORY_ATTRIBUTES,
    KVM_SET_USER_MEMORY_REGION,
    MEMORY_ATTRIBUTES,
    USERSPACE_MEMORY_REGION,
    USERSPACE_MEMORY_REGION2,
)
from kvmsim.uapi.requests import KVM_ENABLE_CAP
from kvmsim.uapi.structs import ENABLE_CAP

_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1


class Vm:
    """One VM (Kvm.create_vm). Closing it closes its vCPUs; its guest_memfds live on."""

    def __init__(self, transport: Transport, handle: int, type: int, run_size: int) -> None:
        self.handle = handle
        self.type = type
        self.vcpus: list[Vcpu] = []
        self.slots: list[Memslot] = []
        self._transport = transport
        self._run_size = run_size
        self._files: list[GuestMemfd] = []

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self.handle < 0

    @property
    def shared_bit(self) -> int:
        """The gpa bit that selects the shared side for its guests; 0: no bit does."""
        return self._transport.shared_bit(self.type)

    @property
    def td(self) -> TdLaunch:
        """The launch of a VM of type KVM_X86_TDX_VM."""
        return TdLaunch(
            self._transport, self.handle, self.shared_bit + 1 if self.shared_bit else 48
        )

    @property
    def snp(self) -> SnpLaunch:
        """The launch of a VM of type KVM_X86_SNP_VM."""
        return SnpLaunch(self._transport, self.handle)

    def check_extension(self, cap: int) -> int:
        """What this VM offers of a KVM_CAP_*: 0 if it is missing. It may depend on the type."""
        return self._transport.ioctl(self.handle, KVM_CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """KVM_ENABLE_CAP with up to four arguments, as KVM_CAP_EXIT_HYPERCALL wants it."""
        argument = ENABLE_CAP.pack(cap, flags, *args, *[0] * (4 - len(args)))
        self._transport.ioctl(self.handle, KVM_ENABLE_CAP, bytearray(argument))

    # --- the ioctls as they are ---------------------------------------------------------------

    def set_user_memory_region(
        self, slot: int, gpa: int, size: int, userspace_addr: int, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION: create, move, re-flag, or delete (size 0) a slot."""
        region = USERSPACE_MEMORY_REGION.pack(
            slot & _U32, flags & _U32, gpa & _U64, size & _U64, userspace_addr & _U64
        )
        self._transport.ioctl(self.handle, KVM_SET_USER_MEMORY_REGION, bytearray(region))

    def set_user_memory_region2(
        self,
        slot: int,
        gpa: int,
        size: int,
        userspace_addr: int,
        flags: int = 0,
        *,
        guest_memfd: int = 0,
        guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2: the same with a guest_memfd (KVM_MEM_GUEST_MEMFD).

        The 2022 series passes the same structure to the older ioctl.
        """
        region = USERSPACE_MEMORY_REGION2.pack(
            slot & _U32, flags & _U32, gpa & _U64, size & _U64, userspace_addr & _U64,
            guest_memfd_offset & _U64, guest_memfd & _U32,
        )  # fmt: skip
        self._transport.ioctl(
            self.handle, ABIS[self._transport.abi].region_ioctl, bytearray(region)
        )

    def set_memory_attributes(self, gpa: int, size: int, attributes: int, flags: int = 0) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES on guest-physical bytes, all or nothing."""
        argument = MEMORY_ATTRIBUTES.pack(gpa & _U64, size & _U64, attributes, flags)
        self._transport.ioctl(self.handle, KVM_SET_MEMORY_ATTRIBUTES, bytearray(argument))

    # --- memory -------------------------------------------------------------------------------

    def create_guest_memfd(self, size: int, flags: int = 0) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD; ``flags`` out of what KVM_CAP_GUEST_MEMFD_FLAGS offers."""
        argument = bytearray(CREATE_GUEST_MEMFD.pack(size & _U64, flags & _U64))
        handle = self._transport.ioctl(self.handle, KVM_CREATE_GUEST_MEMFD, argument)
        file = GuestMemfd(self._transport, handle, size, flags)
        self._files.append(file)
        return file

    def add_slot(
        self,
        gpa: int,
        memory: Memory | None = None,
        *,
        size: int | None = None,
        memory_offset: int = 0,
        guest_memfd: GuestMemfd | None = None,
        offset: int = 0,
        flags: int = 0,
        slot: int | None = None,
    ) -> Memslot:
        """Put memory at ``gpa``: a shared side, a private side, or both.

        ``size`` is what is left of the private side, else of the shared one, if not given;
        ``slot`` the lowest free id.
        """
        if slot is None:
            taken = {known.id for known in self.slots}
            slot = next(id for id in range(len(taken) + 1) if id not in taken)
        if size is None:
            if guest_memfd is not None:
                size = guest_memfd.size - offset
            elif memory is not None:
                size = memory.size - memory_offset
            else:
                raise ValueError("a slot without memory needs a size")
        made = Memslot(
            self, slot, gpa, size, flags, memory, memory_offset, guest_memfd, offset
        )  # fmt: skip
        self.slots.append(made)
        return made

    def forget(self, slot: Memslot) -> None:
        """Take a deleted slot off :attr:`slots`; Memslot.delete does so."""
        self.slots.remove(slot)

    def convert(self, gpa: int, size: int, *, private: bool) -> None:
        """Make a range private or shared, with the ioctl that this KVM has for it.

        Only the attribute changes: what the guest leaves is still allocated, see Memslot.discard.
        Where files keep the types the range is converted slot by slot and contents stay; a
        ConversionError tells of a slot that refused, and those below it are converted.
        """
        if self.check_extension(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES):
            for slot in sorted(self.slots, key=lambda slot: slot.gpa):
                first, last = max(gpa, slot.gpa), min(gpa + size, slot.gpa + slot.size)
                if first < last and slot.guest_memfd is not None:
                    at = first - slot.gpa + slot.offset
                    slot.guest_memfd.convert(at, last - first, private=private)
            return
        if self._transport.abi == "v7":
            request = KVM_MEMORY_ENCRYPT_REG_REGION if private else KVM_MEMORY_ENCRYPT_UNREG_REGION
            self._transport.ioctl(self.handle, request, bytearray(ENC_REGION.pack(gpa, size)))
        else:
            self.set_memory_attributes(gpa, size, KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0)

    # --- vCPUs --------------------------------------------------------------------------------

    def create_vcpu(self, id: int | None = None) -> Vcpu:
        """KVM_CREATE_VCPU; ``id`` is the number of vCPUs so far if not given."""
        number = len(self.vcpus) if id is None else id
        handle = self._transport.ioctl(self.handle, KVM_CREATE_VCPU, number)
        vcpu = Vcpu(self._transport, handle, number, self._run_size)
        self.vcpus.append(vcpu)
        return vcpu

    # --- life ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the vCPUs and the VM; none may run. Idempotent."""
        handle, self.handle = self.handle, -1  # whose number may become another's
        if handle >= 0:
            for vcpu in self.vcpus:
                vcpu.close()
            for slot in self.slots:
                slot.unmap()
            self._transport.close_handle(handle)

    def close_files(self) -> None:
        """Close the guest_memfds that are still open; Kvm.close does so."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
