# SPDX-License-Identifier: GPL-2.0-or-later
"""The listener of a seccomp filter: calls that wait for an answer (seccomp_unotify(2))."""

from __future__ import annotations

import errno
import fcntl
import os
from struct import Struct
from typing import Final, NamedTuple

# id, pid; flags, nr, arch, instruction pointer; three arguments of six
_NOTIF: Final = Struct("<QI4xi12xQQQ8xQ8x")
_EMPTY: Final = bytes(_NOTIF.size)  # what the kernel wants to find there
_RESPONSE: Final = Struct("<QqiI")  # id, value, error, flags
_ADDFD: Final = Struct("<QIIII")  # id, flags, source, new number, flags of the new one
_RECEIVE: Final = 0xC0502100  # SECCOMP_IOCTL_NOTIF_*
_SEND: Final = 0xC0182101
_ID_VALID: Final = 0x40082102
_ADD: Final = 0x40182103
_SET_FLAGS: Final = 0x40082104
_SYNC_WAKE_UP: Final = 1  # Linux 6.6: ten times as fast where both share a CPU
_CONTINUE: Final = 1
_ADD_AND_SEND: Final = 2


class Notification(NamedTuple):
    """A system call that waits: ``tid`` made call ``nr``, with these of its arguments."""

    id: int
    tid: int
    nr: int
    first: int
    second: int
    third: int
    fifth: int


class Gone(Exception):
    """Whoever waited is gone, or was interrupted."""


class Listener:
    """The descriptor of a filter's listener; any thread may answer."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        try:
            fcntl.ioctl(fd, _SET_FLAGS, _SYNC_WAKE_UP)
        except OSError as error:
            if error.errno != errno.EINVAL:  # older than 6.6
                raise

    def receive(self) -> Notification:
        """Take the next call, waiting for it; Gone if its caller died meanwhile."""
        buffer = bytearray(_EMPTY)
        self._ioctl(_RECEIVE, buffer)
        return Notification._make(_NOTIF.unpack(buffer))

    def valid(self, id: int) -> bool:
        """Whether the caller still waits: until then its pid is its own."""
        try:
            self._ioctl(_ID_VALID, bytearray(id.to_bytes(8, "little")))
        except Gone:
            return False
        return True

    def answer(self, id: int, value: int) -> None:
        """ioctl(2) returns ``value``, or fails where it is negative, with that errno; Gone."""
        error, value = (value, 0) if value < 0 else (0, value)
        self._ioctl(_SEND, bytearray(_RESPONSE.pack(id, value, error, 0)))

    def let_go(self, id: int) -> None:
        """The kernel does what was asked of it: the descriptor is none of ours; Gone."""
        self._ioctl(_SEND, bytearray(_RESPONSE.pack(id, 0, 0, _CONTINUE)))

    def give(self, id: int, fd: int, *, cloexec: bool, answer: bool) -> int:
        """Put a duplicate of ``fd`` into the caller and return its number there; Gone, OSError.

        With ``answer`` the call returns that number.
        """
        flags = _ADD_AND_SEND if answer else 0
        request = _ADDFD.pack(id, flags, fd, 0, os.O_CLOEXEC if cloexec else 0)
        return self._ioctl(_ADD, bytearray(request))

    def _ioctl(self, request: int, buffer: bytearray) -> int:
        while True:
            try:
                return int(fcntl.ioctl(self.fd, request, buffer))
            except OSError as error:
                if error.errno == errno.EINTR:
                    continue
                if error.errno == errno.ENOENT:
                    raise Gone from None
                raise
