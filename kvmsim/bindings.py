# SPDX-License-Identifier: GPL-2.0-or-later
"""Which VMs of a host have which private files.

kvm_gmem_bind() of virt/kvm/guest_memfd.c refuses a file of another VM (EINVAL). Here a file may
have several users, as in the v7 series, but not where hardware keeps one owner of each page: two
sessions map the same memory at two host-physical addresses, of which its tables would know nothing.
"""

from __future__ import annotations

import errno
import threading
from typing import Final

from privfs.notifier.lane import LinkError

#: The socket of the mount, and the inode.
File = tuple[str, int]


class Bindings:
    """Files and their VMs, which are any objects. From any thread."""

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        self._users: Final[dict[File, dict[object, bool]]] = {}

    def take(self, file: File, vm: object, *, exclusive: bool) -> None:
        """``vm`` uses ``file``, again or from now on; ``exclusive``: nobody else may.

        LinkError (EINVAL) if another has it so, or has it at all where ``vm`` wants it so.
        """
        with self._lock:
            users = self._users.setdefault(file, {})
            others = [alone for user, alone in users.items() if user is not vm]
            if others and (exclusive or any(others)):
                who = "a confidential VM's" if any(others) else "another VM's"
                raise LinkError(
                    errno.EINVAL,
                    f"the file with inode {file[1]} of the mount at {file[0]} is {who} memory, and "
                    "cannot be shared with a confidential VM",
                )
            users[vm] = exclusive

    def drop(self, vm: object, file: File | None = None) -> None:
        """``vm`` uses ``file`` no more; None: no file."""
        with self._lock:
            for one in [file] if file is not None else list(self._users):
                users = self._users.get(one, {})
                users.pop(vm, None)
                if not users:
                    self._users.pop(one, None)
