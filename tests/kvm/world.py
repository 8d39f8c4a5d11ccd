# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM with a ring-3 agent in it, on the kernel's KVM or on the simulator's: what experiments use.

What an experiment sees it says in words that are the same for both: "0", an errno's name, a
number, or the name of an exit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvmsim import exits
from kvmsim.api import GuestMemfd, Kvm, Memory, Memslot, Simulation, Vm
from kvmsim.api.guest import MAILBOX, Agent, Guest
from kvmsim.uapi import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CAP_GUEST_MEMFD,
    KVM_CAP_GUEST_MEMFD_FLAGS,
    KVM_X86_DEFAULT_VM,
    KVM_X86_SW_PROTECTED_VM,
    PAGE_SIZE,
)
from privfs.testing.conformance.syscalls import Nr, call

RAM = 4 << 20  #: gpa of the memory under test
PAGES = 16
SIZE = PAGES * PAGE_SIZE
SHARED = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
ROOT = Path(__file__).parents[2]


def said(left: exits.Exit | None) -> str:
    """An exit in words."""
    match left:
        case None:
            return "done"
        case exits.MemoryFaultExit(gpa, size, private, number):
            side = "private" if private else "shared"
            code = errno.errorcode.get(number or 0, "0")
            return f"MEMORY_FAULT {side} {gpa - RAM:+#x}+{size:#x} {code}"
        case exits.MmioExit(gpa, length, write):
            return f"MMIO {'write' if write else 'read'} {gpa - RAM:+#x}+{length}"
        case _:
            return type(left).__name__


def name_of(error: OSError) -> str:
    """The name of its errno as the manuals write it."""
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    return name.replace("ENOTSUP", "EOPNOTSUPP")


def answer(what: Callable[[], object]) -> str:
    """What a call answers: 0, or the name of the errno."""
    try:
        what()
    except OSError as error:
        return name_of(error)
    return "0"


