# SPDX-License-Identifier: GPL-2.0-or-later
"""A private file against a real memfd, and many operations at once against their invariants.

Where a resizable file has an answer of its own (unaligned holes and sizes, KEEP_SIZE past the end
of the file, ZERO_RANGE), the memfd is not asked or is asked for the same in other words.
"""

from __future__ import annotations

import ctypes
import errno
import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from privfs.budget import Budget
from privfs.memfile import Look, MemFile
from privfs.operation import (
    COMPATIBLE,
    Done,
    Effect,
    Fallocate,
    FaultIn,
    Perform,
    Request,
    Resize,
    Settled,
    Step,
)
from privfs.personality import PAGE_SIZE, RESIZABLE, Refused

KEEP, PUNCH, ZERO = 0x01, 0x03, 0x10
PAGES = st.integers(0, 24)
COUNTS = st.integers(1, 12)

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """Call the kernel's fallocate; return the errno."""
    return 0 if libc.fallocate(fd, mode, offset, length) == 0 else ctypes.get_errno()


class AgainstMemfd(RuleBasedStateMachine):
    """One request after the other, in a file without users and in a memfd."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(1 << 20)
        self.file = MemFile(RESIZABLE, self.budget)
        self.fd = os.memfd_create("oracle", os.MFD_CLOEXEC)

    def teardown(self) -> None:
        """Say of every page whether it is allocated: punch it and see whether memory comes back."""
        try:
            for page in range(64):
                before = os.fstat(self.fd).st_blocks
                assert fallocate(self.fd, PUNCH, page * PAGE_SIZE, PAGE_SIZE) == 0
                freed = before != os.fstat(self.fd).st_blocks
                assert freed == (page in self.file.pages), f"page {page}"
        finally:
            os.close(self.fd)

    def ours(self, request: Request) -> int:
        """Perform a request on the file; return the errno."""
        effects = self.file.submit("op", request)
        while True:
            performs = [e for e in effects if isinstance(e, Perform)]
            if not performs:
                (done,) = [e for e in effects if isinstance(e, Done)]
                return done.errno
            effects = self.file.step_done("op")

    @rule(pages=PAGES)
    def truncate(self, pages: int) -> None:
        os.ftruncate(self.fd, pages * PAGE_SIZE)
        assert self.ours(Resize(pages * PAGE_SIZE)) == 0

    @rule(size=st.integers(-3, 100_000))
    def truncate_to_no_page(self, size: int) -> None:
        if size % PAGE_SIZE:
            assert self.ours(Resize(size)) == errno.EINVAL  # the memfd takes it, we never do

    @rule(start=PAGES, count=COUNTS)
    def allocate(self, start: int, count: int) -> None:
        offset, length = start * PAGE_SIZE, count * PAGE_SIZE
        expected = fallocate(self.fd, 0, offset, length)
        assert self.ours(Fallocate(0, offset, length)) == expected == 0

    @precondition(lambda self: self.file.size)
    @rule(data=st.data(), mode=st.sampled_from([0, KEEP]))
    def allocate_any_bytes_inside(self, data: st.DataObject, mode: int) -> None:
        offset = data.draw(st.integers(0, self.file.size - 1))
        length = data.draw(st.integers(1, self.file.size - offset))
        expected = fallocate(self.fd, mode, offset, length)
        assert self.ours(Fallocate(mode, offset, length)) == expected == 0

    @rule(start=PAGES, count=COUNTS)
    def keep_size(self, start: int, count: int) -> None:
        offset, length = start * PAGE_SIZE, count * PAGE_SIZE
        answer = self.ours(Fallocate(KEEP, offset, length))
        if offset + length > self.file.size:
            assert answer == errno.EINVAL
        else:
            assert answer == fallocate(self.fd, KEEP, offset, length) == 0

    @rule(start=PAGES, count=COUNTS)
    def punch(self, start: int, count: int) -> None:
        offset, length = start * PAGE_SIZE, count * PAGE_SIZE
        expected = fallocate(self.fd, PUNCH, offset, length)
        assert self.ours(Fallocate(PUNCH, offset, length)) == expected == 0

    @rule(start=PAGES, count=COUNTS)
    def zero(self, start: int, count: int) -> None:
        """Shmem has no ZERO_RANGE; it is a hole that is filled again."""
        offset, length = start * PAGE_SIZE, count * PAGE_SIZE
        assert self.ours(Fallocate(ZERO, offset, length)) == 0
        assert fallocate(self.fd, PUNCH, offset, length) == 0
        assert fallocate(self.fd, 0, offset, length) == 0

    @rule(page=PAGES)
    def touch(self, page: int) -> None:
        try:
            found = self.file.look(page)
        except Refused as refused:
            assert refused.errno == errno.EFBIG  # noqa: PT017
            assert page * PAGE_SIZE >= os.fstat(self.fd).st_size
            return
        before = os.fstat(self.fd).st_blocks
        os.pwrite(self.fd, b"\0", page * PAGE_SIZE)
        assert (found is Look.HOLE) == (os.fstat(self.fd).st_blocks > before)
        if found is Look.HOLE:
            assert self.ours(FaultIn(page)) == 0

    @rule(
        mode=st.sampled_from([0, KEEP, PUNCH, 0x02, 0x08, 0x20, 0x40, 0x41, 0x13]),
        offset=st.sampled_from([0, -1, -PAGE_SIZE, 2**63 - PAGE_SIZE, 2**63 - 1]),
        length=st.sampled_from([0, -1, PAGE_SIZE, 2**63 - 1]),
    )
    def nonsense(self, mode: int, offset: int, length: int) -> None:
        """Both refuse it, for the same reason."""
        sensible = offset >= 0 and length > 0 and offset + length < 2**63
        if mode in (0, KEEP) and sensible:
            return  # no nonsense to a memfd: it would take all the memory of the machine
        if mode == PUNCH and sensible and (offset % PAGE_SIZE or length % PAGE_SIZE):
            assert self.ours(Fallocate(mode, offset, length)) == errno.EINVAL
            return  # a memfd writes zeroes into the page at the edge
        expected = fallocate(self.fd, mode, offset, length)
        answer = self.ours(Fallocate(mode, offset, length))
        assert answer == expected

    @invariant()
    def sizes_and_blocks_agree(self) -> None:
        stat = os.fstat(self.fd)
        assert self.file.size == stat.st_size
        assert self.file.allocated * PAGE_SIZE == stat.st_blocks * 512
        assert self.budget.used == self.file.allocated
        assert self.file.idle


class Interleaved(RuleBasedStateMachine):
    """Many operations under way at once; steps end in any order, or fail, or are given up."""

    LIMIT = 40

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(self.LIMIT)
        self.file = MemFile(RESIZABLE, self.budget)
        self.memory: set[int] = set()
        self.works: list[Perform] = []
        self.open: set[int] = set()
        self.answered: dict[int, int] = {}
        self.number = 0

    @initialize(pages=st.integers(0, 16))
    def size(self, pages: int) -> None:
        self.submit(Resize(pages * PAGE_SIZE))

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Perform():
                    assert effect.op in self.open or effect.op in self.answered
                    self.works.append(effect)
                case Done(op, code, _):
                    assert isinstance(op, int)
                    self.open.remove(op)  # every operation is answered once
                    self.answered[op] = code
                case Settled():
                    pass

    def submit(self, request: Request) -> None:
        self.number += 1
        self.open.add(self.number)
        self.take(self.file.submit(self.number, request))

    @rule(
        mode=st.sampled_from([0, KEEP, PUNCH, ZERO, ZERO | KEEP]),
        start=st.integers(0, 16),
        count=st.integers(1, 12),
    )
    def fallocate(self, mode: int, start: int, count: int) -> None:
        self.submit(Fallocate(mode, start * PAGE_SIZE, count * PAGE_SIZE))

    @rule(pages=st.integers(0, 16))
    def resize(self, pages: int) -> None:
        self.submit(Resize(pages * PAGE_SIZE))

    @rule(page=st.integers(0, 16))
    def fault(self, page: int) -> None:
        try:
            found = self.file.look(page)
        except Refused:
            return
        if found is Look.HOLE:
            self.submit(FaultIn(page))
        elif found is Look.PRESENT:
            self.granted(page)

    def granted(self, page: int) -> None:
        start, end = self.file.window(page, 0, 64)
        assert start <= page < end
        assert set(range(start, end)) <= self.memory
        for work in self.works:
            frees = work.step is Step.FREE or work.kind not in COMPATIBLE
            assert not (frees and start < work.end and work.start < end), (start, end, work)

    @precondition(lambda self: self.works)
    @rule(data=st.data())
    def perform(self, data: st.DataObject) -> None:
        work = self.works.pop(data.draw(st.integers(0, len(self.works) - 1)))
        pages = set(range(work.start, min(work.end, 64)))
        if work.step is Step.ALLOCATE:
            self.memory |= pages
        elif work.step is Step.FREE:
            assert work.op in self.open, "freed after the answer"
            self.memory -= pages
        self.take(self.file.step_done(work.op))

    @precondition(lambda self: any(w.step is Step.ALLOCATE for w in self.works))
    @rule(data=st.data())
    def run_out_of_memory(self, data: st.DataObject) -> None:
        work = data.draw(st.sampled_from([w for w in self.works if w.step is Step.ALLOCATE]))
        self.works.remove(work)
        upto = data.draw(st.integers(work.start, work.end - 1))
        self.memory |= set(range(work.start, upto))
        self.take(self.file.step_done(work.op, errno.ENOSPC, upto))

    @precondition(lambda self: self.number)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        op = data.draw(st.integers(1, self.number))
        before = self.file.key()
        effects = self.file.cancel(op, errno.EINTR)
        self.take(effects)
        if op in self.answered and not effects:
            assert self.file.key() == before

    @precondition(lambda self: any(w.step is Step.INVALIDATE for w in self.works))
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        work = data.draw(st.sampled_from([w for w in self.works if w.step is Step.INVALIDATE]))
        self.works.remove(work)
        self.take(self.file.abandon(work.op, errno.EIO, "no proof"))

    @rule()
    def copy(self) -> None:
        """A copy takes the place of the original, and nobody notices."""
        key = self.file.key()
        self.budget = self.budget.copy()
        self.file = self.file.copy(self.budget)
        assert self.file.key() == key

    @invariant()
    def what_overlaps_is_compatible(self) -> None:
        active = [(w.start, w.end, w.kind) for w in self.works]
        assert len(active) == len(self.file.operations())
        for i, (start, end, kind) in enumerate(active):
            for first, last, other in active[:i]:
                both = {kind, other} <= COMPATIBLE
                assert both or not (start < last and first < end), (kind, other)

    @invariant()
    def the_budget_covers_the_pages(self) -> None:
        assert self.file.allocated <= self.budget.used <= self.LIMIT
        assert set(self.file.pages) <= self.memory

    @invariant()
    def nothing_is_left_when_idle(self) -> None:
        if self.works:
            return
        assert self.file.idle
        assert not self.open
        assert set(self.file.pages) == self.memory
        assert self.budget.used == self.file.allocated
        assert all(page * PAGE_SIZE < self.file.size for page in self.memory)

    def teardown(self) -> None:
        """Let everything end, and the file with it."""
        while self.works:
            work = self.works.pop(0)
            if work.step is Step.ALLOCATE:
                self.memory |= set(range(work.start, work.end))
            elif work.step is Step.FREE:
                self.memory -= set(range(work.start, min(work.end, 64)))
            self.take(self.file.step_done(work.op))
        self.nothing_is_left_when_idle()


TestAgainstMemfd = AgainstMemfd.TestCase
TestAgainstMemfd.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestInterleaved = Interleaved.TestCase
TestInterleaved.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
