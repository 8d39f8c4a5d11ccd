# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables that lead from a request number to what it does, and the one lookup in them.

A handler returns a number (ioctl(2)'s), None for 0, or a Result; it raises KvmError for what is
refused and Efault for memory that cannot be reached. A request that a level does not know is
answered as the kernel's switch statement ends there.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from struct import Struct
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

from kvmsim import uapi
from kvmsim.device.caller import Caller, Efault
from kvmsim.device.results import Failure, Result, Value
from kvmsim.uapi import KvmError, requests
from kvmsim.uapi.encoding import KVMIO

log = logging.getLogger(__name__)

_NUMBER: Final = 0xFFFF_FFFF
_DONE: Final = Value(0)


class Level(Enum):
    """Whose descriptor it is."""

    SYSTEM = "system"
    VM = "VM"
    VCPU = "vCPU"
    FILE = "guest_memfd"


# How the switch of each level ends: kvm_arch_dev_ioctl(), kvm_arch_vm_ioctl(),
# kvm_arch_vcpu_ioctl() of arch/x86/kvm/x86.c; kvm_gmem_ioctl() of the in-place series.
UNKNOWN: Final[Mapping[Level, int]] = MappingProxyType(
    {
        Level.SYSTEM: errno.EINVAL,
        Level.VM: errno.ENOTTY,
        Level.VCPU: errno.EINVAL,
        Level.FILE: errno.ENOTTY,
    }
)

NAMES: Final[Mapping[int, str]] = MappingProxyType(
    {
        value: name
        for name, value in (vars(uapi) | vars(requests)).items()
        if name.startswith("KVM_") and isinstance(value, int) and value >> 8 & 0xFF == KVMIO
    }
)

#: What is not simulated, for logs: by the low byte of the request (include/uapi/linux/kvm.h).
_OTHER_NAMES: Final[Mapping[int, str]] = MappingProxyType(
    {
        0x40: "KVM_SET_MEMORY_REGION",
        0x65: "KVM_GET_PIT",
        0x66: "KVM_SET_PIT",
        0x7A: "KVM_XEN_HVM_CONFIG",
        0xAB: "KVM_GET_ONE_REG",
        0xAC: "KVM_SET_ONE_REG",
        0xB0: "KVM_GET_REG_LIST",
        0xB2: "KVM_SET_PMU_EVENT_FILTER",
        0xBD: "KVM_HYPERV_EVENTFD",
        0xBE: "KVM_GET_NESTED_STATE",
        0xBF: "KVM_SET_NESTED_STATE",
        0xC1: "KVM_GET_SUPPORTED_HV_CPUID",
        0xC6: "KVM_X86_SET_MSR_FILTER",
        0xC7: "KVM_RESET_DIRTY_RINGS",
        0xC8: "KVM_XEN_HVM_GET_ATTR",
        0xC9: "KVM_XEN_HVM_SET_ATTR",
        0xCA: "KVM_XEN_VCPU_GET_ATTR",
        0xCB: "KVM_XEN_VCPU_SET_ATTR",
        0xD0: "KVM_XEN_HVM_EVTCHN_SEND",
    }
)


def request_name(request: int) -> str:
    """The kernel's name of a request, its number if it has none here."""
    name = NAMES.get(request)
    if name is None and request >> 8 & 0xFF == KVMIO:
        name = _OTHER_NAMES.get(request & 0xFF)
    return name or f"ioctl {request:#x}"


@dataclass(frozen=True, slots=True)
class Call:
    """One ioctl: its name, its two words, and who makes it."""

    name: str
    request: int
    argument: int
    caller: Caller

    def read(self, layout: Struct) -> tuple[Any, ...]:
        """The structure at the argument; Efault."""
        return layout.unpack(self.fetch(layout.size))

    def fetch(self, size: int, offset: int = 0) -> bytes:
        """``size`` bytes at the argument; Efault."""
        return self.caller.read(self.argument + offset, size)

    def write(self, data: bytes, offset: int = 0) -> None:
        """Store at the argument; Efault."""
        self.caller.write(self.argument + offset, data)

    def refused(self, number: int, reason: str, *, start: int = 0, size: int = 0) -> KvmError:
        """What to raise."""
        return KvmError(number, self.name, reason, start=start, size=size)


Answer = Result | int | None
Device = TypeVar("Device")


@dataclass(frozen=True, slots=True)
class Row(Generic[Device]):
    """One request of one level; ``what`` and ``errors`` are for people."""

    number: int
    handler: Callable[[Device, Call], Answer]
    what: str
    errors: str = ""

    @property
    def name(self) -> str:
        """The kernel's name."""
        return NAMES[self.number]


def table(rows: Iterable[Row[Device]]) -> Mapping[int, Row[Device]]:
    """Rows by number; ValueError if one comes twice."""
    found: dict[int, Row[Device]] = {}
    for row in rows:
        if row.number in found:
            raise ValueError(f"{row.name} is there twice")
        found[row.number] = row
    return MappingProxyType(found)


def dispatch(
    device: Device,
    level: Level,
    rows: Mapping[int, Row[Device]],
    request: int,
    argument: int,
    caller: Caller,
) -> Result:
    """Do one ioctl."""
    request &= _NUMBER
    row = rows.get(request)
    name = request_name(request)
    if row is None:
        number = UNKNOWN[level]
        log.warning("%s on a %s descriptor is not simulated", name, level.value)
        return Failure(number, f"{name}: no request of this level, or not simulated")
    call = Call(name, request, argument, caller)
    return answered(name, lambda: row.handler(device, call))


def answered(name: str, work: Callable[[], Answer]) -> Result:
    """What an ioctl of this name answers that does ``work``."""
    try:
        answer = work()
    except KvmError as error:
        log.info("%s", error)
        return Failure(error.errno, str(error))
    except Efault as error:
        log.info("%s: %s", name, error)
        return Failure(errno.EFAULT, f"{name}: {error}")
    except MemoryError as error:
        log.warning("%s: out of memory: %s", name, error)
        return Failure(errno.ENOMEM, f"{name}: out of memory: {error}")
    except OSError as error:  # of the world, not of the caller
        log.warning("%s: %s", name, error)
        return Failure(error.errno or errno.EIO, f"{name}: {error}")
    if answer is None:
        return _DONE
    return Value(answer) if isinstance(answer, int) else answer
