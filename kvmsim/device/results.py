# SPDX-License-Identifier: GPL-2.0-or-later
"""What an ioctl answers: a number, an errno, a new file descriptor as data, or a call that waits.

Every object of the device is a :class:`DeviceObject`; how its descriptor comes to be (a memfd, a
socket, a number in a dictionary) is the business of whoever received the call.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvmsim.device.caller import Caller


class DeviceObject(Protocol):
    """What a descriptor of the device stands for: the system, a VM, or a vCPU."""

    def ioctl(self, request: int, argument: int, caller: Caller) -> Result:
        """Do what ioctl(2) with these two words does; never raises for what a caller did.

        Only the low 32 bits of ``request`` count, as in the kernel. From any thread; may wait for
        as long as a shootdown takes, KVM_RUN excepted, which is :class:`Begun`.
        """

    def release(self) -> None:
        """The last reference to the descriptor is gone, mappings included. Idempotent."""


class MappableObject(DeviceObject, Protocol):
    """An object that has memory to map: a vCPU."""

    def attach(self, memory: memoryview) -> None:
        """Use ``memory`` (bytes, writable, of the announced size, zeroed) as what mmap(2) shows.

        Once, before the descriptor is handed out. It must stay valid until ``release`` returns.
        """


@dataclass(frozen=True, slots=True)
class Value:
    """ioctl(2) returns ``value``, 0 or more."""

    value: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """ioctl(2) fails with ``errno``; ``reason`` is for a log, never empty."""

    errno: int
    reason: str

    @property
    def name(self) -> str:
        """The errno by its name."""
        return errno.errorcode.get(self.errno, str(self.errno))


class FdKind(Enum):
    """What a new descriptor can do besides ioctl and close."""

    CONTROL = "nothing"
    MAPPABLE = "mmap"
    PRIVATE_FILE = "it is a file of a privfs mount"


@dataclass(frozen=True, slots=True)
class NewFd:
    """ioctl(2) returns a new descriptor; ``name`` is what its link in /proc/self/fd tells.

    CONTROL and MAPPABLE: ``object`` answers its ioctls; whoever cannot make the descriptor calls
    ``object.release()``. MAPPABLE: ``size`` bytes can be mapped, at offset 0; whoever makes the
    descriptor attaches them. PRIVATE_FILE: ``fd`` is an open descriptor of *this* process that
    the receiver owns: it hands it on, or a duplicate, and closes it.
    """

    kind: FdKind
    name: str
    object: DeviceObject | MappableObject | None = None
    size: int = 0
    fd: int = -1
    cloexec: bool = True


class Pending(Protocol):
    """A call that is not over: KVM_RUN, or a vCPU's ioctl behind KVM_RUN (KVM: vcpu->mutex)."""

    def on_done(self, callback: Callable[[Value | Failure], None]) -> None:
        """Have ``callback`` called exactly once with the outcome, by any thread, or at once.

        It must not wait, and may not call the device.
        """

    def cancel(self) -> None:
        """The caller has a signal, or died: end soon, mostly with EINTR; nothing is lost.

        From any thread, any number of times; after the outcome it does nothing.
        """

    def wait(self, timeout: float | None = None) -> Value | Failure | None:
        """Wait for the outcome; None if there is none after ``timeout`` seconds."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The call goes on without its caller: see :class:`Pending`.

    ``signal_mask`` is what blocks signals meanwhile (KVM_SET_SIGNAL_MASK), None: as always.
    """

    pending: Pending
    signal_mask: int | None = None


Result = Value | Failure | NewFd | Begun
