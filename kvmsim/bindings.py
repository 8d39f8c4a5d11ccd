# SPDX-License-Identifier: GPL-2.0-or-later
"""Which VMs of a host have which private files.

kvm_gmem_bind() of virt/kvm/guest_memfd.c refuses a file of another VM (EINVAL). Here a file may
have several users, as in the v7 series, but not where hardware keeps one owner of each page: two
sessions map the same memory at two host-physical addresses, of which its tables would know nothing.

Of the VMs of other processes only the file's owner knows, so a confidential VM registers there for
exclusive use.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from typing import Final

from kvmsim.ownerview import OwnerView
from privfs.notifier.lane import LinkError

#: The socket of the mount, and the inode.
File = tuple[str, int]


def taken(path: str, owner: OwnerView, ino: int) -> LinkError:
    """What a VM is told whose file the owner refused it with EBUSY: EINVAL, as by `Bindings`."""
    alone, users = None, ""
    with contextlib.suppress(LinkError):  # whoever it was may have left, or the owner not answer
        alone = owner.exclusive(ino)
        users = alone or ", ".join(owner.users(ino))
    if alone is None:
        whose = users or "another process"
        why = f"{path} is memory of {whose}, and a confidential VM shares its file with nobody"
    else:
        why = f"{path} is the memory of a confidential VM, {alone}, and of no other VM"
    return LinkError(errno.EINVAL, f"{why}; use another file, or end {users or 'that'}")


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
