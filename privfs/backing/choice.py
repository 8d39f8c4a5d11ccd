# SPDX-License-Identifier: GPL-2.0-or-later
"""Which store a mount gets: what ``-o backing=`` and ``pagesize=`` may say."""

from __future__ import annotations

import errno
from typing import Final

from privfs.backing.hugetlb import DEFAULT_PAGE_SIZE, Hugetlb, pool_bytes
from privfs.backing.shmem import Shmem
from privfs.backing.store import Store, StoreError
from privfs.extents import PAGE_SIZE
from privfs.machine import Machine

#: Kinds of memory, and of which pages.
STORES: Final = {
    "shmem": "pages of 4K, or pieces of 2M that become huge pages where the machine allows it",
    "hugetlb": "huge pages that the administrator has reserved",
}
#: Kinds that are asked for and cannot be had, and why.
REFUSED: Final = {
    "secretmem": "a memfd_secret(2) takes no seals, cannot be punched, is given a size only once "
    "and tells nobody what it holds: memory could not be taken from users that keep a descriptor, "
    "nor audited; shmem is hidden from other processes too, see docs/backing.md",
}


def choose(name: str = "shmem", page_size: int = 0) -> Store:
    """Return a store that works now; ``page_size`` in bytes, 0 for its default.

    Raises StoreError: EINVAL for an unknown kind or a page size that it does not have, EOPNOTSUPP
    for what cannot be offered (here), ENOSPC or ENOMEM where no page of it is to be had.
    """
    if name in REFUSED:
        raise StoreError(errno.EOPNOTSUPP, f"backing={name} is not offered: {REFUSED[name]}")
    if name == "hugetlb":
        hugetlb = Hugetlb(page_size or DEFAULT_PAGE_SIZE)
        hugetlb.require_pool()
        return hugetlb
    if name != "shmem":
        raise StoreError(errno.EINVAL, f"backing={name}: choose {' or '.join(STORES)}")
    shmem = Shmem(page_size or PAGE_SIZE)
    shmem.require_exact()
    return shmem


def default_size(name: str = "shmem", page_size: int = 0) -> int:
    """Return the budget in bytes of a mount that is not told any.

    Half of the memory of the machine (tmpfs's default) or of our cgroup, or all that the pool of
    huge pages may hold.
    """
    if name == "hugetlb":
        return pool_bytes(page_size or DEFAULT_PAGE_SIZE)
    return Machine().total_bytes() // (2 * PAGE_SIZE) * PAGE_SIZE
