# SPDX-License-Identifier: GPL-2.0-or-later
"""Which store a mount gets: what ``-o backing=`` and ``pagesize=`` may say."""

from __future__ import annotations

import errno
from typing import Final

from privfs.backing.hugetlb import DEFAULT_PAGE_SIZE, Hugetlb, pool_bytes
from privfs.backing.secretmem import SMALLEST, Secretmem
from privfs.backing.shmem import Shmem
from privfs.backing.store import Store, StoreError
from privfs.extents import PAGE_SIZE
from privfs.machine import Machine

#: Kinds of memory, and of which pages.
STORES: Final = {
    "shmem": "pages of 4K, or pieces of 2M that become huge pages where the machine allows it",
    "hugetlb": "huge pages that the administrator has reserved",
    "secretmem": "chunks of 2M and more that the kernel itself cannot read",
}


def choose(name: str = "shmem", page_size: int = 0) -> Store:
    """Return a store that works now; ``page_size`` in bytes, 0 for its default.

    Raises StoreError: EINVAL for an unknown kind or a page size that it does not have, EOPNOTSUPP
    for what cannot be offered here, otherwise why no page of it is to be had.
    """
    if name == "hugetlb":
        hugetlb = Hugetlb(page_size or DEFAULT_PAGE_SIZE)
        hugetlb.require_pool()
        return hugetlb
    if name == "secretmem":
        secretmem = Secretmem(page_size or SMALLEST)
        secretmem.require_works()
        return secretmem
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
