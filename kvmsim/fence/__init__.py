# SPDX-License-Identifier: GPL-2.0-or-later
"""Fences: what stands between this process and private pages that it was not granted.

A correct emulator needs none, as it unmaps before it acknowledges.  A fence is for the others:

* ``uffd``: the kernel stops every touch of a page that was not admitted, or was punched since,
  also where this process hangs.  The owner has a copy of the userfaultfd, and can do without our
  exit (docs/protocol.md).
* ``mprotect``: PROT_NONE but for what was admitted: a forgotten flush ends the process with
  SIGSEGV instead of allocating memory that nobody owns.  It costs two mappings for each run of
  admitted pages (vm.max_map_count) and proves nothing to the owner.
* ``none``.

All methods may be called from any thread and hold a lock for no longer than a system call takes
that waits for nobody.  Ranges are bytes, of whole pages.
"""

from __future__ import annotations

import errno
import logging
from typing import Final

from kvmsim.fence.base import Fence, FencedStage2, FenceError, Trespass
from kvmsim.fence.mprotect import MprotectFence
from kvmsim.fence.uffd import UffdFence, may_stay
from privfs.notifier.wire import Fence as Kind

__all__ = ["CHOICES", "Fence", "FenceError", "FencedStage2", "Kind", "Trespass", "make_fence"]

log = logging.getLogger(__name__)

#: What ``--fence`` takes; ``auto`` is uffd where it can be had and nothing can be swapped out.
CHOICES: Final = ("auto", *(kind.text for kind in reversed(Kind)))


def make_fence(choice: str, base: int, length: int) -> Fence:
    """Return the fence of an arena; ``choice`` is one of :data:`CHOICES`.

    FenceError says why it cannot be had; ``auto`` says so to the log instead.
    """
    if choice == Kind.NONE.text:
        return Fence(base)
    if choice == Kind.MPROTECT.text:
        return MprotectFence(base)
    try:
        if choice == "auto" and not may_stay(base, length):
            why = "swap is in use, and memory may not be locked (RLIMIT_MEMLOCK, CAP_IPC_LOCK)"
            raise OSError(errno.EPERM, why)
        return UffdFence(base)
    except OSError as error:
        if choice != "auto":
            why = f"fence uffd: {error.strerror}"
            raise FenceError(error.errno or errno.ENOSYS, why) from error
        log.info("private memory is not fenced: %s", error.strerror)
        return Fence(base)