@dataclass
class World:
    """One VM of a KVM. ``kind`` is "real" or "simulated"."""

    kind: str
    kvm: Kvm
    vm: Vm = field(init=False)
    agent: Agent = field(init=False)

    def __post_init__(self) -> None:
        simulated = self.kind == "simulated"
        self.vm = self.kvm.create_vm(KVM_X86_SW_PROTECTED_VM if simulated else KVM_X86_DEFAULT_VM)
        self.agent = Agent(Guest(self.kvm, self.vm, slot=99), self.vm.create_vcpu())

    # --- memory -------------------------------------------------------------------------------

    @property
    def shared(self) -> int:
        """The flags of a file that a guest of this VM uses; on a mount it is the guest's alone."""
        return 0 if self.kind == "simulated" else SHARED

    def file(self, pages: int = PAGES, *, mappable_only: bool = False) -> GuestMemfd:
        flags = GUEST_MEMFD_FLAG_MMAP if mappable_only else self.shared
        return self.vm.create_guest_memfd(pages * PAGE_SIZE, flags)

    def slot(
        self, file: GuestMemfd, page: int = 0, pages: int | None = None, at: int = 0,
        memory: Memory | None = None, slot: int | None = None,
    ) -> Memslot:  # fmt: skip
        """File pages [page, page + pages) at guest page ``at`` of RAM, private if that exists."""
        size = None if pages is None else pages * PAGE_SIZE
        made = self.vm.add_slot(
            RAM + at * PAGE_SIZE, memory, size=size, guest_memfd=file, offset=page * PAGE_SIZE,
            slot=slot,
        )  # fmt: skip
        if self.kind == "simulated":
            self.vm.convert(made.gpa, made.size, private=True)
        return made

    # --- the guest ----------------------------------------------------------------------------

    def load(self, page: int) -> str:
        """The word at the beginning of a guest page, or the exit instead."""
        value = self.agent.load(RAM + page * PAGE_SIZE)
        return said(self.agent.exit) if value is None else hex(value)

    def loads(self, *pages: int) -> str:
        return " ".join(self.load(page) for page in pages)

    def store(self, page: int, value: int) -> str:
        self.agent.store(RAM + page * PAGE_SIZE, value)
        return said(self.agent.exit)

    def fill(self, page: int, pages: int, value: int) -> str:
        self.agent.fill(RAM + page * PAGE_SIZE, pages, value)
        return said(self.agent.exit)

    def await_release(self, page: int, old: str) -> None:
        """Wait until a mount has heard of a close(2), which does not wait for it (RELEASE).

        The kernel's own file is gone when close(2) returns.
        """
        deadline = time.monotonic() + 30
        while self.kind == "simulated" and self.load(page) == old:
            assert time.monotonic() < deadline, "the mount has not heard of the close"

    def tell(self, count: int) -> None:
        """Put a number where the guest counts."""
        self.agent.guest.memory.write(MAILBOX, count.to_bytes(8, "little"))

    def told(self, count: int) -> None:
        """Wait until the guest, which runs in another thread, has counted that far."""
        deadline = time.monotonic() + 30
        while int.from_bytes(self.agent.guest.memory.read(MAILBOX, 8), "little") < count:
            assert time.monotonic() < deadline, f"the guest does not count to {count}"
            os.sched_yield()

    # --- other processes ----------------------------------------------------------------------

    def punch_elsewhere(self, file: GuestMemfd, page: int, pages: int) -> str:
        """Have another process, which inherits the descriptor, punch; "0" or the errno's name."""
        fd = file.fileno()
        done = subprocess.run(
            [sys.executable, "-P", "-c", PUNCHER, str(fd), str(page * PAGE_SIZE),
             str(pages * PAGE_SIZE)],
            pass_fds=[fd], capture_output=True, text=True, check=True, timeout=30, cwd=ROOT,
        )  # fmt: skip
        return done.stdout.strip()

    def elsewhere(self, what: Callable[[], object]) -> str:
        """Make a call as a process that did not make the VM would; "0" or the errno's name."""
        transport = self.kvm.transport
        if isinstance(transport, Simulation):
            with transport.as_another_process():
                return answer(what)
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(theirs, answer(what).encode())
            finally:
                os._exit(0)
        os.close(theirs)
        os.waitpid(child, 0)
        with open(ours) as told:
            return told.read()

    def pages(self, file: GuestMemfd) -> int:
        """How many pages a file holds: st_blocks of a mount, cachestat(2) of the kernel's."""
        fd = file.fileno()
        if self.kind == "simulated":
            return os.fstat(fd).st_blocks * 512 // PAGE_SIZE
        span = (ctypes.c_uint64 * 2)(0, file.size)
        found = (ctypes.c_uint64 * 5)()
        call(Nr.CACHESTAT, fd, ctypes.addressof(span), ctypes.addressof(found), 0)
        return int(found[0])


PUNCHER = """
import ctypes, errno, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
fd, offset, size = map(int, sys.argv[1:])
failed = libc.fallocate(fd, 3, offset, size)
print(errno.errorcode[ctypes.get_errno()] if failed else 0)
"""


KINDS = [
    pytest.param("real", marks=pytest.mark.kvm),
    pytest.param("simulated", marks=pytest.mark.fuse),
]
Answers = dict[str, str]
Experiment = Callable[[World], Answers]
Worlds = Callable[[], contextlib.AbstractContextManager[World]]


@contextlib.contextmanager
def real() -> Iterator[World]:
    """The kernel's KVM; skips where it lacks what every experiment needs."""
    with Kvm() as kvm:
        if kvm.check_extension(KVM_CAP_GUEST_MEMFD) != 1:
            pytest.skip("KVM_CAP_GUEST_MEMFD (Linux 6.8, CONFIG_KVM_GUEST_MEMFD)")
        offered = kvm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS)
        if SHARED & ~offered:
            pytest.skip(f"guest_memfd flags {SHARED:#x} (Linux 6.18; offered: {offered:#x})")
        yield World("real", kvm)


@contextlib.contextmanager
def simulated(directory: Path) -> Iterator[World]:
    """The simulator's KVM, with files of the mount that ``directory`` lies on."""
    with Kvm(Simulation(directory)) as kvm:
        yield World("simulated", kvm)
