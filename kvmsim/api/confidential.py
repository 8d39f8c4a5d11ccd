# SPDX-License-Identifier: GPL-2.0-or-later
"""The launch of confidential guests: the commands of KVM_MEMORY_ENCRYPT_OP as methods.

Documentation/virt/kvm/x86/intel-tdx.rst and amd-memory-encryption.rst (v6.18).
"""

from __future__ import annotations

import ctypes

from kvmsim.api.transport import Transport
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE, sev, structs, tdx
from kvmsim.uapi.requests import KVM_MEMORY_ENCRYPT_OP

_WIDTHS = 0x8000_0008


def _pinned(data: bytearray) -> tuple[int, object]:
    """The address of ``data``, and what keeps it there."""
    if not data:
        return 0, None
    pointer = ctypes.c_char.from_buffer(data)
    return ctypes.addressof(pointer), pointer


class TdLaunch:
    """The launch of a TD (``Vm.td``): init_vm, vCPUs and init_vcpu, slots, load, finalize."""

    def __init__(self, transport: Transport, handle: int, width: int) -> None:
        self._transport = transport
        self._handle = handle
        self._width = width

    def init_vm(self, attributes: int = 0, xfam: int = 3, *, width: int | None = None) -> None:
        """KVM_TDX_INIT_VM; ``width`` is that of guest-physical addresses, SHARED bit included."""
        bits = self._width if width is None else width
        entry = structs.CPUID_ENTRY2.pack(_WIDTHS, 0, 0, bits << 16, 0, 0, 0)
        none = bytes(48)
        head = tdx.TDX_INIT_VM.pack(attributes, xfam, none, none, none, bytes(96))
        data = bytearray(head + tdx.CPUID2_HEAD.pack(1, 0) + entry)
        self._command(self._handle, tdx.KVM_TDX_INIT_VM, data)

    def init_vcpu(self, vcpu: int, rcx: int = 0) -> None:
        """KVM_TDX_INIT_VCPU of a vCPU's handle; its guest finds ``rcx`` in RCX and R8."""
        self._command(vcpu, tdx.KVM_TDX_INIT_VCPU, immediate=rcx)

    def load(self, vcpu: int, gpa: int, data: bytes, *, measure: bool = True) -> None:
        """KVM_TDX_INIT_MEM_REGION by way of a vCPU's handle; ``data`` is filled up to pages."""
        npages = -(-len(data) // PAGE_SIZE)
        memory = self._transport.allocate(npages << PAGE_SHIFT)
        try:
            memory.write(0, data)
            region = bytearray(tdx.TDX_INIT_MEM_REGION.pack(memory.address, gpa, npages))
            flags = tdx.KVM_TDX_MEASURE_MEMORY_REGION if measure else 0
            self._command(vcpu, tdx.KVM_TDX_INIT_MEM_REGION, region, flags=flags)
        finally:
            memory.close()

    def finalize(self) -> None:
        """KVM_TDX_FINALIZE_VM."""
        self._command(self._handle, tdx.KVM_TDX_FINALIZE_VM)

    def _command(
        self, handle: int, id: int, data: bytearray | None = None, *, flags: int = 0,
        immediate: int = 0,
    ) -> None:  # fmt: skip
        address, held = (immediate, None) if data is None else _pinned(data)
        command = bytearray(tdx.TDX_CMD.pack(id, flags, address, 0))
        self._transport.ioctl(handle, KVM_MEMORY_ENCRYPT_OP, command)
        del held


class SnpLaunch:
    """The launch of an SNP guest (``Vm.snp``): init, start, vCPUs and slots, load, finish.

    ``error`` is what the AMD-SP said to the last command. ``fd`` is of /dev/sev.
    """

    def __init__(self, transport: Transport, handle: int) -> None:
        self._transport = transport
        self._handle = handle
        self.error = 0
        self.fd = 0

    def init(self) -> None:
        """KVM_SEV_INIT2, GHCB version 2."""
        self._command(sev.KVM_SEV_INIT2, bytearray(sev.SEV_INIT.pack(0, 0, 2)))

    def start(self, policy: int = 0x30000) -> None:
        """KVM_SEV_SNP_LAUNCH_START."""
        data = bytearray(sev.SNP_LAUNCH_START.pack(policy, bytes(16), 0))
        self._command(sev.KVM_SEV_SNP_LAUNCH_START, data)

    def load(self, gpa: int, data: bytes, type: int = sev.KVM_SEV_SNP_PAGE_TYPE_NORMAL) -> None:
        """KVM_SEV_SNP_LAUNCH_UPDATE until all is loaded; ``data`` is filled up to pages."""
        size = -(-len(data) // PAGE_SIZE) * PAGE_SIZE
        memory = self._transport.allocate(size)
        try:
            memory.write(0, data)
            fields = (gpa >> PAGE_SHIFT, memory.address, size, type, 0)
            update = bytearray(sev.SNP_LAUNCH_UPDATE.pack(*fields))
            while sev.SNP_LAUNCH_UPDATE.unpack(update)[2]:
                self._command(sev.KVM_SEV_SNP_LAUNCH_UPDATE, update)
        finally:
            memory.close()

    def finish(self, host_data: bytes = bytes(32)) -> None:
        """KVM_SEV_SNP_LAUNCH_FINISH: vCPUs are measured, and the guest may run."""
        data = bytearray(sev.SNP_LAUNCH_FINISH.pack(0, 0, 0, 0, 0, host_data, 0))
        self._command(sev.KVM_SEV_SNP_LAUNCH_FINISH, data)

    def _command(self, id: int, data: bytearray) -> None:
        address, held = _pinned(data)
        command = bytearray(sev.SEV_CMD.pack(id, address, 0, self.fd))
        try:
            self._transport.ioctl(self._handle, KVM_MEMORY_ENCRYPT_OP, command)
        finally:
            self.error = sev.SEV_CMD.unpack(command)[2]
        del held
