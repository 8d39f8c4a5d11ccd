# SPDX-License-Identifier: GPL-2.0-or-later
"""Bare ioctls on either KVM, and memory whose end is the end of what is mapped.

A probe asks as a stranger would and says what came: a number, an errno's name, an exit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from struct import Struct
from typing import Any, Final

import pytest

from kvmsim import exits
from kvmsim.api import IoctlError, Kvm, Simulation, Vcpu, Vm
from kvmsim.api.guest import Guest
from kvmsim.uapi import (
    KVM_CAP_PRE_FAULT_MEMORY,
    KVM_CREATE_GUEST_MEMFD,
    KVM_CREATE_VCPU,
    KVM_CREATE_VM,
    KVM_GET_STATS_FD,
    PAGE_SIZE,
)

Answers = dict[str, str]
RAM: Final = 4 << 20
_MAKES_FD: Final = (KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_CREATE_GUEST_MEMFD, KVM_GET_STATS_FD)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def errno_name(number: int) -> str:
    return errno.errorcode.get(number, str(number)).replace("ENOTSUP", "EOPNOTSUPP")


def said(left: exits.Exit | OSError) -> str:
    """An exit or a failure, in words that are the same for both."""
    match left:
        case OSError():
            return errno_name(left.errno or 0)
        case exits.MemoryFaultExit(gpa, size, private, number):
            side = "private" if private else "shared"
            return f"MEMORY_FAULT {side} {gpa:#x}+{size:#x} {errno_name(number or 0)}"
        case exits.MmioExit(gpa, length, write, data):
            return f"MMIO {'write' if write else 'read'} {gpa:#x}+{length} {data.hex()}".strip()
        case exits.IoExit(port, size, write, data, count):
            direction = "out" if write else "in"
            return f"IO {direction} {port:#x} {count}*{size} {data.hex()}".strip()
    return type(left).__name__


class Edge:
    """Memory of one page, nothing mapped on either side of it."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 3 * PAGE_SIZE)
        self._pin = ctypes.c_char.from_buffer(self._map)
        self.start = ctypes.addressof(self._pin) + PAGE_SIZE
        self.end = self.start + PAGE_SIZE
        self._guard(self.start - PAGE_SIZE, 0)
        self._guard(self.end, 0)

    def _guard(self, address: int, prot: int) -> None:
        assert _libc.mprotect(address, PAGE_SIZE, prot) == 0

    def put(self, data: bytes, beyond: int = 0) -> int:
        """Data that ends where the page does, but for ``beyond`` bytes that are not there."""
        at = self.end - len(data) + beyond
        assert self.start <= at
        ctypes.memmove(at, data, len(data) - beyond)
        return at

    def read_only(self) -> None:
        """From here on it can be read alone."""
        self._guard(self.start, mmap.PROT_READ)

    def close(self) -> None:
        """Unmap."""
        del self._pin
        self._map.close()


@dataclass
class Bench:
    """A KVM with one VM and, when asked for, a vCPU and a guest."""

    target: str
    kvm: Kvm
    stack: contextlib.ExitStack

    @property
    def simulated(self) -> bool:
        return self.target == "simulated"

    @cached_property
    def vm(self) -> Vm:
        return self.kvm.create_vm()

    @cached_property
    def vcpu(self) -> Vcpu:
        return self.vm.create_vcpu()

    @cached_property
    def guest(self) -> Guest:
        """Boot memory; the ring is one in which either KVM runs the guest itself."""
        return Guest(self.kvm, self.vm, ring=0 if self.simulated else 3, slot=99)

    def edge(self) -> Edge:
        made = Edge()
        self.stack.callback(made.close)
        return made

    # --- ioctls -------------------------------------------------------------------------------

    def ask(self, fd: int, request: int, argument: int | bytes | ctypes.Array[Any] = 0) -> str:
        """ioctl(2): its result, or the errno's name. Bytes stand for a copy of them."""
        if isinstance(argument, bytes):
            argument = ctypes.create_string_buffer(argument, max(len(argument), 1))
        address = argument if isinstance(argument, int) else ctypes.addressof(argument)
        transport = self.kvm.transport
        if isinstance(transport, Simulation):
            try:
                result = transport.process.ioctl(fd, request, address % (1 << 64))
            except OSError as error:
                return errno_name(error.errno or 0)
        else:
            result = _libc.ioctl(fd, request, address % (1 << 64))
            if result < 0:
                return errno_name(ctypes.get_errno())
        if request & 0xFFFF_FFFF in _MAKES_FD:
            self._forget(fd, request, result)
            return "fd"
        return str(result)

    def _forget(self, fd: int, request: int, made: int) -> None:
        """Close what came."""
        transport = self.kvm.transport
        if isinstance(transport, Simulation) and request & 0xFFFF_FFFF != KVM_CREATE_GUEST_MEMFD:
            transport.process.close(made)
        else:
            os.close(made)

    def each(self, fd: int, request: int, cases: dict[str, Any]) -> Answers:
        """The same request with several arguments."""
        return {name: self.ask(fd, request, argument) for name, argument in cases.items()}

    def grid(
        self, fd: int, request: int, layout: Struct, good: dict[str, int],
        cases: dict[str, dict[str, int]],
    ) -> Answers:  # fmt: skip
        """A structure with one field or another changed."""
        found = {}
        for name, changed in cases.items():
            values = [value % (1 << 64) for value in (good | changed).values()]
            sizes = [value & 0xFFFF_FFFF if code == "I" else value
                     for code, value in zip(codes(layout), values, strict=True)]  # fmt: skip
            found[name] = self.ask(fd, request, layout.pack(*sizes))
        return found

    # --- running ------------------------------------------------------------------------------

    def load(self, code: str, **registers: int) -> Vcpu:
        """A vCPU at the beginning of a program, given as hexadecimal digits."""
        self.guest.load(bytes.fromhex(code))
        self.guest.enter(self.vcpu, **registers)
        return self.vcpu

    def run(self, vcpu: Vcpu | None = None) -> str:
        """KVM_RUN, in words."""
        return said(attempt((vcpu or self.vcpu).run))


def attempt(what: Callable[[], exits.Exit]) -> exits.Exit | OSError:
    try:
        return what()
    except IoctlError as error:
        return error


def codes(layout: Struct) -> str:
    """The codes of a structure's fields, one each."""
    found, count = "", ""
    for one in layout.format.lstrip("<"):
        if one.isdigit():
            count += one
        else:
            found += "" if one == "x" else one * int(count or 1)
            count = ""
    return found.replace("i", "I")


@contextlib.contextmanager
def real() -> Iterator[Bench]:
    """The kernel's, if it is one of those that the answers are of."""
    with contextlib.ExitStack() as stack:
        kvm = stack.enter_context(Kvm())
        second_stage = kvm.check_extension(KVM_CAP_PRE_FAULT_MEMORY)
        if not os.uname().release.startswith("6.18.") or second_stage:
            pytest.skip("the answers are those of Linux 6.18 without a second stage")
        yield Bench("real", kvm, stack)


@contextlib.contextmanager
def simulated(directory: Path) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        yield Bench("simulated", stack.enter_context(Kvm(Simulation(directory))), stack)


Probe = Callable[[Bench], Answers]
PROBES: Final[dict[str, Probe]] = {}


def probe(what: Probe) -> Probe:
    """Have it asked of both."""
    assert what.__name__ not in PROBES
    PROBES[what.__name__] = what
    return what
