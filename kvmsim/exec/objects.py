# SPDX-License-Identifier: GPL-2.0-or-later
"""Descriptors of the device in other processes: made here, known by what they name, watched.

A VM's is one end of a socket pair, whose other end tells when the last copy is closed.  A vCPU's
is a memfd, so that it can be mapped; inotify(7) tells when its last descriptor and mapping go.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
import struct
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from kvmsim.device.results import DeviceObject, FdKind, MappableObject, NewFd
from kvmsim.device.vcpu import VcpuDevice
from kvmsim.device.vm import VmDevice
from kvmsim.exec.process import Identity
from kvmsim.exec.syscalls import check, libc

_IN_CLOSE: Final = 0x8 | 0x10
_IN_CLOEXEC, _IN_NONBLOCK = 0o2000000, 0o4000
_EVENT: Final = struct.Struct("<iIII")


@dataclass(slots=True)
class _Held:
    identity: Identity
    object: DeviceObject
    memory: mmap.mmap | None = None
    fd: int = -1  #: the memfd, ours


@dataclass(frozen=True, slots=True)
class Made:
    """A new descriptor, to be put into the caller; then :meth:`Objects.given`."""

    fd: int
    cloexec: bool
    key: int | None  #: None for a private file


class Objects:
    """What the device has given out. ``known`` is by identity.

    What tells that something was closed is in ``epoll``; :meth:`happened` sees to it.
    """

    def __init__(self, epoll: select.epoll) -> None:
        self.known: dict[Identity, DeviceObject] = {}
        self._epoll = epoll
        self._inotify = check(libc.inotify_init1(_IN_CLOEXEC | _IN_NONBLOCK), "inotify_init1")
        epoll.register(self._inotify, select.EPOLLIN)
        self._vcpus: dict[int, _Held] = {}  #: by inotify watch
        self._vms: dict[int, tuple[socket.socket, _Held]] = {}  #: by the number of our end

    def make(self, new: NewFd) -> Made:
        """Make the descriptor of a new object; OSError, with the object released."""
        if new.kind is FdKind.PRIVATE_FILE:
            return Made(new.fd, new.cloexec, None)
        assert new.object is not None
        try:
            return self._vcpu(new) if new.kind is FdKind.MAPPABLE else self._vm(new)
        except OSError:
            new.object.release()
            raise

    def _vm(self, new: NewFd) -> Made:
        assert new.object is not None
        ours, theirs = socket.socketpair()
        fd = theirs.detach()
        held = _Held(_identity(fd), new.object)
        self._vms[ours.fileno()] = ours, held
        self._epoll.register(ours, select.EPOLLIN)
        self.known[held.identity] = new.object
        return Made(fd, new.cloexec, ours.fileno())

    def _vcpu(self, new: NewFd) -> Made:
        device: MappableObject = new.object  # type: ignore[assignment]
        fd = os.memfd_create(new.name, os.MFD_CLOEXEC)
        os.ftruncate(fd, new.size)
        memory = mmap.mmap(fd, new.size)
        device.attach(memoryview(memory))
        path = f"/proc/self/fd/{fd}"
        given = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # an open file of its own: it is watched
        watch = check(
            libc.inotify_add_watch(self._inotify, path.encode(), ctypes.c_uint32(_IN_CLOSE)),
            "inotify_add_watch",
        )
        held = _Held(_identity(fd), device, memory, fd)
        self._vcpus[watch] = held
        self.known[held.identity] = device
        return Made(given, new.cloexec, None)

    def vms(self, mm: Hashable) -> set[VmDevice]:
        """The VMs of an address space, those included that live by their vCPUs alone."""
        found = {held.vm for held in list(self.known.values()) if isinstance(held, VcpuDevice)}
        found |= {held for held in list(self.known.values()) if isinstance(held, VmDevice)}
        return {vm for vm in found if vm.mm == mm}

    def happened(self, fd: int) -> None:
        """A descriptor in ``epoll`` is readable; those of others are let be."""
        if fd == self._inotify:
            self._closed()
        elif fd in self._vms:
            self._hung_up(fd)

    def _hung_up(self, end: int) -> None:
        """The last descriptor of a VM is gone."""
        sock, held = self._vms.pop(end)
        self._epoll.unregister(sock)
        sock.close()
        self._release(held)

    def _closed(self) -> None:
        """Something was closed: release the vCPUs that nobody has."""
        try:
            data = os.read(self._inotify, 1 << 16)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size + length
            if mask & _IN_CLOSE and watch in self._vcpus:
                libc.inotify_rm_watch(self._inotify, watch)
                self._release(self._vcpus.pop(watch))

    def close(self) -> None:
        """Release everything, vCPUs first."""
        for watch in list(self._vcpus):
            self._release(self._vcpus.pop(watch))
        for end in list(self._vms):
            self._hung_up(end)
        os.close(self._inotify)

    def _release(self, held: _Held) -> None:
        self.known.pop(held.identity, None)
        held.object.release()
        if held.memory is not None:
            try:
                held.memory.close()
            except BufferError:
                pass  # the device still looks at it; it goes with the last view
            os.close(held.fd)


def _identity(fd: int) -> Identity:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
