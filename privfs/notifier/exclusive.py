# SPDX-License-Identifier: GPL-2.0-or-later
"""Which sessions have a file for themselves.

kvm_gmem_bind() of virt/kvm/guest_memfd.c refuses a file of another VM, so that no page is the
private memory of two guests.  Here a file may have several users, unless one asked to be the only
one, as a confidential VM must: the tables that know the owner of each page are those of its host,
and know nothing of another process's.
"""

from __future__ import annotations

from collections.abc import Hashable, Set


class Exclusive:
    """Files and the sessions, by their ids, that alone may have them.

    Such a right begins with a registration.  It outlives the socket, and goes over to the session
    that replaces this one, which has it even before it has registered the file again.
    """

    __slots__ = ("_holders",)

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}

    def holder(self, ino: int) -> int | None:
        """Return the session that alone may have a file, None if any may."""
        return self._holders.get(ino)

    def of(self, sid: int) -> list[int]:
        """Return the files that no other session may have."""
        return [ino for ino, holder in self._holders.items() if holder == sid]

    def refuses(self, ino: int, sid: int, users: Set[int], *, exclusive: bool) -> bool:
        """Whether a session must not register a file that has these users."""
        return self._holders.get(ino, sid) != sid or (exclusive and bool(users - {sid}))

    def registered(self, ino: int, sid: int, *, exclusive: bool) -> None:
        """A session has become a user of a file that it was not refused."""
        if exclusive:
            self._holders[ino] = sid
        else:
            self._holders.pop(ino, None)  # of a session that it replaced

    def replaced(self, old: int, sid: int) -> None:
        """A session takes the place of another, which is about to end."""
        for ino in self.of(old):
            self._holders[ino] = sid

    def left(self, ino: int, sid: int) -> bool:
        """A session is done with a file; whether it was the only one that could have it."""
        if self._holders.get(ino) != sid:
            return False
        del self._holders[ino]
        return True

    def ended(self, sid: int) -> None:
        """A session is gone."""
        for ino in self.of(sid):
            del self._holders[ino]

    def expired(self, ino: int) -> None:
        """A file is gone."""
        self._holders.pop(ino, None)

    def key(self) -> Hashable:
        """Return the state as a hashable value."""
        return tuple(self._holders.items())

    def copy(self) -> Exclusive:
        """Return an independent copy."""
        twin = type(self)()
        twin._holders = self._holders.copy()
        return twin
