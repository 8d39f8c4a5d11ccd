# SPDX-License-Identifier: GPL-2.0-or-later
"""The host at shared memory of a file that converts in place.

A mount's files cannot be mapped, so nobody of the host has a page by itself: who wants one asks
the owner as a vCPU does, and is refused where the index is private, as a touch of a guest_memfd's
mapping is (kvm_gmem_fault_user_mapping(): SIGBUS). Until it is closed an access is a reference
that keeps its pages from being converted to private. It keeps nobody from punching them: an
invalidation from below severs it, under the lock that every use of it takes, so the memory is
free to go when that is acknowledged, however long the host would have held it.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, Self

from kvmsim.effect import NeedPage, PageGrant, Retry, RetryReason
from kvmsim.inplace import InPlaceFile
from kvmsim.mmu import Mmu
from kvmsim.uapi import EHWPOISON, PAGE_SIZE


class Place(NamedTuple):
    """``npages`` pages of the file from ``page`` lie at ``hpa``."""

    page: int
    npages: int
    hpa: int


@dataclass(frozen=True, slots=True)
class Opened:
    """All pages are in hand, at these places; ``close`` gives them back."""

    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class HostRefused:
    """None is: EFAULT for private memory, or why the owner has no page. Nothing is held."""

    errno: int
    page: int
    reason: str


HostEffect = NeedPage | Retry | Opened | HostRefused


class HostState(Enum):
    """Where an access stands."""

    NEW = "new"
    WAIT_PAGE = "waits for a page"
    OPEN = "open"
    CLOSED = "closed"


@dataclass(slots=True)
class HostAccess:
    """An access to pages [start, end) of ``file``. All calls under the VM's lock."""

    file: int
    start: int
    end: int
    write: bool = False
    state: HostState = HostState.NEW
    places: tuple[Place, ...] = ()
    reference: int | None = None

    def step(self, mmu: Mmu) -> HostEffect:
        """Begin, or go on after Retry: what is missing, or Opened."""
        self._require("step", HostState.NEW)
        file, at = self._file(mmu), self._reached
        if not 0 <= self.start < self.end <= file.npages:
            return self._refuse(mmu, errno.EINVAL, self.start, "outside the file")
        if file.is_converting(self.start, self.end):
            return Retry(RetryReason.IN_PROGRESS)
        run = file.attributes.run(at)
        if file.is_private(at) or run.end < self.end:
            page = at if file.is_private(at) else run.end
            return self._refuse(mmu, errno.EFAULT, page, "the index is private")
        if at == self.end:
            return self._open(mmu)
        if (self.file, at) in mmu.poison:
            return self._refuse(mmu, EHWPOISON, at, "the page is poisoned")
        self.state = HostState.WAIT_PAGE
        return NeedPage(self.file, at, at, min(self.end, at + mmu.window), self.write)

    def page_arrived(self, mmu: Mmu, grant: PageGrant) -> HostEffect:
        """Take what was granted if it still may be, and go on."""
        self._require("page_arrived", HostState.WAIT_PAGE)
        at = self._reached
        self.state = HostState.NEW
        status = grant.status
        if not status and self.write and not grant.writable:
            status = errno.EACCES
        if status or grant.file != self.file or not grant.start <= at < grant.end:
            return self._refuse(mmu, status or errno.EIO, at, "the owner has no such page")
        start, end = mmu.backing.installable(grant.file, at, grant.start, grant.end, grant.seq)
        if not start <= at < end:
            return Retry(RetryReason.NEWER)
        hpa = mmu.backing.hpa(grant.instance, at)
        if hpa is None:
            return Retry(RetryReason.INSTANCE)
        file = self._file(mmu)
        if file.is_converting(self.start, self.end):
            return Retry(RetryReason.IN_PROGRESS)
        run = file.attributes.run(at)
        if file.is_private(at):
            return self._refuse(mmu, errno.EFAULT, at, "the index is private")
        _, last = mmu.poison.clip(self.file, at, at, min(end, self.end, run.end))
        if mmu.backing.hpa(grant.instance, last - 1) != hpa + (last - 1 - at) * PAGE_SIZE:
            last = at + 1
        if last == at or (self.file, at) in mmu.poison:
            return self._refuse(mmu, EHWPOISON, at, "the page is poisoned")
        self.places = (*self.places, Place(at, last - at, hpa))
        if self.reference is None:
            self.reference = file.refer(at, last)
        elif not file.widen(self.reference, last):
            return self._severed(mmu)
        return self._open(mmu) if last == self.end else self.step(mmu)

    def held(self, mmu: Mmu) -> bool:
        """Whether it is open and nothing has severed it: its places may be used (lock held)."""
        return self.state is HostState.OPEN and self._intact(mmu)

    def close(self, mmu: Mmu) -> None:
        """Let go of every page; no access may follow. Again is no error."""
        if self.reference is not None:
            self._file(mmu).release(self.reference)
        self.reference, self.places = None, ()
        self.state = HostState.CLOSED

    def key(self) -> Hashable:
        """The whole state as a hashable value."""
        return (self.file, self.start, self.end, self.write, self.state, self.places)

    def copy(self) -> Self:
        """A twin for a copied Mmu."""
        return replace(self)

    @property
    def _reached(self) -> int:
        return self.places[-1].page + self.places[-1].npages if self.places else self.start

    def _open(self, mmu: Mmu) -> HostEffect:
        if not self._intact(mmu):
            return self._severed(mmu)
        self.state = HostState.OPEN
        return Opened(self.places)

    def _intact(self, mmu: Mmu) -> bool:
        return self.reference is not None and self._file(mmu).holds(self.reference)

    def _severed(self, mmu: Mmu) -> Retry:
        """Pages that were in hand were punched while others were asked for: from the start."""
        self.close(mmu)
        self.state = HostState.NEW
        return Retry(RetryReason.INVALIDATED)

    def _file(self, mmu: Mmu) -> InPlaceFile:
        file = None if mmu.files is None else mmu.files.get(self.file)
        if file is None:
            raise RuntimeError(f"host access to file {self.file}: it does not convert in place")
        return file

    def _refuse(self, mmu: Mmu, number: int, page: int, reason: str) -> HostRefused:
        self.close(mmu)
        return HostRefused(number, page, reason)

    def _require(self, step: str, state: HostState) -> None:
        if self.state is not state:
            raise RuntimeError(
                f"{step} of a host access to pages [{self.start:#x}, {self.end:#x}): it is "
                f"{self.state.value!r}, needs {state.value!r}"
            )
