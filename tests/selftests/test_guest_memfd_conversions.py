# SPDX-License-Identifier: GPL-2.0-or-later
"""x86/guest_memfd_conversions_test: one page for both types, and the file knows which it has.

After the selftest of the series "guest_memfd: In-place conversion support" (2026), which no kernel
has yet.  As there, host and guest read, compare and store one byte after the other, and who may
not gets SIGBUS or an exit.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Callable, Iterator

import pytest
from selftests.inplace import FILE, GPA, File
from selftests.machine import MAPPABLE, code
from selftests.mountedfile import MountedFile

from kvmsim.effect import Access, Retry, RetryReason
from kvmsim.fault import Fault
from kvmsim.hostaccess import HostAccess
from kvmsim.inplace import ConversionError
from kvmsim.uapi import (
    GUEST_MEMFD_FLAG_MMAP,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    KVM_SET_MEMORY_ATTRIBUTES2_ZERO,
    PAGE_SIZE,
)

ZERO = KVM_SET_MEMORY_ATTRIBUTES2_ZERO
PRESERVE = KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE
KINDS = ["sw-protected", "pkvm"]  #: who sees the same bytes on both sides
MOUNT = pytest.param("mount", marks=pytest.mark.fuse)
COMMON = ["sw-protected", MOUNT]


@pytest.fixture(params=["simulated"])
def target(request: pytest.FixtureRequest) -> str:
    """No kernel has the ioctl."""
    return str(request.param)


Make = Callable[..., "File | MountedFile"]


@pytest.fixture(params=[*KINDS, MOUNT])
def make(request: pytest.FixtureRequest, target: str) -> Iterator[Make]:
    """What makes a file (npages, flags): the machine alone, or the device over a mount."""
    with contextlib.ExitStack() as stack:

        def made(npages: int, flags: int) -> File | MountedFile:
            if request.param != "mount":
                return File(npages, flags, request.param)
            folder = request.getfixturevalue("mounted").path
            return stack.enter_context(contextlib.closing(MountedFile(folder, npages, flags)))

        yield made


# --- host and guest take turns ------------------------------------------------------------------


class Turns:
    """A byte per page that host and guest count up in turns."""

    def __init__(self, file: File | MountedFile) -> None:
        self.file = file
        self.values: dict[int, int] = {}

    def _next(self, page: int) -> tuple[bytes, bytes]:
        value = self.values.get(page, 0)
        self.values[page] = value + 1
        return bytes([value]), bytes([value + 1])

    def host(self, page: int) -> None:
        """Load, compare, store; an index that is private refuses all of it."""
        at = page * PAGE_SIZE
        if self.file.is_private(page):
            assert code(lambda: self.file.read(at, 1)) == "EFAULT"
            assert code(lambda: self.file.write(at, b"?")) == "EFAULT"
            return
        found, stored = self._next(page)
        assert self.file.read(at, 1) == found
        self.file.write(at, stored)

    def guest(self, page: int) -> None:
        """The guest does so whatever the type is, since its attribute says the type."""
        found, stored = self._next(page)
        assert self.file.guest_read(page * PAGE_SIZE, 1) == found
        self.file.guest_write(page * PAGE_SIZE, stored)

    def both(self, page: int) -> None:
        self.guest(page)
        self.host(page)
        self.guest(page)

    def convert(self, page: int, npages: int = 1, *, private: bool) -> None:
        self.file.convert(page * PAGE_SIZE, npages * PAGE_SIZE, private=private)
        for one in range(page, page + npages):
            assert self.file.is_private(one) == private


def test_init_private(make: Make) -> None:
    """Private from birth: the guest has it, the host only after a conversion."""
    turns = Turns(make(1, GUEST_MEMFD_FLAG_MMAP))
    turns.both(0)
    turns.convert(0, private=False)
    turns.both(0)
    turns.convert(0, private=True)
    turns.both(0)


def test_init_shared(make: Make) -> None:
    """Shared from birth: both have it until a conversion."""
    turns = Turns(make(1, MAPPABLE))
    turns.both(0)
    turns.convert(0, private=True)
    turns.both(0)
    turns.convert(0, private=False)
    turns.both(0)


@pytest.mark.parametrize("page", range(4))
def test_indexing(make: Make, page: int) -> None:
    """A conversion is precise: no other page changes its type or bytes."""
    turns = Turns(make(4, MAPPABLE))
    others = [other for other in range(4) if other != page]
    for each in range(4):
        turns.both(each)
    turns.convert(page, private=True)
    for each in others:
        assert not turns.file.is_private(each)
        turns.both(each)
    turns.both(page)
    turns.convert(page, private=False)
    for each in range(4):
        turns.both(each)


def test_before_allocation_shared(make: Make) -> None:
    """What has no page yet has a type already: to private."""
    turns = Turns(make(1, MAPPABLE))
    turns.convert(0, private=True)
    assert turns.file.pages == {}
    turns.both(0)


def test_before_allocation_private(make: Make) -> None:
    """What has no page yet has a type already: to shared."""
    turns = Turns(make(1, GUEST_MEMFD_FLAG_MMAP))
    turns.convert(0, private=False)
    assert turns.file.pages == {}
    turns.both(0)


def layouts() -> Iterator[frozenset[int]]:
    """Which of four pages are allocated."""
    for count in range(5):
        yield from map(frozenset, itertools.combinations(range(4), count))


@pytest.mark.parametrize(
    "allocated",
    [pytest.param(layout, id=f"{sum(1 << n for n in layout):04b}") for layout in layouts()],
)
@pytest.mark.parametrize("make", COMMON, indirect=True)
def test_unallocated_folios(make: Make, allocated: frozenset[int]) -> None:
    """One conversion over any mixture of pages that are there and pages that are not."""
    turns = Turns(make(4, MAPPABLE))
    for page in allocated:
        turns.host(page)
    turns.convert(0, 4, private=True)
    assert set(turns.file.pages) == allocated
    for page in range(4):
        turns.both(page)
    turns.file.punch(0, 4 * PAGE_SIZE)
    turns.values.clear()
    for page in allocated:
        turns.guest(page)
    turns.convert(0, 4, private=False)
    assert set(turns.file.pages) == allocated
    for page in range(4):
        turns.both(page)


def test_truncate(make: Make) -> None:
    """A punch frees the page and leaves its type."""
    turns = Turns(make(1, MAPPABLE))
    for private in (False, True, False):
        turns.convert(0, private=private)
        turns.both(0)
        turns.file.punch(0, PAGE_SIZE)
        assert turns.file.is_private(0) == private
        turns.values.clear()
        turns.both(0)


def test_forked_accesses(make: Make) -> None:
    """Two mappings of the host: what one may touch the other may, before and after."""
    file = make(1, MAPPABLE)
    mine, other = Turns(file), Turns(file)
    other.values = mine.values
    mine.host(0)
    other.host(0)
    mine.convert(0, private=True)
    mine.host(0)
    other.host(0)
    mine.guest(0)
    other.convert(0, private=False)
    other.host(0)
    mine.host(0)


@pytest.mark.parametrize("page", range(4))
def test_elevated_refcount(make: Make, page: int) -> None:
    """A page that someone has in hand: EAGAIN, where it is, and nothing is changed."""
    file = make(4, MAPPABLE)
    file.write(0, b"A" * 4 * PAGE_SIZE)
    pinned = file.pin(page * PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(ConversionError) as caught:
        file.convert(0, 4 * PAGE_SIZE, private=True)
    assert (caught.value.errno, caught.value.error_offset) == (errno.EAGAIN, page * PAGE_SIZE)
    assert not any(file.is_private(each) for each in range(4))
    assert file.read(0, 4 * PAGE_SIZE) == b"A" * 4 * PAGE_SIZE
    if page:
        file.convert(0, page * PAGE_SIZE, private=True)
        assert file.is_private(page - 1)
    file.unpin(pinned)
    file.convert(0, 4 * PAGE_SIZE, private=True)
    assert all(file.is_private(each) for each in range(4))
    assert file.guest_read(0, 4 * PAGE_SIZE) == b"A" * 4 * PAGE_SIZE


def test_elevated_refcount_to_shared(make: Make) -> None:
    """To shared nobody of the host can have a page in hand; a redundant conversion is none."""
    file = make(1, MAPPABLE)
    pinned = file.pin(0, PAGE_SIZE)
    file.convert(0, PAGE_SIZE, private=False)
    file.unpin(pinned)


def test_zero_not_to_private(make: Make) -> None:
    """Nobody promises a guest zeros that it would have to trust the host for."""
    file = make(2, MAPPABLE)
    file.write(0, b"A" * PAGE_SIZE)
    with pytest.raises(ConversionError) as caught:
        file.convert(0, PAGE_SIZE, private=True, flags=ZERO)
    assert (caught.value.errno, caught.value.error_offset) == (errno.EOPNOTSUPP, 0)
    assert not file.is_private(0)
    assert file.read(0, PAGE_SIZE) == b"A" * PAGE_SIZE


@pytest.mark.parametrize("make", COMMON, indirect=True)
def test_zero_to_shared(make: Make) -> None:
    """The host finds zeros, and the guest too; what is not allocated stays so."""
    file = make(2, GUEST_MEMFD_FLAG_MMAP)
    file.guest_write(0, b"A" * PAGE_SIZE)
    file.convert(0, 2 * PAGE_SIZE, private=False, flags=ZERO)
    assert set(file.pages) == {0}
    assert file.read(0, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)
    assert file.guest_read(0, PAGE_SIZE) == bytes(PAGE_SIZE)


@pytest.mark.parametrize("private", [True, False], ids=["to-private", "to-shared"])
@pytest.mark.parametrize("make", COMMON, indirect=True)
def test_unspecified_scrambles(make: Make, private: bool) -> None:
    """Without a mode the bytes are others, also where the type was already the one."""
    for flags in (MAPPABLE, GUEST_MEMFD_FLAG_MMAP):
        file = make(1, flags)
        file.guest_write(0, b"A" * PAGE_SIZE)
        file.convert(0, PAGE_SIZE, private=private, flags=0)
        found = file.guest_read(0, PAGE_SIZE)
        assert found != b"A" * PAGE_SIZE
        assert found != bytes(PAGE_SIZE), "zeros would be taken for a promise"


@pytest.mark.parametrize("kind", KINDS)
def test_faults_wait(target: str, kind: str) -> None:
    """Between begin and end neither side gets the page of a conversion."""
    file = File(2, MAPPABLE, kind)
    file.write(0, b"A" * PAGE_SIZE)
    seen = []

    def meanwhile() -> None:
        seen.append(file.vm.begin_fault(Fault(0, GPA, Access())))
        seen.append(HostAccess(FILE, 0, 1).step(file.vm.mmu))

    file.convert(0, PAGE_SIZE, private=True, meanwhile=meanwhile)
    assert seen == [Retry(RetryReason.IN_PROGRESS)] * 2
    assert file.guest_read(0, 1) == b"A"
