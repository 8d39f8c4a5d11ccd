# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of private files: one memfd for each extent.

An extent's memfd is created at its first allocation, with the size of the whole extent (sparse),
sealed F_SEAL_GROW and F_SEAL_SEAL, belongs to one range of one file for all its life, and dies by
ftruncate(0). Because of F_SEAL_GROW (memfd_create(2), fcntl(2)) nobody, not even a user that holds
a descriptor of it, can make the dead memfd hold memory again: every old mapping answers SIGBUS.
F_SEAL_SEAL keeps users from adding F_SEAL_SHRINK or F_SEAL_WRITE, which would make our own
ftruncate(0) or hole punch fail with EPERM (shmem_setattr, shmem_fallocate in mm/shmem.c).

This is a shell: it holds no rule about when memory may be given back. Punch, kill and destroy are
called only after every user has proven that it cannot reach the range. Calls for one file come
one at a time (the file's own queue sees to that); calls for different files may come from
different threads.

Units: file pages of 4096 bytes, ranges half-open ``[start, end)``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from privfs.extents import PAGE_SIZE, extent_range, split

BLOCK_SIZE = 512  # the unit of st_blocks, stat(2)
FD_HEADROOM = 256  # descriptors left to sockets, pidfds, worker threads and the mount

_FALLOC_FL_KEEP_SIZE = 1  # linux/falloc.h
_FALLOC_FL_PUNCH_HOLE = 2
_MFD_NOEXEC_SEAL = 8  # linux/memfd.h, Linux 6.3; vm.memfd_noexec=2 refuses a memfd without it
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_ADVICE = {
    errno.EMFILE: "raise the limit on open files (ulimit -n, LimitNOFILE=)",
    errno.ENFILE: "raise the system's limit on open files (fs.file-max)",
    errno.ENOMEM: "free memory, or raise the memory limit of the daemon's cgroup",
    errno.ENOSPC: "free memory, or allow more overcommit (vm.overcommit_memory)",
}

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int


class BackingError(Exception):
    """Memory could not be had, or an extent that does not exist was named.

    errno is ENOSPC when memory or descriptors ran out, ENOENT for an unknown extent, otherwise
    what the kernel said. Of an allocation [start, end), the pages [start, completed) are
    allocated; nothing beyond them was changed.
    """

    def __init__(
        self, code: int, operation: str, ino: int, pages: tuple[int, int], completed: int, why: str
    ) -> None:
        super().__init__(
            f"{operation}: file {ino}, pages [{pages[0]:#x}, {pages[1]:#x}): "
            f"{errno.errorcode.get(code, code)}: {why}"
        )
        self.errno = code
        self.operation = operation
        self.ino = ino
        self.start, self.end = pages
        self.completed = completed


@dataclass(frozen=True, slots=True)
class Extent:
    """One extent that is alive: file pages [start, end) of a file, in the memfd *fd*.

    The page ``start`` is at offset 0 of the memfd. The generation is never used twice in the life
    of a Backing, so it tells an extent from its successor in the same place.
    """

    ino: int
    index: int
    start: int
    end: int
    fd: int
    generation: int


@dataclass(frozen=True, slots=True)
class Finding:
    """What an audit found: ``reallocated`` or ``held``, and where (file pages)."""

    name: str
    ino: int
    start: int
    end: int
    detail: str


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of a Backing: files and extents alive, all extents ever, limit, bytes held."""

    files: int
    extents: int
    extents_created: int
    extent_limit: int
    bytes_held: int


def _call_fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2), again after EINTR; raise OSError. os.fallocate does not exist."""
    while _fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _create_memfd(name: str, pages: int) -> int:
    """Return a new sealed memfd of *pages* pages, all holes. Raises OSError."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create(name, flags)
    try:
        os.ftruncate(fd, pages * PAGE_SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Backing:
    """All extents of all files of one mount.

    extent_limit is the number of memfds that may be alive at a time; without it, the soft
    RLIMIT_NOFILE of now, less FD_HEADROOM.
    """

    def __init__(self, extent_limit: int | None = None) -> None:
        if extent_limit is None:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            extent_limit = max(0, soft - FD_HEADROOM)
        self._extent_limit = extent_limit
        self._files: dict[int, dict[int, Extent]] = {}
        self._alive = 0
        self._created = 0
        self._lock = threading.Lock()  # guards the four above; no file work is done under it

    # ---- memory comes

    def allocate(self, ino: int, start: int, end: int) -> None:
        """Allocate the file pages [start, end); pages already there keep their contents.

        Raises BackingError: ENOSPC when memory or descriptors ran out. A fallocate that fails
        undoes itself within its extent (shmem_fallocate), so [start, error.completed) is allocated
        then, and beyond it what was allocated before.
        """
        for index, first, last in split(start, end):
            try:
                extent = self._files.get(ino, {}).get(index) or self._create(ino, index)
                offset = (first - extent.start) * PAGE_SIZE
                _call_fallocate(extent.fd, 0, offset, (last - first) * PAGE_SIZE)
            except OSError as error:
                code = error.errno or errno.EIO
                why = _ADVICE.get(code, os.strerror(code))
                raise BackingError(
                    errno.ENOSPC if code in _ADVICE else code,
                    "allocate",
                    ino,
                    (start, end),
                    first,
                    f"extent {index}: {os.strerror(code)}; {why}",
                ) from error

    def _create(self, ino: int, index: int) -> Extent:
        """Create extent *index* of a file. Raises OSError; EMFILE at the limit of this Backing."""
        with self._lock:
            if self._alive >= self._extent_limit:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self._alive += 1
            self._created += 1
            generation = self._created
        start, end = extent_range(index)
        try:
            fd = _create_memfd(f"privfs:{ino}:{index}:{generation}", end - start)
        except BaseException:
            with self._lock:
                self._alive -= 1
            raise
        extent = Extent(ino, index, start, end, fd, generation)
        with self._lock:
            self._files.setdefault(ino, {})[index] = extent
        return extent

    # ---- memory goes

    def punch(self, ino: int, start: int, end: int) -> None:
        """Give back the file pages [start, end).

        Pages in extents that do not exist are holes already. Every mapping of the range loses its
        pages; a later touch through such a mapping would allocate, which audit() finds. Raises
        OSError only if the kernel fails, which a memfd under our seals gives no cause for.
        """
        for index, first, last in split(start, end):
            extent = self._files.get(ino, {}).get(index)
            if extent is None:
                continue
            mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
            offset = (first - extent.start) * PAGE_SIZE
            _call_fallocate(extent.fd, mode, offset, (last - first) * PAGE_SIZE)

    def kill(self, ino: int, index: int) -> None:
        """End one extent: its memory is freed and can never come back. Unknown: nothing to do."""
        with self._lock:
            extents = self._files.get(ino, {})
            extent = extents.pop(index, None)
            if extent is None:
                return
            if not extents:
                del self._files[ino]
        try:
            os.ftruncate(extent.fd, 0)
        finally:
            os.close(extent.fd)
            with self._lock:
                self._alive -= 1

    def destroy(self, ino: int) -> None:
        """End all extents of a file. A file without extents: nothing to do."""
        for extent in self.extents(ino):
            self.kill(ino, extent.index)

    def close(self) -> None:
        """End all extents of all files."""
        for ino in list(self._files):
            self.destroy(ino)

    # ---- what is there

    def extents(self, ino: int) -> list[Extent]:
        """Return the extents of a file that are alive, in ascending order."""
        with self._lock:
            return sorted(self._files.get(ino, {}).values(), key=lambda extent: extent.index)

    def extent(self, ino: int, index: int) -> Extent:
        """Return one extent. Raises BackingError (ENOENT) if it is not alive."""
        extent = self._files.get(ino, {}).get(index)
        if extent is None:
            raise BackingError(
                errno.ENOENT,
                "extent",
                ino,
                extent_range(index),
                0,
                f"extent {index} is not alive; allocate a page of it first",
            )
        return extent

    def fd(self, ino: int, index: int) -> int:
        """Return the memfd of one extent; it stays ours to close. Raises like extent()."""
        return self.extent(ino, index).fd

    def blocks(self, ino: int) -> int:
        """Return the memory that a file holds, in blocks of 512 bytes (sum of st_blocks)."""
        return sum(os.fstat(extent.fd).st_blocks for extent in self.extents(ino))

    def resident(self, ino: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of touched file pages, ascending, each as long as can be.

        By SEEK_DATA and SEEK_HOLE (lseek(2)). A page that was allocated but never touched counts
        as a hole there (mapping_seek_hole_data skips folios that are not uptodate, mm/filemap.c);
        allocated a second time, it counts as touched (SGP_FALLOC clears it, shmem_get_folio_gfp).
        """
        run: tuple[int, int] | None = None
        for extent in self.extents(ino):
            offset = 0
            while True:
                try:
                    offset = os.lseek(extent.fd, offset, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    break
                first = extent.start + offset // PAGE_SIZE
                offset = os.lseek(extent.fd, offset, os.SEEK_HOLE)
                last = extent.start + offset // PAGE_SIZE
                if run is not None and run[1] == first:
                    run = run[0], last
                    continue
                if run is not None:
                    yield run
                run = first, last
        if run is not None:
            yield run

    def audit(
        self, ino: int, allocated_pages: int, contains: Callable[[int, int], bool]
    ) -> list[Finding]:
        """Compare the memory with the page bitmap of its file; an empty list means they agree.

        contains(start, end) says whether every page of the range is in the bitmap. Findings:
        ``reallocated``: touched pages that the bitmap does not have (a user touched memory after
        it had acknowledged its loss), from the first such page of a run to the run's end;
        ``held``: st_blocks does not add up to allocated_pages, which also sees pages that lie
        allocated and untouched. To be called while no operation on the file is under way.
        """
        findings = []
        for start, end in self.resident(ino):
            if not contains(start, end):
                low, high = start, end  # contains(start, low) holds, contains(start, high) does not
                while high - low > 1:
                    middle = (low + high) // 2
                    if contains(start, middle):
                        low = middle
                    else:
                        high = middle
                detail = f"pages are in memory from {low:#x} on that the bitmap does not have"
                findings.append(Finding("reallocated", ino, low, end, detail))
        held = self.blocks(ino) * BLOCK_SIZE
        if held != allocated_pages * PAGE_SIZE:
            extents = self.extents(ino)
            start, end = (extents[0].start, extents[-1].end) if extents else (0, 0)
            detail = f"{held} bytes are held, the bitmap counts {allocated_pages * PAGE_SIZE}"
            findings.append(Finding("held", ino, start, end, detail))
        return findings

    def statistics(self) -> Statistics:
        """Count what is alive."""
        with self._lock:
            inos = list(self._files)
            alive, created = self._alive, self._created
        held = sum(self.blocks(ino) for ino in inos) * BLOCK_SIZE
        return Statistics(len(inos), alive, created, self._extent_limit, held)
