# SPDX-License-Identifier: GPL-2.0-or-later
"""System calls on a mount and the same requests to the model: errno, size, blocks, data and holes.

Between the two lie the kernel's own checks, passthrough, the FUSE protocol, the adapter, the owner
and the memory; none of them may make a difference.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mounts import Mounted, Mounter

from privfs.budget import Budget
from privfs.memfile import MemFile
from privfs.operation import Destroy, Done, Effect, Fallocate, Perform, Request, Resize
from privfs.personality import MAX_BYTES, PAGE_SIZE, PERSONALITIES, Personality

pytestmark = [pytest.mark.fuse, pytest.mark.root]

BUDGET = 64  # pages
FILES = 3
FREED_SECONDS = 10

#: Where extents begin, where files end, where numbers do.
EDGES = [0, 64 << 20, 4 << 30, MAX_BYTES - PAGE_SIZE, MAX_BYTES, (1 << 63) - 4 * PAGE_SIZE]
OFFSETS = st.one_of(
    st.integers(0, 40).map(lambda page: page * PAGE_SIZE),
    st.integers(0, 40).map(lambda page: page * PAGE_SIZE),
    st.integers(-2, 40 * PAGE_SIZE),
    st.tuples(st.sampled_from(EDGES), st.integers(-2, 2)).map(lambda at: at[0] + at[1] * PAGE_SIZE),
    st.sampled_from([(1 << 63) - 1, (1 << 63) - PAGE_SIZE, MAX_BYTES + 1, -1]),
)
LENGTHS = st.one_of(
    st.integers(1, 24).map(lambda count: count * PAGE_SIZE),
    st.integers(1, 24).map(lambda count: count * PAGE_SIZE),
    st.integers(-1, 8 * PAGE_SIZE),
    st.sampled_from([0, MAX_BYTES, (1 << 63) - 1, (1 << 63) - PAGE_SIZE]),
)
KEEP, PUNCH, ZERO = 1, 3, 16
MODES = st.one_of(
    st.sampled_from([0, KEEP, PUNCH, PUNCH, ZERO, ZERO | KEEP]),
    st.sampled_from([2, 4, 8, 0x20, 0x40, 0x41, 0x80, 0x81, 0x100, 7, 0x12, -1]),
)
INDEX = st.integers(0, FILES - 1)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, offset, length):
        raise OSError(ctypes.get_errno(), "fallocate")


def code(call: Callable[[], object]) -> int:
    """Return the errno of a system call, 0 if it worked."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


