# SPDX-License-Identifier: GPL-2.0-or-later
"""Where fresh files come from: a directory, memfd_create(2), /dev/kvm."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from dataclasses import dataclass, field
from typing import Protocol

from privfs.testing.conformance.row import SIZE, Start
from privfs.testing.conformance.subject import Subject
from privfs.testing.conformance.syscalls import Nr, call

KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_CREATE_GUEST_MEMFD = 0xC040AED4
KVM_CAP_GUEST_MEMFD = 234
KVM_CAP_GUEST_MEMFD_FLAGS = 244
_KEEP_SIZE = 1


class Target(Protocol):
    """A kind of file."""

    name: str
    column: str

    def why_not(self) -> str:
        """Return why there can be no such file here, empty if there can."""

    def make(self, start: Start) -> Subject:
        """Return a fresh file; raises OSError."""

    def discard(self, subject: Subject) -> None:
        """Remove it."""

    def close(self) -> None:
        """Give back what the target itself holds."""


def _prepared(fd: int, start: Start) -> int:
    if start is not Start.EMPTY:
        os.ftruncate(fd, SIZE)
    if start is Start.FILLED:
        call(Nr.FALLOCATE, fd, _KEEP_SIZE, 0, SIZE)
    return fd


@dataclass(slots=True)
class Memfd:
    """Ordinary memfds: they show that a probe succeeds where a file allows it."""

    name: str = "memfd"
    column: str = "memfd"

    def why_not(self) -> str:
        """Return nothing: there is always memfd_create."""
        return ""

    def make(self, start: Start) -> Subject:
        """Return a memfd that may be sealed."""
        fd = os.memfd_create("conformance", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return Subject(_prepared(fd, start))

    def discard(self, subject: Subject) -> None:
        """Close it."""
        os.close(subject.fd)

    def close(self) -> None:
        """Do nothing."""


@dataclass(slots=True)
class Directory:
    """Files in a directory: of a mount, or of whatever file system implements them."""

    path: str
    name: str = "directory"
    column: str = ""
    _made: int = 0

    def why_not(self) -> str:
        """Return why no file can be made there."""
        return "" if os.access(self.path, os.W_OK) else f"{self.path}: not writable"

    def make(self, start: Start) -> Subject:
        """Return a new file, mode 0600."""
        self._made += 1
        path = os.path.join(self.path, f"conformance-{os.getpid()}-{self._made}")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        subject = Subject(fd, path)
        try:
            _prepared(fd, start)
        except BaseException:
            self.discard(subject)
            raise
        return subject

    def discard(self, subject: Subject) -> None:
        """Close and unlink it."""
        os.close(subject.fd)
        if subject.path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(subject.path)

    def close(self) -> None:
        """Do nothing."""


@dataclass(slots=True)
class GuestMemfd:
    """Real guest_memfds of this kernel's KVM, with flags 0, MMAP (1) or MMAP|INIT_SHARED (3)."""

    flags: int
    name: str = ""
    column: str = ""
    _vm: int = field(default=-1)

    def __post_init__(self) -> None:
        self.column = f"gm{self.flags}"
        self.name = self.name or f"guest_memfd flags {self.flags}"

    def why_not(self) -> str:
        """Return what is missing: the device, the right to it, the capability, the flags."""
        try:
            vm = self._open()
        except OSError as error:
            return f"/dev/kvm: {error.strerror}"
        if fcntl.ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_GUEST_MEMFD) != 1:
            return "KVM_CAP_GUEST_MEMFD (Linux 6.8, CONFIG_KVM_GUEST_MEMFD)"
        offered = max(fcntl.ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_GUEST_MEMFD_FLAGS), 0)
        if self.flags & ~offered:
            return f"guest_memfd flags {self.flags:#x} (Linux 6.18; offered: {offered:#x})"
        return ""

    def _open(self) -> int:
        if self._vm < 0:
            device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
            try:
                self._vm = fcntl.ioctl(device, KVM_CREATE_VM, 0)
            finally:
                os.close(device)
        return self._vm

    def create(self, size: int, flags: int | None = None) -> int:
        """KVM_CREATE_GUEST_MEMFD; returns the descriptor, raises OSError."""
        wanted = self.flags if flags is None else flags
        argument = struct.pack("=QQ6Q", size & (1 << 64) - 1, wanted, *[0] * 6)
        return int(fcntl.ioctl(self._open(), KVM_CREATE_GUEST_MEMFD, argument_buffer(argument)))

    def make(self, start: Start) -> Subject:
        """Return a guest_memfd of SIZE bytes; its size is never 0."""
        if start is Start.EMPTY:
            raise OSError(errno.EINVAL, "a guest_memfd has its size from birth")
        fd = self.create(SIZE)
        if start is Start.FILLED:
            call(Nr.FALLOCATE, fd, _KEEP_SIZE, 0, SIZE)
        return Subject(fd)

    def discard(self, subject: Subject) -> None:
        """Close it."""
        os.close(subject.fd)

    def close(self) -> None:
        """Close the VM."""
        if self._vm >= 0:
            os.close(self._vm)
            self._vm = -1


def argument_buffer(packed: bytes) -> bytearray:
    """Return a writable ioctl argument, since the request is _IOWR."""
    return bytearray(packed)
