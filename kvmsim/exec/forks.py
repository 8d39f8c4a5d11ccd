# SPDX-License-Identifier: GPL-2.0-or-later
"""fork(2) of a process whose private memory was made shared: the child gets a copy of its own.

The kernel would copy on write; it cannot for shared memory. So the call is made again under our
eyes, and before the child runs, what it has of ours is replaced by private anonymous memory with
the same contents. The thread that forks waits meanwhile, the others and the guests go on, as
they do while the kernel copies page tables (dup_mmap() of kernel/fork.c).
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
from collections.abc import Iterator, Sequence
from typing import Final, Self

from hwemu import processmemory
from kvmsim.dataruns import data_runs
from kvmsim.exec.filter import OURS
from kvmsim.exec.slotmemory import Placed
from kvmsim.exec.tracees import Tracees

log = logging.getLogger(__name__)

_SYS_MMAP, _SYS_MPROTECT, _SYS_MUNMAP = 9, 10, 11
_MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 2, 0x10, 0x20, 0x4000
_READ_WRITE: Final = 3
_CHUNK: Final = 1 << 20


class Fork:
    """A fork by thread ``caller`` of the process ``pid``, call ``nr``, which waits for its answer.

    In this order: :meth:`seize`; let the caller leave its call, with an error; :meth:`again`, and
    :meth:`separate` if there is a child. With the end of the context both go on. OSError.
    """

    def __init__(self, pid: int, caller: int, nr: int) -> None:
        self._caller = caller
        self._nr = nr
        self._parent = Tracees(pid)
        self._child = Tracees(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.let_go()
        self._parent.let_go()

    def seize(self) -> None:
        """Let the caller stop as soon as it leaves its call."""
        self._parent.seize(self._caller)

    def again(self) -> int:
        """Have the caller, which has left its call, make it again; the child's pid, or 0."""
        self._parent.wait(self._caller)
        try:
            pid = self._parent.fork(self._caller, self._nr, OURS)
        except OSError:  # it was killed
            self._parent.let_strays_go()
            raise
        if pid:
            self._child = Tracees(pid)
            self._child.adopt(pid)
        return pid

    def separate(self, placed: Sequence[Placed]) -> None:
        """Replace what the child has of ours by copies; by nothing where that cannot be."""
        try:
            needed = sum(last - first for one in placed for first, last in _runs(one))
            if needed > _available():
                raise OSError(errno.ENOMEM, f"there are no {needed >> 20} MiB for a copy")
            for one in placed:
                self._copy(one)
        except OSError as error:
            log.warning(
                "process %d, forked by %d, finds nothing where there was memory under slots: %s",
                self._child.pid, self._parent.pid, error.strerror,
            )  # fmt: skip
            for one in placed:
                self._make("munmap", _SYS_MUNMAP, one.start, one.end - one.start)

    def _copy(self, one: Placed) -> None:
        length = one.end - one.start
        flags = _MAP_PRIVATE | _MAP_FIXED | _MAP_ANONYMOUS | _MAP_NORESERVE
        self._make("mmap", _SYS_MMAP, one.start, length, _READ_WRITE, flags, (1 << 64) - 1, 0)
        for first, last in _runs(one):
            with mmap.mmap(one.fd, last - first, offset=first) as ours:
                source = (ctypes.c_char * (last - first)).from_buffer(ours)
                base = ctypes.addressof(source)
                for at in range(0, last - first, _CHUNK):
                    place = one.start + first - one.offset + at
                    size = min(_CHUNK, last - first - at)
                    processmemory.write(self._child.pid, place, base + at, size)
                del source
        if one.protection != _READ_WRITE:
            self._make("mprotect", _SYS_MPROTECT, one.start, length, one.protection)

    def _make(self, name: str, nr: int, start: int, *arguments: int) -> None:
        what = f"{name} of {start:#x}"
        self._child.made(what, self._child.pid, nr, start, *arguments)


def _runs(one: Placed) -> Iterator[tuple[int, int]]:
    """The parts [first, last) of what is placed that hold something; offsets in the file."""
    return data_runs(one.fd, one.offset, one.offset + one.end - one.start)


def _available() -> int:
    """Bytes that this machine can give away: MemAvailable of /proc/meminfo."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    raise AssertionError("no MemAvailable in /proc/meminfo")
