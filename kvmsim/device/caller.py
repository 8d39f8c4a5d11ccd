# SPDX-License-Identifier: GPL-2.0-or-later
"""Who makes an ioctl: its memory, its descriptors, and what lies behind its addresses."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from kvmsim.device.results import DeviceObject


class Efault(Exception):
    """Bytes at ``address`` cannot be read or written: the ioctl fails with EFAULT."""

    def __init__(self, address: int, length: int) -> None:
        super().__init__(f"caller memory [{address:#x}, {address + length:#x}) cannot be reached")
        self.address = address
        self.length = length


class NotOurs(Enum):
    """A descriptor that no ioctl of the device can use."""

    CLOSED = "no open descriptor"
    OTHER = "a descriptor of something else"


@dataclass(frozen=True, slots=True)
class PrivateFd:
    """A file on a privfs mount: ``fd`` is open in *this* process and stays the caller's to close.

    It needs to be open only until the ioctl has returned.
    """

    fd: int


Fd = DeviceObject | PrivateFd | NotOurs


@dataclass(frozen=True, slots=True)
class HostPiece:
    """Bytes [start, start + length) of the caller are ``offset``… of ``fd``, mapped shared.

    All page-aligned. ``fd`` is open in *this* process and stays the provider's; the device maps
    it before ``host_range`` is called again, and keeps no descriptor. The file must not shrink
    below the piece while a slot is over it: a guest that touches what is gone ends this process.
    """

    start: int
    length: int
    fd: int
    offset: int
    writable: bool = True


class Caller(Protocol):
    """The process behind an ioctl, as the kernel has it in ``current``."""

    @property
    def mm(self) -> Hashable:
        """Its address space: equal for threads of a process, another one after fork or exec."""

    def read(self, address: int, length: int) -> bytes:
        """copy_from_user(): exactly ``length`` bytes, or :class:`Efault`."""

    def write(self, address: int, data: bytes) -> None:
        """copy_to_user(): all of ``data``, or :class:`Efault` (some of it may be written)."""

    def fd(self, number: int) -> Fd:
        """What a descriptor number (fget(): a C int) stands for now."""

    def host_range(self, start: int, size: int) -> Sequence[HostPiece]:
        """What can be shared of the bytes [start, start + size), ascending, clipped to them.

        Asked again when a guest touches what was missing; what is missing then is a bad hva. May
        be called later than the ioctl, from another thread.
        """

    def signal_pending(self, mask: int | None) -> bool:
        """Whether KVM_RUN must not begin, but fail with EINTR (signal_pending(current)).

        ``mask`` is the set that KVM_SET_SIGNAL_MASK has blocked meanwhile, None: the caller's own.
        """