@dataclass(slots=True)
class Pair:
    """One file on both sides."""

    path: Path
    fd: int
    model: MemFile

    def ask(self, request: Request) -> int:
        """Perform a request on the model; return the errno."""
        effects: list[Effect] = self.model.submit("op", request)
        while any(isinstance(effect, Perform) for effect in effects):
            effects = self.model.step_done("op")
        (done,) = [effect for effect in effects if isinstance(effect, Done)]
        return done.errno

    def seek(self, offset: int, *, data: bool) -> int:
        """Return where SEEK_DATA or SEEK_HOLE leads on the model; -errno where it fails."""
        size, pages = self.model.size, set(self.model.pages)
        if self.model.personality.metadata["lseek"]:
            return -self.model.personality.metadata["lseek"]
        if not 0 <= offset < size:
            return -errno.ENXIO
        page = offset // PAGE_SIZE
        if data:
            found = min((p for p in pages if p >= page), default=size // PAGE_SIZE) * PAGE_SIZE
            return max(found, offset) if found < size else -errno.ENXIO
        while page in pages:
            page += 1
        return min(max(page * PAGE_SIZE, offset), size)


class MountVsModel(RuleBasedStateMachine):
    """Files of one mount; ``mounted``, ``who`` and ``unseekable`` are set by the test.

    ``unseekable`` is the errno of pread and pwrite on files that have no position, 0 if they do.
    """

    mounted: Mounted
    who: Personality
    unseekable = 0
    made = 0

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(BUDGET)
        self.pairs: list[Pair] = []

    @initialize()
    def begin(self) -> None:
        self.pairs = [self.create() for _ in range(FILES)]

    def create(self) -> Pair:
        type(self).made += 1
        path = self.mounted.path / f"file{self.made}"
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        return Pair(path, fd, MemFile(self.who, self.budget))

    def destroy(self, pair: Pair) -> None:
        """Unlink and close; RELEASE and FORGET follow in their own time."""
        os.unlink(pair.path)
        self.agree(pair)  # it lives as long as it is open
        os.close(pair.fd)
        assert pair.ask(Destroy()) == 0
        until = time.monotonic() + FREED_SECONDS
        while os.statvfs(self.mounted.path).f_bfree != BUDGET - self.budget.used:
            assert time.monotonic() < until, "the pages of a deleted file are not given back"

    def teardown(self) -> None:
        self.mounted.audit()
        for pair in self.pairs:
            self.destroy(pair)

    # --- calls --------------------------------------------------------------------------------

    @rule(index=INDEX, mode=MODES, offset=OFFSETS, length=LENGTHS)
    def fallocate(self, index: int, mode: int, offset: int, length: int) -> None:
        pair = self.pairs[index]
        expected = pair.ask(Fallocate(mode, offset, length))
        assert code(lambda: fallocate(pair.fd, mode, offset, length)) == expected

    @rule(index=INDEX, size=OFFSETS)
    def truncate(self, index: int, size: int) -> None:
        pair = self.pairs[index]
        expected = pair.ask(Resize(size))
        assert code(lambda: os.ftruncate(pair.fd, size)) == expected

    @precondition(lambda self: self.who.name != "resizable")
    @rule(index=INDEX, pages=st.integers(1, 30))
    def give_it_a_size(self, index: int, pages: int) -> None:
        self.truncate(index, pages * PAGE_SIZE)

    @rule(index=INDEX)
    def open_and_truncate(self, index: int) -> None:
        pair = self.pairs[index]
        expected = pair.ask(Resize(0)) if pair.model.size else 0
        found = code(lambda: os.close(os.open(pair.path, os.O_RDWR | os.O_TRUNC)))
        assert found == expected

    @rule(index=INDEX, offset=OFFSETS, data=st.booleans())
    def seek(self, index: int, offset: int, data: bool) -> None:
        pair = self.pairs[index]
        try:
            found = os.lseek(pair.fd, offset, os.SEEK_DATA if data else os.SEEK_HOLE)
        except OSError as error:
            found = -(error.errno or 0)
        assert found == pair.seek(offset, data=data)

    @rule(index=INDEX, page=st.integers(0, 40))
    def read_and_write(self, index: int, page: int) -> None:
        pair, offset = self.pairs[index], page * PAGE_SIZE
        ends = self.who.eof_reads_empty and offset >= pair.model.size
        reads = self.unseekable or (0 if ends else self.who.read_errno)
        assert code(lambda: os.pread(pair.fd, 1, offset)) == reads
        writes = self.unseekable or self.who.write_errno
        assert code(lambda: os.pwrite(pair.fd, b"x", offset)) == writes

    @rule(index=INDEX)
    def change_metadata(self, index: int) -> None:
        fd, answers = self.pairs[index].fd, self.who.metadata
        assert code(lambda: os.fchmod(fd, 0o600)) == answers["chmod"]
        assert code(lambda: os.fchown(fd, 0, 0)) == answers["chown"]
        assert code(lambda: os.utime(fd)) == answers["utimens"]
        assert code(lambda: os.fsync(fd)) == answers["fsync"]

    @rule(index=INDEX)
    def replace(self, index: int) -> None:
        self.destroy(self.pairs[index])
        self.pairs[index] = self.create()

    # --- the same? ----------------------------------------------------------------------------

    @invariant()
    def both_agree(self) -> None:
        for pair in self.pairs:
            self.agree(pair)
        assert os.statvfs(self.mounted.path).f_bfree == BUDGET - self.budget.used

    def agree(self, pair: Pair) -> None:
        found = os.fstat(pair.fd)
        assert found.st_size == pair.model.size
        assert found.st_blocks == pair.model.allocated * (PAGE_SIZE // 512)
        if pair.model.personality.metadata["lseek"]:
            return
        for offset in (0, pair.model.size // 2, pair.model.size - 1):
            for data, whence in ((True, os.SEEK_DATA), (False, os.SEEK_HOLE)):
                try:
                    there = os.lseek(pair.fd, offset, whence)
                except OSError as error:
                    there = -(error.errno or 0)
                assert there == pair.seek(offset, data=data), (offset, whence)


def check(mount: Mounter, personality: str, examples: int, *options: str) -> None:
    made = mount(f"size={BUDGET * PAGE_SIZE}", f"personality={personality}", *options)

    class Machine(MountVsModel):
        mounted = made
        who = PERSONALITIES[personality]
        unseekable = who.metadata["lseek"] if made.facts["mode"] == "direct_io" else 0

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # making a failure smaller would outlast the test's time
        ),
    )  # fmt: skip
    made.audit()


@pytest.mark.parametrize("personality", PERSONALITIES)
def test_calls_on_a_mount_answer_as_the_model(mount: Mounter, personality: str) -> None:
    check(mount, personality, 30)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("direct_io",)], ids=["passthrough", "direct_io"])
@pytest.mark.parametrize("personality", PERSONALITIES)
def test_many_calls_answer_as_the_model(
    mount: Mounter, personality: str, options: tuple[str, ...]
) -> None:
    check(mount, personality, 60, *options)
