# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's KVM and the simulator's, made the same calls at random, answer alike at every step.

Slots of both kinds come, go and move; a guest loads and stores; files are punched and allocated;
the host looks at its memory. The simulator's slots with a file are private while they are there,
since only memory that is can come from a mount; that is all that the twins are told apart by.

What lies behind a slot with a file at ``userspace_addr`` is never touched: the kernel's fault
handler fills neighbouring entries of a shadow page table from there (6.18, kvm_prefetch_pages), so
that a guest sees the host's page in place of the file's if it happens to be present.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from kvm.world import RAM, World, answer, real, simulated

from kvmsim.uapi import KVM_MEM_GUEST_MEMFD, KVM_MEM_READONLY, PAGE_SIZE

pytestmark = [pytest.mark.kvm, pytest.mark.fuse]

FILE_PAGES, FILES, SPACE = 16, 2, 16
IDS = st.integers(0, 5)
GUEST_PAGES = st.integers(0, SPACE - 1)
PICKS = st.integers(0, 255)
FILE_PAGE = st.integers(0, FILE_PAGES - 4)
LENGTHS = st.integers(1, 5)
VALUES = st.integers(1, 1 << 32)


class Twin:
    """One of the two: a world, its files, and plain memory as large as the space.

    ``behind`` is what slots with a file have at their ``userspace_addr``.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.files = [world.file(FILE_PAGES) for _ in range(FILES)]
        self.plain = world.kvm.allocate(SPACE * PAGE_SIZE)
        self.behind = world.kvm.allocate((SPACE + FILE_PAGES) * PAGE_SIZE)
        self.private: dict[int, tuple[int, int]] = {}  # slot id: gpa, size

    def set(self, slot: int, at: int, pages: int, flags: int = 0, **file: int) -> str:
        """KVM_SET_USER_MEMORY_REGION2 over plain memory page ``at``, or with a file."""
        gpa, size = RAM + at * PAGE_SIZE, pages * PAGE_SIZE
        address = (self.behind if file else self.plain).address + at * PAGE_SIZE
        return answer(
            lambda: self.world.vm.set_user_memory_region2(slot, gpa, size, address, flags, **file)
        )

    def bind(self, slot: int, at: int, pages: int, file: int, page: int) -> str:
        code = self.set(
            slot, at, pages, KVM_MEM_GUEST_MEMFD, guest_memfd=self.files[file].handle,
            guest_memfd_offset=page * PAGE_SIZE,
        )  # fmt: skip
        if code == "0" and self.world.kind == "simulated":
            self.private[slot] = RAM + at * PAGE_SIZE, pages * PAGE_SIZE
            self.world.vm.convert(*self.private[slot], private=True)
        return code

    def delete(self, slot: int) -> str:
        code = answer(lambda: self.world.vm.set_user_memory_region(slot, 0, 0, 0))
        if code == "0" and slot in self.private:
            self.world.vm.convert(*self.private.pop(slot), private=False)
        return code

    def punch(self, file: int, page: int, pages: int) -> str:
        return answer(lambda: self.files[file].discard(page * PAGE_SIZE, pages * PAGE_SIZE))

    def allocate(self, file: int, page: int, pages: int) -> str:
        return answer(lambda: self.files[file].allocate(page * PAGE_SIZE, pages * PAGE_SIZE))

    def load(self, page: int) -> str:
        return re.sub("private|shared", "", self.world.load(page))

    def store(self, page: int, value: int) -> str:
        return re.sub("private|shared", "", self.world.store(page, value))

    def host(self, page: int, value: int) -> str:
        """Read a word of plain memory, then write it."""
        found = self.plain.read(page * PAGE_SIZE, 8).hex()
        self.plain.write(page * PAGE_SIZE, value.to_bytes(8, "little"))
        return found

    def discard(self, page: int, pages: int) -> str:
        pages = min(pages, SPACE - page)
        return answer(lambda: self.plain.discard(page * PAGE_SIZE, pages * PAGE_SIZE))


class Twins(RuleBasedStateMachine):
    """Both; the test sets ``directory``."""

    directory: Path

    def __init__(self) -> None:
        super().__init__()
        self.contexts = [real(), simulated(self.directory)]
        self.twins = [Twin(context.__enter__()) for context in self.contexts]
        self.slots: dict[int, range] = {}  # what should be there, so that calls meet something

    def teardown(self) -> None:
        for context in reversed(self.contexts):
            context.__exit__(None, None, None)

    def both(self, name: str, *arguments: int) -> str:
        kernel, simulator = (getattr(twin, name)(*arguments) for twin in self.twins)
        assert simulator == kernel, f"{name}{arguments}"
        return str(kernel)

    def page(self, pick: int) -> int:
        """A guest page, mostly one of a slot."""
        covered = [page for pages in self.slots.values() for page in pages]
        return covered[pick % len(covered)] if covered and pick % 5 else pick % SPACE

    def made(self, code: str, slot: int, at: int, pages: int) -> None:
        if code == "0":
            self.slots[slot] = range(at, at + pages)

    @rule(slot=IDS, at=GUEST_PAGES, pages=LENGTHS, file=st.integers(0, FILES - 1), page=FILE_PAGE)
    def bind(self, slot: int, at: int, pages: int, file: int, page: int) -> None:
        self.made(self.both("bind", slot, at, pages, file, page), slot, at, pages)

    @rule(slot=IDS, at=GUEST_PAGES, pages=LENGTHS,
          flags=st.sampled_from([0, KVM_MEM_READONLY]))  # fmt: skip
    def plain(self, slot: int, at: int, pages: int, flags: int) -> None:
        pages = min(pages, SPACE - at)
        self.made(self.both("set", slot, at, pages, flags), slot, at, pages)

    @rule(slot=IDS)
    def delete(self, slot: int) -> None:
        if self.both("delete", slot) == "0":
            del self.slots[slot]

    @rule(file=st.integers(0, FILES - 1), page=FILE_PAGE, pages=LENGTHS)
    def punch(self, file: int, page: int, pages: int) -> None:
        self.both("punch", file, page, pages)

    @rule(file=st.integers(0, FILES - 1), page=FILE_PAGE, pages=LENGTHS)
    def allocate(self, file: int, page: int, pages: int) -> None:
        self.both("allocate", file, page, pages)

    @rule(pick=PICKS, value=VALUES)
    def store(self, pick: int, value: int) -> None:
        self.both("store", self.page(pick), value)
        self.look()

    @rule(page=GUEST_PAGES, value=VALUES)
    def host(self, page: int, value: int) -> None:
        self.both("host", page, value)

    @rule(page=GUEST_PAGES, pages=LENGTHS)
    def discard(self, page: int, pages: int) -> None:
        self.both("discard", page, pages)

    @rule()
    def look(self) -> None:
        """Every page of a slot, as the guest sees it."""
        for page in {page for pages in self.slots.values() for page in pages}:
            self.both("load", page)
        self.both("load", SPACE)


def check(directory: Path, examples: int) -> None:
    class Machine(Twins):
        pass

    Machine.directory = directory
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
        ),
    )  # fmt: skip


def test_twins_answer_alike(directory: Path, kernel_has_flags_3: None) -> None:
    check(directory, 25)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twins_answer_alike_for_long(directory: Path, kernel_has_flags_3: None) -> None:
    check(directory, 200)
