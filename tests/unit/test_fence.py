# SPDX-License-Identifier: GPL-2.0-or-later
"""Fences of an emulator: what may be touched, what stops the rest, and what it costs."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from hwemu.arena import ArenaFault
from hwemu.stage2 import WalkError
from kvmsim import fence
from kvmsim.fence import FencedStage2, FenceError, Kind, make_fence
from kvmsim.fence.base import count_runs, gaps
from kvmsim.fence.mprotect import MprotectFence
from kvmsim.fence.userfault import Userfault
from kvmsim.hostmem import HostMemory

PAGE = 4096
PAGES = 32
PATIENCE = 20.0
_PUNCH = 3
_MADV_DONTNEED = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def no_userfaultfd() -> str:
    """Return why there is no userfaultfd that will do, or ``""``."""
    try:
        Userfault().close()
    except OSError as error:
        return f"userfaultfd: {error.strerror}"
    return ""


needs_uffd = pytest.mark.skipif(bool(no_userfaultfd()), reason=no_userfaultfd())
BOTH = [pytest.param("uffd", marks=needs_uffd), "mprotect"]


@dataclass
class Bench:
    """An extent of 32 pages, placed behind a fence."""

    choice: str
    memfd: int = field(init=False)
    trespasses: list[str] = field(default_factory=list)
    trespassed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.host = HostMemory(self.choice)
        self.memfd = os.memfd_create("extent", os.MFD_CLOEXEC)
        os.ftruncate(self.memfd, PAGES * PAGE)
        self.hpa = self.place()

    def place(self) -> int:
        return self.host.place_private(self.memfd, 0, PAGES * PAGE, self.on_trespass, writable=True)

    def on_trespass(self, why: str) -> None:
        with self.trespassed:
            self.trespasses.append(why)
            self.trespassed.notify_all()

    def told(self, times: int) -> list[str]:
        """Wait for so many trespasses: who touched goes on before they are told."""
        with self.trespassed:
            assert self.trespassed.wait_for(lambda: len(self.trespasses) >= times, PATIENCE)
            return self.trespasses

    def close(self) -> None:
        self.host.close()
        os.close(self.memfd)

    def allocate(self, start: int = 0, end: int = PAGES) -> None:
        assert _libc.fallocate(self.memfd, 0, start * PAGE, (end - start) * PAGE) == 0

    def punch(self, start: int, end: int) -> None:
        assert _libc.fallocate(self.memfd, _PUNCH, start * PAGE, (end - start) * PAGE) == 0

    def admit(self, start: int = 0, end: int = PAGES) -> None:
        self.host.admit(self.hpa + start * PAGE, (end - start) * PAGE)

    def shut(self, start: int = 0, end: int = PAGES) -> None:
        self.host.shut(self.hpa + start * PAGE, (end - start) * PAGE)

    def read(self, page: int) -> bytes:
        """Read as a device does."""
        return self.host.read(self.hpa + page * PAGE, 1)

    def write(self, page: int, data: bytes) -> None:
        self.host.write(self.hpa + page * PAGE, data)

    def reachable(self) -> list[int]:
        found = []
        for page in range(PAGES):
            try:
                self.read(page)
                found.append(page)
            except ArenaFault:
                continue
        return found

    def address(self, page: int) -> int:
        return self.host.arena.address + self.hpa - self.host.arena.hpa_base + page * PAGE

    def touch(self, page: int) -> bytes:
        """Load a byte as the program itself, in a thread that may sleep."""
        got = ctypes.create_string_buffer(1)
        loader = threading.Thread(target=_libc.memcpy, args=(got, self.address(page), 1))
        loader.start()
        loader.join(PATIENCE)
        assert not loader.is_alive(), "the touch sleeps"
        return got.raw

    @property
    def blocks(self) -> int:
        return os.fstat(self.memfd).st_blocks * 512 // PAGE


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(request.param)
    yield made
    made.close()


both = pytest.mark.parametrize("bench", BOTH, indirect=True)
uffd = pytest.mark.parametrize("bench", [BOTH[0]], indirect=True)
mprotect = pytest.mark.parametrize("bench", ["mprotect"], indirect=True)


@both
def test_only_what_was_admitted_can_be_reached(bench: Bench) -> None:
    bench.allocate()
    assert bench.reachable() == []
    bench.admit(3, 5)
    bench.admit(9, 10)
    assert bench.reachable() == [3, 4, 9]
    bench.admit(2, 12)
    assert bench.reachable() == list(range(2, 12))
    bench.admit(2, 12)
    assert bench.trespasses == []


@both
def test_a_device_gets_an_error_and_allocates_nothing(bench: Bench) -> None:
    assert bench.reachable() == []
    with pytest.raises(ArenaFault) as caught:
        bench.write(4, b"x")
    assert caught.value.errno == errno.EFAULT
    assert bench.blocks == 0


@both
def test_what_was_shut_and_punched_is_admitted_anew(bench: Bench) -> None:
    bench.allocate()
    bench.admit()
    bench.write(4, b"x")
    bench.shut(2, 8)
    bench.punch(2, 8)
    assert not set(bench.reachable()) & set(range(2, 8))
    assert bench.blocks == PAGES - 6
    bench.allocate(4, 5)
    bench.admit(4, 5)
    assert bench.read(4) == b"\0"


@both
def test_what_was_retired_is_forgotten(bench: Bench) -> None:
    bench.allocate()
    bench.admit(0, 4)
    bench.host.retire(bench.hpa, PAGES * PAGE)
    assert bench.touch(9) == b"\0"  # anonymous memory, in nobody's way
    bench.hpa = bench.place()
    assert bench.reachable() == []
    bench.admit(1, 2)
    assert bench.reachable() == [1]


@uffd
def test_a_punch_takes_a_page_from_who_did_not_shut_it(bench: Bench) -> None:
    bench.allocate()
    bench.admit()
    bench.punch(4, 5)
    bench.allocate(4, 5)  # for somebody else
    assert 4 not in bench.reachable()


@uffd
def test_a_touch_without_a_grant_meets_nothing_and_is_told(bench: Bench) -> None:
    bench.allocate(0, 1)
    assert bench.touch(0) == b"\0"
    assert bench.touch(5) == b"\0"
    assert bench.blocks == 1
    assert ["ungranted" in why for why in bench.told(2)] == [True, True]


@uffd
def test_who_is_told_may_wait_for_one_that_sleeps_at_another_page(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stops a vCPU for its first touch waits for it to leave, and it may touch more."""
    touched = threading.Event()
    waited: list[bool] = []

    def stop(why: str) -> None:
        waited.append(touched.wait(PATIENCE))
        Bench.on_trespass(bench, why)

    monkeypatch.setattr(bench, "on_trespass", stop)
    bench.host.retire(bench.hpa, PAGES * PAGE)
    bench.hpa = bench.place()
    bench.touch(4)
    bench.touch(5)
    touched.set()
    bench.told(2)
    assert waited == [True, True]


