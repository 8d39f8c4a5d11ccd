# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be sealed: memfds of the kernel, private files of a mount; asked with the same words.

Who stores and loads differs.  In a memfd it is the process, by write(2) and by mappings; private
files refuse it that, and it is a guest whose memory the file is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import pytest
from selftests.guest import players
from selftests.machine import PUNCH, code, fallocate, try_mmap

from kvmsim import exits
from kvmsim.api import Kvm, Simulation
from kvmsim.uapi import (
    KVM_MEM_GUEST_MEMFD,
    KVM_X86_SW_PROTECTED_VM,
    PAGE_SIZE,
)
from privfs import control
from privfs.seals import Seal

SEAL, SHRINK, GROW, WRITE, FUTURE_WRITE, EXEC = 1, 2, 4, 8, 16, 32
AUTO_ALLOCATE: Final = 0x20  #: of v7, whose number F_SEAL_EXEC got
SIZE: Final = 8 * PAGE_SIZE
GPA: Final = 64 << 20
MFD_CLOEXEC, MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL, MFD_EXEC = 1, 2, 8, 16
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


class Sealable(Protocol):
    """A file of SIZE bytes, and what can be done to it; answers are "0" or an errno's name."""

    fd: int

    def seals(self) -> int: ...
    def add(self, seals: int) -> str: ...
    def load(self, page: int) -> str: ...
    def store(self, page: int) -> str: ...
    def storing(self) -> contextlib.AbstractContextManager[Any]:
        """Someone who may store."""
        ...

    def again(self, fd: int) -> Sealable:
        """The same by another descriptor."""
        ...


def resize(file: Sealable, size: int) -> str:
    return code(lambda: os.ftruncate(file.fd, size))


def punch(file: Sealable, page: int, pages: int = 1) -> str:
    return fallocate(file.fd, PUNCH, page * PAGE_SIZE, pages * PAGE_SIZE)


class Memfd:
    """A memfd."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def seals(self) -> int:
        """F_GET_SEALS."""
        return fcntl.fcntl(self.fd, F_GET_SEALS)

    def add(self, seals: int) -> str:
        """F_ADD_SEALS."""
        return code(lambda: fcntl.fcntl(self.fd, F_ADD_SEALS, seals))

    def load(self, page: int) -> str:
        """read(2), and mappings that can only be read."""
        assert try_mmap(self.fd, SIZE, mmap.PROT_READ, mmap.MAP_PRIVATE) == "0"
        return code(lambda: os.pread(self.fd, 8, page * PAGE_SIZE))

    def store(self, page: int) -> str:
        """write(2), which answers as a writable shared mapping must."""
        found = code(lambda: os.pwrite(self.fd, b"x", page * PAGE_SIZE))
        assert try_mmap(self.fd, SIZE, READ_WRITE, mmap.MAP_SHARED) == found
        return found

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """A mapping that may be written."""
        with mmap.mmap(self.fd, SIZE):
            yield

    def again(self, fd: int) -> Memfd:
        """By another descriptor."""
        return Memfd(fd)


class Private:
    """A private file."""

    def __init__(self, directory: Path, fd: int) -> None:
        self.fd = fd
        self._directory = directory

    def _ask(self, question: str, **more: int) -> dict[str, Any]:
        return control.ask(self._directory, question, ino=os.fstat(self.fd).st_ino, **more)

    def seals(self) -> int:
        """What ``privfs seal FILE`` shows."""
        return sum(int(Seal[name]) for name in self._ask("stat")["seals"])

    def add(self, seals: int) -> str:
        """``privfs seal``."""
        return code(lambda: self._ask("seal", seals=seals))

    def load(self, page: int) -> str:
        """A guest's load; the process itself is refused."""
        assert code(lambda: os.pread(self.fd, 8, 0)) in ("EINVAL", "EPERM", "ESPIPE")
        return self._touch(page, write=False)

    def store(self, page: int) -> str:
        """A guest's store; the process itself is refused."""
        assert code(lambda: os.pwrite(self.fd, b"x", 0)) in ("EINVAL", "EPERM", "ESPIPE")
        return self._touch(page, write=True)

    def _touch(self, page: int, *, write: bool) -> str:
        with self.storing() as player:
            script = player.script()
            gpa = GPA + page * PAGE_SIZE
            script.mark(gpa, PAGE_SIZE, 7) if write else script.either(gpa, PAGE_SIZE, 7)
            left = player.play(script)
        if left is None:
            return "0"
        assert isinstance(left, exits.MemoryFaultExit), left
        assert (left.gpa, left.size) == (gpa, PAGE_SIZE)
        return errno.errorcode[left.errno or 0]

    @contextlib.contextmanager
    def storing(self) -> Iterator[Any]:
        """A guest whose memory it is."""
        with Kvm(Simulation(self._directory)) as kvm, kvm.create_vm(KVM_X86_SW_PROTECTED_VM) as vm:
            (player,) = players(kvm, vm, ring=0)
            vm.set_user_memory_region2(1, GPA, SIZE, 0, KVM_MEM_GUEST_MEMFD, guest_memfd=self.fd)
            vm.convert(GPA, SIZE, private=True)
            yield player

    def again(self, fd: int) -> Private:
        """By another descriptor."""
        return Private(self._directory, fd)


# --- targets ------------------------------------------------------------------------------------


@dataclass
class Target:
    """Makes files of one kind."""

    name: str
    make: Callable[[], contextlib.AbstractContextManager[Sealable]]
    all_seals: int
    sealed: bool = False  #: F_SEAL_SEAL from birth
    directory: Path | None = None

    @property
    def private(self) -> bool:
        """Whether files are private."""
        return self.directory is not None

    def need(self, seals: int) -> None:
        """Skip where a seal is none, or none can be added."""
        if self.sealed:
            answer = "EINVAL" if seals & ~self.all_seals else "EPERM"
            with self.make() as file:
                assert (file.seals(), file.add(seals), file.seals()) == (SEAL, answer, SEAL)
            pytest.skip("F_SEAL_SEAL from birth: no seal can be added (EPERM)")
        if seals & ~self.all_seals:
            with self.make() as file:
                assert (file.add(seals), file.seals()) == ("EINVAL", 0)
            pytest.skip("a private file has no such seal (EINVAL)")

    def need_memfd(self, what: str) -> None:
        """Skip what only a memfd has."""
        if self.private:
            pytest.skip(what)


@contextlib.contextmanager
def memfd() -> Iterator[Sealable]:
    fd = os.memfd_create("selftest", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_EXEC)
    try:
        os.ftruncate(fd, SIZE)
        yield Memfd(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def private(directory: Path) -> Iterator[Sealable]:
    path = directory / "sealed"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, SIZE)
        yield Private(directory, fd)
    finally:
        path.unlink()
        os.close(fd)


def target(name: str, directory: Path | None) -> Target:
    """A target by its name; ``directory`` lies on the mount of a private one."""
    if directory is None:
        return Target(name, memfd, SEAL | SHRINK | GROW | WRITE | FUTURE_WRITE | EXEC)
    every = SEAL | SHRINK | GROW | WRITE | AUTO_ALLOCATE
    return Target(name, lambda: private(directory), every, name == "v7", directory)
