# SPDX-License-Identifier: GPL-2.0-or-later
"""A vCPU: registers, KVM_RUN, and the exit that it returns."""

from __future__ import annotations

import errno
from typing import Self

from kvmsim import exits
from kvmsim.api.registers import (
    REGS_SIZE,
    SREGS_SIZE,
    Regs,
    Sregs,
)
from kvmsim.api.transport import IoctlError, Transport
from kvmsim.uapi import (
    EHWPOISON,
    KVM_PRE_FAULT_MEMORY,
    KVM_RUN_EXIT_REASON_OFFSET,
    KVM_RUN_IMMEDIATE_EXIT_OFFSET,
    KVM_RUN_UNION_OFFSET,
    PRE_FAULT_MEMORY,
    RUN_EXIT_REASON,
    RUN_IO,
)
from kvmsim.uapi.requests import KVM_GET_REGS, KVM_GET_SREGS, KVM_SET_REGS, KVM_SET_SREGS

_MMIO_DATA = KVM_RUN_UNION_OFFSET + 8
_HYPERCALL_RET = KVM_RUN_UNION_OFFSET + 56
#: Where KVM_RUN fails and kvm_run says why.
_FAULTS = frozenset({errno.EFAULT, EHWPOISON})


class Vcpu:
    """One vCPU (Vm.create_vcpu). Everything but :meth:`cancel` belongs to one thread at a time."""

    def __init__(self, transport: Transport, handle: int, id: int, run_size: int) -> None:
        self.id = id
        self.handle = handle
        self.exit: exits.Exit | None = None  #: what the last :meth:`run` returned
        self._transport = transport
        self._run = transport.map_run(handle, run_size)

    # --- registers ----------------------------------------------------------------------------

    @property
    def regs(self) -> Regs:
        """The general registers (KVM_GET_REGS); assign to set them all."""
        data = bytearray(REGS_SIZE)
        self._transport.ioctl(self.handle, KVM_GET_REGS, data)
        return Regs.from_bytes(data)

    @regs.setter
    def regs(self, regs: Regs) -> None:
        self._transport.ioctl(self.handle, KVM_SET_REGS, bytearray(regs.to_bytes()))

    @property
    def sregs(self) -> Sregs:
        """Segments and control registers (KVM_GET_SREGS); assign to set them all."""
        data = bytearray(SREGS_SIZE)
        self._transport.ioctl(self.handle, KVM_GET_SREGS, data)
        return Sregs.from_bytes(data)

    @sregs.setter
    def sregs(self, sregs: Sregs) -> None:
        self._transport.ioctl(self.handle, KVM_SET_SREGS, bytearray(sregs.to_bytes()))

    # --- running ------------------------------------------------------------------------------

    def run(self) -> exits.Exit:
        """Run guest code until an exit (KVM_RUN).

        A failure that kvm_run explains is an exit too: MemoryFaultExit, BadHvaExit, and for EINTR
        InterruptedExit.  IoctlError for any other, ValueError for an unknown exit_reason.
        """
        self._check_open("KVM_RUN")
        RUN_EXIT_REASON.pack_into(self._run, KVM_RUN_EXIT_REASON_OFFSET, 0)
        self.exit = None
        result = self._transport.run(self.handle)
        if result == -errno.EINTR:
            self.exit = exits.InterruptedExit()
        elif result < 0 and -result not in _FAULTS:
            raise IoctlError(-result, "KVM_RUN")
        else:
            self.exit = exits.decode(self._run, result, self._transport.abi)
        return self.exit

    def complete(self, data: bytes | int) -> None:
        """Answer the last exit: what a read finds, or the result of a hypercall.

        ValueError if it asked for nothing, or for another number of bytes.
        """
        match self.exit, data:
            case exits.IoExit(size=size, write=False, count=count), bytes():
                _check_length(data, size * count)
                at = RUN_IO.unpack_from(self._run, KVM_RUN_UNION_OFFSET)[-1]
                self._run[at : at + len(data)] = data
            case exits.MmioExit(length=length, write=False), bytes():
                _check_length(data, length)
                self._run[_MMIO_DATA : _MMIO_DATA + length] = data
            case exits.HypercallExit(), int():
                self._run[_HYPERCALL_RET : _HYPERCALL_RET + 8] = data.to_bytes(8, "little")
            case _:
                kind = type(data).__name__
                raise ValueError(f"{self.exit} is not answered by {kind}")

    @property
    def immediate_exit(self) -> bool:
        """Whether KVM_RUN returns before any guest code, once what is pending is completed."""
        self._check_open("immediate_exit")
        return bool(self._run[KVM_RUN_IMMEDIATE_EXIT_OFFSET])

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self._check_open("immediate_exit")
        self._run[KVM_RUN_IMMEDIATE_EXIT_OFFSET] = value

    def settle(self) -> None:
        """Have KVM complete the instruction of the last exit, without running guest code.

        Port I/O, MMIO and hypercalls are complete only at the next KVM_RUN: registers that are set
        before would be mixed with its result (Documentation/virt/kvm/api.rst, KVM_RUN).
        """
        if isinstance(self.exit, exits.IoExit | exits.MmioExit | exits.HypercallExit):
            before = self.immediate_exit
            self.immediate_exit = True
            try:
                self._transport.finish(self.handle)
            finally:
                self.immediate_exit = before
            self.exit = None

    def cancel(self) -> None:
        """From any thread: the :meth:`run` under way is InterruptedExit, else the next one.

        It is never lost: where another exit comes first, the run after it is interrupted.
        """
        self._check_open("cancel")
        self._transport.cancel(self.handle)

    # --- memory -------------------------------------------------------------------------------

    def pre_fault(self, gpa: int, size: int, flags: int = 0) -> int:
        """Map a range without running (KVM_PRE_FAULT_MEMORY); the bytes at its end still to do.

        IoctlError only if not even the first page was mapped: ENOENT without a slot, EAGAIN while
        one is deleted, EOPNOTSUPP where KVM has no second stage.
        """
        argument = bytearray(PRE_FAULT_MEMORY.pack(gpa, size, flags))
        self._transport.ioctl(self.handle, KVM_PRE_FAULT_MEMORY, argument)
        left: int = PRE_FAULT_MEMORY.unpack(argument)[1]
        return left

    def close(self) -> None:
        """Close the vCPU; it must not run. Idempotent."""
        handle, self.handle = self.handle, -1  # whose number may become another's
        if handle >= 0:
            self._transport.close_handle(handle)

    def _check_open(self, operation: str) -> None:
        if self.handle < 0:
            raise IoctlError(errno.EBADF, operation, "the vCPU is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _check_length(data: bytes, wanted: int) -> None:
    if len(data) != wanted:
        raise ValueError(f"{len(data)} bytes answer a read of {wanted}")