@uffd
def test_nor_does_a_touch_after_the_punch_bring_the_page_back(bench: Bench) -> None:
    bench.allocate()
    bench.admit()
    bench.write(4, b"x")
    bench.punch(4, 5)
    assert bench.touch(4) == b"\0"
    assert bench.blocks == PAGES - 1
    assert len(bench.told(1)) == 1


@uffd
def test_a_page_that_the_kernel_took_away_comes_back(bench: Bench) -> None:
    """As it does to swap out, or to collapse into a huge page: the page stays in the file."""
    bench.allocate()
    bench.admit()
    bench.write(4, b"x")
    assert _libc.madvise(bench.address(0), PAGES * PAGE, _MADV_DONTNEED) == 0
    assert bench.touch(4) == b"x"
    assert bench.trespasses == []


@uffd
@pytest.mark.parametrize("hole", [0, 3, 7])
def test_a_grant_of_what_is_not_there_is_an_error(bench: Bench, hole: int) -> None:
    bench.allocate(0, 8)
    bench.punch(hole, hole + 1)
    with pytest.raises(FenceError, match="granted, but not there"):
        bench.admit(0, 8)
    assert bench.blocks == 7
    bench.allocate(hole, hole + 1)
    bench.admit(0, 8)  # whatever came of it before
    assert bench.reachable() == list(range(8))


@uffd
def test_other_memory_than_shmem_is_not_fenced(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(b"x" * PAGE)
    fd = os.open(path, os.O_RDWR)
    if fence.uffd._is_shmem(fd):
        os.close(fd)
        pytest.skip("the temporary directory is a tmpfs")
    hpa = bench.host.place_private(fd, 0, PAGE, bench.on_trespass, writable=True)
    assert bench.host.read(hpa, 1) == b"x"
    bench.host.admit(hpa, PAGE)
    bench.host.shut(hpa, PAGE)
    assert bench.host.read(hpa, 1) == b"x"
    os.close(fd)


def test_what_may_not_be_written_is_not_fenced() -> None:
    bench = Bench("auto")
    hpa = bench.host.place_private(bench.memfd, 0, PAGE, bench.on_trespass, writable=False)
    assert bench.host.read(hpa, 1) == b"\0"
    bench.close()


@mprotect
def test_runs_of_pages_are_counted(bench: Bench) -> None:
    made = bench.host.fence
    assert isinstance(made, MprotectFence)
    counts = []
    for start, end in ((0, 2), (4, 6), (2, 4), (8, 9), (9, 10), (20, 32)):
        bench.admit(start, end)
        counts.append(made.runs)
    assert counts == [1, 2, 1, 2, 2, 3]
    bench.shut(3, 9)
    assert made.runs == 3
    bench.host.retire(bench.hpa, PAGES * PAGE)
    assert made.runs == 0


@pytest.mark.logs("in more than 3 pieces: 0 MiB of the arena are not fenced any more")
@mprotect
def test_too_many_runs_open_the_whole_mapping(bench: Bench) -> None:
    bench.allocate()
    made = MprotectFence(bench.host.arena.address, max_runs=3)
    bench.host.fence.close()
    bench.host.fence = made
    bench.hpa = bench.place()
    for page in (0, 2, 4):
        bench.admit(page, page + 1)
    assert bench.reachable() == [0, 2, 4]
    bench.admit(8, 9)
    assert bench.reachable() == list(range(PAGES))
    assert made.runs == 0
    bench.shut(0, PAGES)  # not fenced: changes nothing
    assert bench.reachable() == list(range(PAGES))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 31), st.integers(1, 8)), max_size=30))
