# SPDX-License-Identifier: GPL-2.0-or-later
"""The model of guest_memfd against the kernel's own, call by call, over many files of one VM.

What a guest_memfd holds is not in its st_blocks, which stays 0, but in its page cache:
kvm_gmem_allocate() fills that and kvm_gmem_punch_hole() empties it (virt/kvm/guest_memfd.c).
cachestat(2) counts it; mincore(2) would not, since the pages are not up to date before a fault.
"""

from __future__ import annotations

import ctypes
import errno
import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from privfs.budget import Budget
from privfs.memfile import MemFile
from privfs.operation import Done, Effect, Fallocate, Perform, Request, Resize
from privfs.personality import GUEST_MEMFD, PAGE_SIZE, Refused, metadata_rule
from privfs.testing.conformance import GuestMemfd
from privfs.testing.conformance.syscalls import Nr, call

pytestmark = pytest.mark.kvm

KEEP, PUNCH = 1, 3
EDGES = [0, 1 << 30, 1 << 44, (1 << 63) - 4 * PAGE_SIZE, (1 << 63) - 1, -PAGE_SIZE, -1]
OFFSETS = st.one_of(
    st.integers(0, 40).map(lambda page: page * PAGE_SIZE),
    st.integers(0, 40).map(lambda page: page * PAGE_SIZE),
    st.integers(-2, 40 * PAGE_SIZE),
    st.sampled_from(EDGES),
)
LENGTHS = st.one_of(
    st.integers(1, 24).map(lambda count: count * PAGE_SIZE),
    st.integers(1, 24).map(lambda count: count * PAGE_SIZE),
    st.integers(-1, 8 * PAGE_SIZE),
    st.sampled_from([0, 1 << 44, (1 << 63) - PAGE_SIZE, (1 << 63) - 1]),
)
MODES = st.one_of(
    st.sampled_from([KEEP, KEEP, PUNCH, PUNCH, 0]),
    st.sampled_from([2, 4, 5, 8, 0x10, 0x11, 0x20, 0x40, 0x41, 0x80, 0x81, 0x100, 7, -1]),
)


class GuestMemfdVsModel(RuleBasedStateMachine):
    """One file on both sides; the test sets ``maker`` and ``counts``."""

    maker: GuestMemfd
    counts: bool  #: whether there is cachestat(2), since Linux 6.5

    def __init__(self) -> None:
        super().__init__()
        self.fd = -1
        self.model = MemFile(GUEST_MEMFD, Budget(1 << 20))

    @initialize(pages=st.integers(1, 40))
    def begin(self, pages: int) -> None:
        self.fd = self.maker.create(pages * PAGE_SIZE)
        assert self.ask(Resize(pages * PAGE_SIZE)) == 0

    def teardown(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def ask(self, request: Request) -> int:
        """Perform a request on the model; return the errno."""
        effects: list[Effect] = self.model.submit("op", request)
        while any(isinstance(effect, Perform) for effect in effects):
            effects = self.model.step_done("op")
        (done,) = [effect for effect in effects if isinstance(effect, Done)]
        return done.errno

    @rule(mode=MODES, offset=OFFSETS, length=LENGTHS)
    def fallocate(self, mode: int, offset: int, length: int) -> None:
        expected = self.ask(Fallocate(mode, offset, length))
        assert code(Nr.FALLOCATE, self.fd, mode, offset, length) == expected

    @rule(size=OFFSETS)
    def truncate(self, size: int) -> None:
        expected = self.ask(Resize(size))
        assert code(Nr.FTRUNCATE, self.fd, size) == expected

    @rule()
    def read_and_write(self) -> None:
        byte = ctypes.create_string_buffer(1)
        assert code(Nr.READ, self.fd, ctypes.addressof(byte), 1) == GUEST_MEMFD.read_errno
        assert code(Nr.WRITE, self.fd, ctypes.addressof(byte), 1) == GUEST_MEMFD.write_errno

    @rule(offset=OFFSETS, whence=st.sampled_from([os.SEEK_DATA, os.SEEK_HOLE]))
    def seek(self, offset: int, whence: int) -> None:
        assert code(Nr.LSEEK, self.fd, offset, whence) == metadata("lseek")

    @rule()
    def change_metadata(self) -> None:
        assert code(Nr.FCHMOD, self.fd, 0o600) == metadata("chmod")
        assert code(Nr.FCHOWN, self.fd, 0, 0) == metadata("chown")
        assert code(Nr.FSYNC, self.fd) == metadata("fsync")

    @invariant()
    def both_agree(self) -> None:
        if self.fd < 0:
            return
        found = os.fstat(self.fd)
        assert found.st_size == self.model.size
        if self.counts:
            pages = found.st_size // PAGE_SIZE
            assert cached(self.fd, 0, pages) == self.model.allocated
            there = [page for page in range(pages) if cached(self.fd, page, 1)]
            assert there == list(self.model.pages)


def cached(fd: int, start: int, count: int) -> int:
    """Return how many of some pages are in the page cache."""
    span = (ctypes.c_uint64 * 2)(start * PAGE_SIZE, count * PAGE_SIZE)
    found = (ctypes.c_uint64 * 5)()
    call(Nr.CACHESTAT, fd, ctypes.addressof(span), ctypes.addressof(found), 0)
    return int(found[0])


def code(number: Nr, *arguments: int) -> int:
    """Make a system call; return the errno, 0 if it worked."""
    try:
        call(number, *arguments)
    except OSError as error:
        return error.errno or -1
    return 0


def metadata(operation: str) -> int:
    try:
        metadata_rule(GUEST_MEMFD, operation)
    except Refused as refused:
        return refused.errno
    return 0


def check(flags: int, examples: int) -> None:
    vm = GuestMemfd(flags)
    try:
        if missing := vm.why_not():
            pytest.skip(missing)

        class Machine(GuestMemfdVsModel):
            maker = vm
            counts = code(Nr.CACHESTAT, -1, 0, 0, 0) != errno.ENOSYS

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=examples, stateful_step_count=50, deadline=None,
                suppress_health_check=list(HealthCheck), phases=[Phase.generate],
            ),
        )  # fmt: skip
    finally:
        vm.close()


@pytest.mark.parametrize("flags", [0, 1, 3])
def test_guest_memfd_answers_as_its_model(flags: int) -> None:
    check(flags, 60)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [0, 1, 3])
def test_guest_memfd_answers_as_its_model_for_long(flags: int) -> None:
    check(flags, 400)
