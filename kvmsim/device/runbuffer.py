# SPDX-License-Identifier: GPL-2.0-or-later
"""Struct kvm_run: what user space wrote for KVM_RUN, and what KVM_RUN leaves there.

The memory belongs to user space and may change at any time: each field is read once and then
acted upon. include/uapi/linux/kvm.h; kvm_arch_vcpu_ioctl_run(), post_kvm_run_save() and
sync_regs() of arch/x86/kvm/x86.c (v6.18).
"""

from __future__ import annotations

from typing import Final

from kvmsim import exits
from kvmsim.uapi import (
    KVM_EXIT_HYPERCALL_LONG_MODE,
    KVM_PIO_DATA_OFFSET,
    KVM_RUN_EXIT_REASON_OFFSET,
    KVM_RUN_IMMEDIATE_EXIT_OFFSET,
    KVM_RUN_MMAP_SIZE,
    KVM_RUN_UNION_OFFSET,
    KVM_RUN_UNION_SIZE,
    RUN_EXIT_REASON,
    RUN_HYPERCALL,
    RUN_MMIO,
    Abi,
    structs,
)

_READY_OFFSET: Final = 12
_IF_FLAG_OFFSET: Final = 13
_FLAGS_OFFSET: Final = 14
_CR8_OFFSET: Final = 16
_APIC_BASE_OFFSET: Final = 24
_SYNC_OFFSET: Final = KVM_RUN_UNION_OFFSET + KVM_RUN_UNION_SIZE
_SYNC_REGS_OFFSET: Final = _SYNC_OFFSET + structs.RUN_SYNC.size
_HYPERCALL_TAIL: Final = KVM_RUN_UNION_OFFSET + RUN_HYPERCALL.size - 16

SYNC_REGS: Final = (_SYNC_REGS_OFFSET, structs.REGS.size)
SYNC_SREGS: Final = (_SYNC_REGS_OFFSET + structs.REGS.size, structs.SREGS_SIZE)
SYNC_EVENTS: Final = (
    _SYNC_REGS_OFFSET + structs.REGS.size + structs.SREGS_SIZE,
    structs.VCPU_EVENTS.size,
)
"""Offset and size of the parts of struct kvm_sync_regs."""


class RunBuffer:
    """One vCPU's struct kvm_run in ``memory`` (KVM_RUN_MMAP_SIZE bytes or more)."""

    def __init__(self, memory: memoryview, abi: Abi) -> None:
        flat = memory.cast("B")
        if flat.readonly or len(flat) < KVM_RUN_MMAP_SIZE:
            raise ValueError(f"kvm_run needs {KVM_RUN_MMAP_SIZE} writable bytes, got {len(flat)}")
        self._memory = flat
        self._abi: Abi = abi

    def release(self) -> None:
        """Let go of the memory."""
        self._memory.release()

    # --- what user space wrote ----------------------------------------------------------------

    @property
    def immediate_exit(self) -> bool:
        """Whether KVM_RUN is to complete what waits and return."""
        return bool(self._memory[KVM_RUN_IMMEDIATE_EXIT_OFFSET])

    @property
    def request_interrupt_window(self) -> bool:
        """Whether KVM_RUN is to return as soon as an interrupt could be injected."""
        return bool(self._memory[0])

    @property
    def cr8(self) -> int:
        """What CR8 is to be, where no local APIC is in the kernel."""
        return int.from_bytes(self._memory[_CR8_OFFSET : _CR8_OFFSET + 8], "little")

    @property
    def sync(self) -> tuple[int, int]:
        """kvm_valid_regs, kvm_dirty_regs."""
        valid, dirty = structs.RUN_SYNC.unpack_from(self._memory, _SYNC_OFFSET)
        return valid, dirty

    def clear_dirty_regs(self) -> None:
        """All that user space changed was taken."""
        structs.RUN_SYNC.pack_into(self._memory, _SYNC_OFFSET, self.sync[0], 0)

    def part(self, where: tuple[int, int]) -> bytes:
        """One of SYNC_*."""
        offset, size = where
        return bytes(self._memory[offset : offset + size])

    def set_part(self, where: tuple[int, int], data: bytes) -> None:
        """One of SYNC_*."""
        offset, size = where
        self._memory[offset : offset + size] = data

    def port_data(self, size: int) -> bytes:
        """What an IN reads."""
        return bytes(self._memory[KVM_PIO_DATA_OFFSET : KVM_PIO_DATA_OFFSET + size])

    def mmio_data(self, size: int) -> bytes:
        """What a load from a device reads."""
        _, data, _, _ = RUN_MMIO.unpack_from(self._memory, KVM_RUN_UNION_OFFSET)
        return bytes(data[:size])

    def hypercall_result(self) -> int:
        """What RAX is to be."""
        return int.from_bytes(self._memory[_HYPERCALL_TAIL : _HYPERCALL_TAIL + 8], "little")

    # --- what KVM_RUN leaves ------------------------------------------------------------------

    def begin(self) -> None:
        """KVM_RUN starts: no flag is set."""
        self._memory[_FLAGS_OFFSET : _FLAGS_OFFSET + 2] = b"\0\0"

    def set_exit_reason(self, reason: int) -> None:
        """Only the reason."""
        RUN_EXIT_REASON.pack_into(self._memory, KVM_RUN_EXIT_REASON_OFFSET, reason)

    def write_exit(self, left: exits.Exit, *, long_mode: bool = True) -> int:
        """Reason and payload of an exit; what KVM_RUN returns, 0 or -errno."""
        result = exits.encode(left, self._memory, self._abi)
        if isinstance(left, exits.HypercallExit) and long_mode:
            tail = KVM_EXIT_HYPERCALL_LONG_MODE.to_bytes(8, "little")
            self._memory[_HYPERCALL_TAIL + 8 : _HYPERCALL_TAIL + 16] = tail
        return result

    def save(self, *, ready: bool, if_flag: bool, cr8: int, apic_base: int) -> None:
        """post_kvm_run_save()."""
        self._memory[_READY_OFFSET] = ready
        self._memory[_IF_FLAG_OFFSET] = if_flag
        self._memory[_CR8_OFFSET : _CR8_OFFSET + 8] = cr8.to_bytes(8, "little")
        self._memory[_APIC_BASE_OFFSET : _APIC_BASE_OFFSET + 8] = apic_base.to_bytes(8, "little")