def test_the_count_of_runs_stays_right(deeds: list[tuple[bool, int, int]]) -> None:
    made = MprotectFence(0, max_runs=1000)
    made._protect = lambda first, last, rights: None  # type: ignore[method-assign]
    for start in (0, 16 * PAGE):  # beside each other: a run may lie in both
        made.cover(start, 16 * PAGE, -1, lambda why: None)
    for opens, start, length in deeds:
        end = min(start + length, 32)
        deed = made.admit if opens else made.shut
        deed(start * PAGE, (end - start) * PAGE)
        assert made.runs == count_runs(made._open, 0, 40)


@given(st.sets(st.integers(0, 40)), st.integers(0, 40), st.integers(1, 20))
def test_gaps(pages: set[int], start: int, length: int) -> None:
    found = list(gaps(BitMap(pages), start, start + length))
    assert [p for a, b in found for p in range(a, b)] == sorted(
        set(range(start, start + length)) - pages
    )
    assert all(a < b for a, b in found)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(found))


def test_no_fence() -> None:
    bench = Bench("none")
    assert (bench.host.fence.kind, bench.host.fence.fd) == (Kind.NONE, -1)
    bench.allocate(0, 1)
    bench.admit(0, 1)
    bench.shut(0, 1)
    assert bench.reachable() == list(range(PAGES))
    bench.close()


# --- which one -----------------------------------------------------------------------------------


def refuse() -> Userfault:
    raise OSError(errno.EPERM, "userfaultfd: Operation not permitted")


@pytest.fixture
def no_uffd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence.uffd, "Userfault", refuse)


def test_every_choice_is_a_fence() -> None:
    assert fence.CHOICES == ("auto", "uffd", "mprotect", "none")


@pytest.mark.usefixtures("no_uffd")
def test_without_userfaultfd_there_is_no_fence_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        assert make_fence("auto", 0, 1 << 30).kind is Kind.NONE
    assert "not fenced: userfaultfd: Operation not permitted" in caplog.text


@pytest.mark.usefixtures("no_uffd")
def test_a_fence_that_was_asked_for_must_be_there() -> None:
    with pytest.raises(FenceError, match="fence uffd: userfaultfd: Operation not permitted"):
        HostMemory("uffd")


@needs_uffd
@pytest.mark.parametrize(("locks", "kind"), [(True, Kind.UFFD), (False, Kind.NONE)])
def test_what_may_be_swapped_out_is_not_fenced_unasked(
    monkeypatch: pytest.MonkeyPatch, locks: bool, kind: Kind
) -> None:
    """Pages that the kernel takes away cannot be told from those of nobody."""
    monkeypatch.setattr(fence, "may_stay", lambda address, length: locks)
    for choice, expected in (("auto", kind), ("uffd", Kind.UFFD)):
        made = make_fence(choice, 0, 1 << 30)
        assert made.kind is expected
        made.close()


# --- leaves --------------------------------------------------------------------------------------


def test_pages_are_admitted_before_their_leaves_are_stored() -> None:
    admitted: list[tuple[int, int, bool]] = []

    def admit(hpa: int, length: int) -> None:
        admitted.append((hpa, length, bool(list(stage2.mapped(0, 16)))))
        if hpa >= 2 << 39:
            raise FenceError(errno.EFAULT, "not there")

    stage2 = FencedStage2(bytearray(64 * PAGE), 0x1000_0000, admit)
    stage2.map(0x5000, 1 << 39, 3, writable=False)
    assert admitted == [(1 << 39, 3 * PAGE, False)]
    assert not stage2.walk(0x5000).writable
    with pytest.raises(FenceError):
        stage2.map(0x9000, 2 << 39, 1)
    with pytest.raises(WalkError):
        stage2.walk(0x9000)
