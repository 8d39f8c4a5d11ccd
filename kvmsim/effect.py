# SPDX-License-Identifier: GPL-2.0-or-later
"""What a vCPU's fault is told, and what it asks for: the values that cross the core's border."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvmsim.exits import Exit
from kvmsim.memslot import Memslot

# --- what goes in -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Access:
    """What the guest did. ``data`` is what a write stores; only an MMIO exit needs it."""

    write: bool = False
    fetch: bool = False
    length: int = 1
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class PageGrant:
    """The owner's answer: pages [start, end) of ``file`` lie in extent instance ``instance``.

    ``seq`` is the last invalidation the owner had sent when it granted; ``status`` an errno, 0 if
    granted.
    """

    file: int
    start: int
    end: int
    seq: int
    instance: int
    writable: bool = True
    status: int = 0


# --- what comes out ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NeedPage:
    """Ask the owner for ``page`` of the private ``file``, then call ``page_arrived``.

    Of [start, end) it may grant as well what is allocated already; every page of it belongs to
    the same slot and is private.
    """

    file: int
    page: int
    start: int
    end: int
    write: bool


@dataclass(frozen=True, slots=True)
class NeedShared:
    """Look ``page`` up in the shared side of ``slot``, then call ``shared_arrived``."""

    slot: Memslot
    page: int


@dataclass(frozen=True, slots=True)
class Installed:
    """Leaves exist for ``npages`` from ``gpa`` (with the shared bit, if shared): resume."""

    gpa: int
    npages: int


class RetryReason(Enum):
    """Why what was found may no longer hold."""

    IN_PROGRESS = "an invalidation of the gfn is in progress"
    INVALIDATED = "slots, attributes or pages of the VM changed since the snapshot"
    NEWER = "a newer invalidation of the page was processed than the owner's grant knew"
    INSTANCE = "the extent instance of the grant is not here"


@dataclass(frozen=True, slots=True)
class Retry:
    """Begin the same fault again; nothing was installed."""

    reason: RetryReason


@dataclass(frozen=True, slots=True)
class LeaveGuest:
    """KVM_RUN ends with ``exit``."""

    exit: Exit


Effect = NeedPage | NeedShared | Installed | Retry | LeaveGuest
