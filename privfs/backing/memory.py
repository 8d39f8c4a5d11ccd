# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of private files: one memfd for each extent.

An extent's memfd comes from the mount's store at its first allocation, with the size of the whole
extent (sparse), sealed F_SEAL_GROW and F_SEAL_SEAL, belongs to one range of one file for all its
life, and dies by ftruncate(0). Because of F_SEAL_GROW (memfd_create(2), fcntl(2)) nobody, not even
a user that holds a descriptor of it, can make the dead memfd hold memory again: every old mapping
answers SIGBUS. (Where extents come and go whole, they die by the last close, and have no seals.)
F_SEAL_SEAL keeps users from adding F_SEAL_SHRINK or F_SEAL_WRITE, which would make our own
ftruncate(0) or hole punch fail with EPERM (shmem_setattr, shmem_fallocate in mm/shmem.c).

This is a shell: it holds no rule about when memory may be given back. Punch, kill and destroy are
called only after every user has proven that it cannot reach the range. Calls for one file come
one at a time (the file's own queue sees to that); calls for different files may come from
different threads.

Units: file pages of 4096 bytes, ranges half-open ``[start, end)``.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Hashable, Iterator

from privfs.backing.shmem import Shmem
from privfs.backing.store import Store
from privfs.backing.values import BackingError, Extent, Finding, Statistics
from privfs.extents import PAGE_SIZE, SINGLE, Layout, chunks

BLOCK_SIZE = 512  # the unit of st_blocks, stat(2)
FD_HEADROOM = 256  # descriptors left to sockets, pidfds, worker threads and the mount

ADVICE = {
    errno.EMFILE: "raise the limit on open files (ulimit -n, LimitNOFILE=)",
    errno.ENFILE: "raise the system's limit on open files (fs.file-max)",
}


class Backing:
    """All extents of all files of one mount.

    extent_limit is the number of memfds that may be alive at a time; without it, the soft
    RLIMIT_NOFILE of now, less FD_HEADROOM. ``store`` is the kind of memory, shmem by default:
    ranges to allocate or punch must be multiples of its page size (ValueError).
    """

    def __init__(self, extent_limit: int | None = None, store: Store | None = None) -> None:
        if extent_limit is None:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            extent_limit = soft - min(FD_HEADROOM, soft // 2)
        self.store: Store = store if store is not None else Shmem()
        self._extent_limit = extent_limit
        self._files: dict[int, dict[int, Extent]] = {}
        self._whole: set[int] = set()
        self._alive = 0
        self._created = 0
        self._claims: dict[Hashable, frozenset[tuple[int, int]]] = {}
        self._copies: dict[tuple[int, int], Extent] = {}  # not found by anybody yet
        self._lock = threading.Lock()  # guards the six above; no file work is done under it

    def layout(self, ino: int) -> Layout:
        """How the pages of a file are cut into extents."""
        return SINGLE if ino in self._whole else self.store.layout

    # ---- memory comes

    def create_whole(self, ino: int, pages: int) -> int:
        """Create the one extent of a file of ``pages`` pages that is mapped by offset.

        Return its memfd, which ends where the file does and stays ours to close.  OSError.
        """
        self._whole.add(ino)
        try:
            return self._create(ino, 0, pages).fd
        except BaseException:
            self._whole.discard(ino)
            raise

    def claim(self, name: Hashable, ino: int, start: int, end: int) -> None:
        """Set descriptors aside for the extents that an allocation of [start, end) will create.

        Until :meth:`unclaim` of the same name. Raises BackingError (ENOSPC) and sets nothing aside
        where there are too few, so that what cannot be finished is not begun.
        """
        with self._lock:
            alive = self._files.get(ino, {})
            indexes = (i for i, _, _ in self.layout(ino).split(start, end))
            wanted = frozenset((ino, i) for i in indexes if i not in alive)
            if not wanted:
                return
            claimed = {
                (one, index)
                for claim in self._claims.values()
                for one, index in claim
                if index not in self._files.get(one, {})
            }
            if self._alive + len(claimed | wanted) > self._extent_limit:
                raise BackingError(
                    errno.ENOSPC, "allocate", ino, (start, end), start,
                    f"{len(wanted)} descriptors wanted, {self._alive} of {self._extent_limit} "
                    f"are in use: delete or truncate files, or {ADVICE[errno.EMFILE]}",
                )  # fmt: skip
            self._claims[name] = wanted

    def unclaim(self, name: Hashable) -> None:
        """Give back what :meth:`claim` set aside and was not used."""
        with self._lock:
            self._claims.pop(name, None)

    def allocate(self, ino: int, start: int, end: int) -> None:
        """Allocate the file pages [start, end); pages already there keep their contents.

        Raises BackingError: ENOSPC when memory or descriptors ran out. What fails is undone as
        far as the store undoes it, so [start, error.completed) is allocated then, and beyond it
        what was allocated before.
        """
        self._require_whole("allocate", ino, start, end)
        advice = {**ADVICE, **self.store.advice}
        for index, low, high in self.layout(ino).split(start, end):
            first = low
            try:
                extent = self._files.get(ino, {}).get(index) or self._create(ino, index)
                for first, last in chunks(low, high, self.store.undoes // PAGE_SIZE):
                    offset = (first - extent.start) * PAGE_SIZE
                    self.store.allocate(extent.fd, offset, (last - first) * PAGE_SIZE)
            except OSError as error:
                code = error.errno or errno.EIO
                why = advice.get(code, "see the errors before it")
                raise BackingError(
                    errno.ENOSPC if code in advice else code,
                    "allocate",
                    ino,
                    (start, end),
                    first,
                    f"extent {index}: {os.strerror(code)}; {why}",
                ) from error

    def _require_whole(self, operation: str, ino: int, start: int, end: int) -> None:
        """Raise ValueError for a part of a page: a store would round it, or only zero it."""
        unit = self.store.page_size // PAGE_SIZE
        if start % unit or end % unit:
            raise ValueError(
                f"{operation}: file {ino}, pages [{start:#x}, {end:#x}): {self.store.name} pages "
                f"have {self.store.page_size} bytes"
            )

    def _create(self, ino: int, index: int, pages: int = 0) -> Extent:
        """Create extent *index* of a file, with a memfd of ``pages`` if that is less than it has.

        Raises OSError; EMFILE at the limit of this Backing.
        """
        with self._lock:
            if self._alive >= self._extent_limit:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self._alive += 1
            self._created += 1
            generation = self._created
        start, end = self.layout(ino).extent_range(index)
        try:
            name = f"privfs:{ino}:{index}:{generation}"
            fd = self.store.create(name, (pages or end - start) * PAGE_SIZE)
        except BaseException:
            with self._lock:
                self._alive -= 1
            raise
        extent = Extent(ino, index, start, end, fd, generation)
        with self._lock:
            self._files.setdefault(ino, {})[index] = extent
        return extent

    # ---- memory moves

    def begin_copy(self, ino: int, index: int) -> tuple[Extent, Extent]:
        """Return an extent and an empty new one in the same place, which nobody else finds yet.

        :meth:`swap` or :meth:`drop_copy` ends it.  Raises OSError: EMFILE where all descriptors are
        in use or set aside.
        """
        old = self.extent(ino, index)
        with self._lock:
            claimed = sum(
                index not in self._files.get(one, {})
                for claim in self._claims.values()
                for one, index in claim
            )
            if self._alive + claimed >= self._extent_limit:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self._alive += 1
            self._created += 1
            generation = self._created
        try:
            size = (old.end - old.start) * PAGE_SIZE
            fd = self.store.create(f"privfs:{ino}:{index}:{generation}", size)
        except BaseException:
            with self._lock:
                self._alive -= 1
            raise
        new = Extent(ino, index, old.start, old.end, fd, generation)
        self._copies[ino, index] = new
        return old, new

    def drop_copy(self, ino: int, index: int) -> None:
        """End what :meth:`begin_copy` made; the old extent stays as it is.  None: nothing to do."""
        copy = self._copies.pop((ino, index), None)
        if copy is not None:
            self._end(copy)

    def swap(self, ino: int, index: int) -> None:
        """Let the copy of an extent be found in its place, and end the old one.

        One that was not copied only ends.
        """
        copy = self._copies.pop((ino, index), None)
        if copy is None:
            self.kill(ino, index)
            return
        with self._lock:
            old = self._files[ino][index]
            self._files[ino][index] = copy
        self._end(old)

    # ---- memory goes

    def punch(self, ino: int, start: int, end: int) -> None:
        """Give back the file pages [start, end).

        Pages in extents that do not exist are holes already. Every mapping of the range loses its
        pages; a later touch through such a mapping would allocate, which audit() finds. Raises
        OSError only if the kernel fails, which a memfd under our seals gives no cause for.
        Where extents come and go whole, those of the range end.
        """
        self._require_whole("punch", ino, start, end)
        for extent in self._overlapping(ino, start, end):
            if self.layout(ino).whole:
                self.kill(ino, extent.index)
                continue
            first, last = max(start, extent.start), min(end, extent.end)
            offset = (first - extent.start) * PAGE_SIZE
            self.store.punch(extent.fd, offset, (last - first) * PAGE_SIZE)

    def _overlapping(self, ino: int, start: int, end: int) -> list[Extent]:
        """Return the extents of a file that are alive and have pages of [start, end)."""
        layout = self.layout(ino)
        with self._lock:
            alive = self._files.get(ino, {})
            if start == end or not alive:
                return []
            reach = range(layout.extent_of(start), layout.extent_of(end - 1) + 1)
            fewer = reach if len(reach) < len(alive) else sorted(alive)
            return [alive[index] for index in fewer if index in reach and index in alive]

    def kill(self, ino: int, index: int) -> None:
        """End one extent: its memory is freed and can never come back. Unknown: nothing to do."""
        with self._lock:
            extents = self._files.get(ino, {})
            extent = extents.pop(index, None)
            if extent is None:
                return
            if not extents:
                del self._files[ino]
                self._whole.discard(ino)
        self._end(extent)

    def _end(self, extent: Extent) -> None:
        try:
            self.store.end(extent.fd)
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
        for ino, index in list(self._copies):
            self.drop_copy(ino, index)
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
                self.layout(ino).extent_range(index),
                0,
                f"extent {index} is not alive; allocate a page of it first",
            )
        return extent

    def fd(self, ino: int, index: int) -> int:
        """Return the memfd of one extent; it stays ours to close. Raises like extent()."""
        return self.extent(ino, index).fd

    def blocks(self, ino: int) -> int:
        """Return the memory that a file holds, in blocks of 512 bytes (sum of st_blocks)."""
        with self._lock:  # kill() takes an extent out before it closes it: ours are open
            extents = self._files.get(ino, {}).values()
            return sum(self.store.held(extent.fd) for extent in extents) // BLOCK_SIZE

    def resident(self, ino: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of touched file pages, ascending, each as long as can be.

        What "touched" means, and whether it can be known, is the store's (:meth:`Store.touched`).
        """
        run: tuple[int, int] | None = None
        for extent in self.extents(ino):
            for low, high in self.store.touched(extent.fd):
                first, last = extent.start + low // PAGE_SIZE, extent.start + high // PAGE_SIZE
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
        allocated and untouched, and on a store that does not locate it is all that is found. To be
        called while no operation on the file is under way.
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

    @property
    def alive(self) -> int:
        """How many extents are alive."""
        with self._lock:
            return self._alive

    def statistics(self) -> Statistics:
        """Count what is alive."""
        with self._lock:
            inos = list(self._files)
            alive, created = self._alive, self._created
        held = sum(self.blocks(ino) for ino in inos) * BLOCK_SIZE
        return Statistics(len(inos), alive, created, self._extent_limit, held)
