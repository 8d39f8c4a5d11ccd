# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine for a selftest: the kernel's KVM or the simulator's, and what either lacks by name."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from selftests.guest import Player, players

from kvmsim.api import GuestMemfd, Kvm, Memory, Simulation, Vm
from kvmsim.uapi import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CAP_EXIT_HYPERCALL,
    KVM_CAP_GUEST_MEMFD,
    KVM_CAP_GUEST_MEMFD_FLAGS,
    KVM_CAP_PRE_FAULT_MEMORY,
    KVM_CAP_VM_TYPES,
    KVM_HC_MAP_GPA_RANGE,
    KVM_X86_DEFAULT_VM,
    KVM_X86_SW_PROTECTED_VM,
    PAGE_SIZE,
)
from privfs import control

MAPPABLE: Final = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
KEEP, PUNCH = 1, 3
NO_MAPPING: Final = "the mount has no FUSE passthrough (root, Linux 6.9)"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def code(what: Callable[[], object]) -> str:
    """What a call answers: 0, or the name of the errno."""
    try:
        what()
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        return name.replace("ENOTSUP", "EOPNOTSUPP")
    return "0"


def fallocate(fd: int, mode: int, offset: int, size: int) -> str:
    """fallocate(2): "0" or the errno's name."""
    if not _libc.fallocate(fd, mode, offset, size):
        return "0"
    return errno.errorcode[ctypes.get_errno()].replace("ENOTSUP", "EOPNOTSUPP")


def try_mmap(fd: int, size: int, prot: int, flags: int) -> str:
    """mmap(2) and munmap(2): "0" or the errno's name."""
    at = _libc.mmap(None, size, prot, flags, fd, 0)
    if at == ctypes.c_void_p(-1).value:
        return errno.errorcode[ctypes.get_errno()].replace("ENOTSUP", "EOPNOTSUPP")
    _libc.munmap(at, size)
    return "0"


@dataclass
class Machine:
    """One KVM. ``target`` is "real" or "simulated"."""

    target: str
    kvm: Kvm
    directory: Path | None = None

    @property
    def simulated(self) -> bool:
        """Whether it is the simulator's."""
        return self.target == "simulated"

    @property
    def ring(self) -> int:
        """Where guests run: a KVM without a second stage emulates ring 0."""
        return 0 if self.simulated else 3

    # --- what it may lack ---------------------------------------------------------------------

    def need_guest_memfd(self, flags: int = 0) -> None:
        """Skip without guest_memfd, or without these of its flags."""
        if self.kvm.check_extension(KVM_CAP_GUEST_MEMFD) != 1:
            pytest.skip("KVM_CAP_GUEST_MEMFD (Linux 6.8, CONFIG_KVM_GUEST_MEMFD)")
        offered = self.kvm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS)
        if flags & ~offered:
            missing = NO_MAPPING if self.simulated else f"offered are {offered:#x}"
            pytest.skip(f"guest_memfd flags {flags:#x}: {missing}")

    def need_private_memory(self) -> None:
        """Skip where no VM has private memory."""
        if not self.kvm.check_extension(KVM_CAP_VM_TYPES) >> KVM_X86_SW_PROTECTED_VM & 1:
            pytest.skip("KVM_X86_SW_PROTECTED_VM (CONFIG_KVM_SW_PROTECTED_VM)")

    def need_pre_fault(self) -> None:
        """Skip without KVM_PRE_FAULT_MEMORY."""
        if not self.kvm.check_extension(KVM_CAP_PRE_FAULT_MEMORY):
            pytest.skip("KVM_CAP_PRE_FAULT_MEMORY (a KVM with a second stage)")

    # --- VMs ----------------------------------------------------------------------------------

    def vm(self, *, private: bool = False) -> Vm:
        """A VM; ``private``: one whose memory can be, or a skip."""
        if private:
            self.need_private_memory()
        vm = self.kvm.create_vm(KVM_X86_SW_PROTECTED_VM if private else KVM_X86_DEFAULT_VM)
        if private:
            vm.enable_cap(KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
        return vm

    def players(self, vm: Vm, count: int = 1) -> list[Player]:
        """VCPUs with scripts."""
        ring = 0 if vm.type == KVM_X86_SW_PROTECTED_VM else self.ring
        return players(self.kvm, vm, count, ring=ring)

    def pages(self, file: GuestMemfd) -> set[int]:
        """The pages that a file of the mount holds."""
        assert self.directory is not None
        ino = os.fstat(file.fileno()).st_ino
        found: set[int] = set()
        start: int | None = 0
        while start is not None:
            answer = control.ask(self.directory, "map", ino=ino, start=start)
            for row in answer["rows"]:
                if row["state"] != "hole":
                    found |= set(range(row["start"] // PAGE_SIZE, row["end"] // PAGE_SIZE))
            start = answer["next"]
        return found

    def close(self, file: GuestMemfd) -> None:
        """Close the last descriptor of a file of the mount, and wait until the mount knows.

        FUSE's RELEASE comes behind close(2), where the kernel's is done when it returns.
        """
        assert self.directory is not None
        ino = os.fstat(file.fileno()).st_ino
        file.close()
        deadline = time.monotonic() + 30
        while code(lambda: control.ask(self.directory or "", "stat", ino=ino)) != "ENOENT":
            assert time.monotonic() < deadline, "the mount does not release the file"


class Background:
    """A thread whose exception is not lost."""

    def __init__(self, what: Callable[[], Any]) -> None:
        self.outcome: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(what,))
        self._thread.start()

    def _run(self, what: Callable[[], Any]) -> None:
        try:
            self.outcome = what()
        except BaseException as error:
            self._error = error

    @property
    def alive(self) -> bool:
        """Whether it is still at it."""
        return self._thread.is_alive()

    def end(self, timeout: float = 60) -> Any:
        """Wait for the end; raise what it raised."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "a thread does not end"
        if self._error is not None:
            raise self._error
        return self.outcome


def shared_runs(memory: Memory) -> Iterator[tuple[int, int]]:
    """The byte ranges of a simulated machine's shared memory that are there."""
    fd = memory._range.fd  # type: ignore[attr-defined]
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


@contextlib.contextmanager
def real() -> Iterator[Machine]:
    """The kernel's."""
    with Kvm() as kvm:
        yield Machine("real", kvm)


@contextlib.contextmanager
def simulated(directory: Path) -> Iterator[Machine]:
    """The simulator's, with files of the mount that ``directory`` lies on."""
    with Kvm(Simulation(directory)) as kvm:
        yield Machine("simulated", kvm, directory)
