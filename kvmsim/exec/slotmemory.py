# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of a process as its slots have it: what is shared of it, and what became of that.

KVM hears of changes from an mmu_notifier. Here the mappings are compared with what was handed
out, whenever there is reason to.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import get_ident

from kvmsim.device.caller import HostPiece
from kvmsim.exec import maps
from kvmsim.exec.mapevents import MapEvents
from kvmsim.exec.remap import Replacement, new_memory
from kvmsim.exec.syscalls import pidfd_getfd
from kvmsim.fallocate import punch
from kvmsim.uapi import PAGE_SIZE

log = logging.getLogger(__name__)

Key = tuple[tuple[int, int], int]
"""Device (major, minor) and inode of what is mapped."""


@dataclass(frozen=True, slots=True)
class _Handed:
    """Bytes [start, end) were handed out as ``offset``… of ``key``."""

    start: int
    end: int
    key: Key
    offset: int
    writable: bool

    def there(self, mapping: maps.Mapping) -> bool:
        """Whether a mapping that overlaps shows the same, and may be accessed as before."""
        return (
            mapping.shared
            and (mapping.dev, mapping.ino) == self.key
            and mapping.offset - mapping.start == self.offset - self.start
            and bool(mapping.protection)
            and (mapping.writable or not self.writable)
        )


@dataclass(frozen=True, slots=True)
class Placed:
    """Bytes [start, end) of a process are ``fd``, ours, from ``offset``."""

    start: int
    end: int
    fd: int
    offset: int
    protection: int


class SlotMemory:
    """Memory of the process ``pid``.

    Between :meth:`begin` and :meth:`done` private memory that a slot asks for is put on the plan;
    else it cannot be shared. ``events`` tells of changes at once, where there is one.
    """

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.events: MapEvents | None = None
        self._pidfd = pidfd
        self._plan: list[Replacement] | None = None
        self._planner = 0  #: the thread of ours that has the plan
        self._lock = threading.Lock()  # over all below
        self._lent: defaultdict[int, list[int]] = defaultdict(list)  #: by thread of ours
        self._ours: dict[Key, Replacement] = {}
        self._where: list[tuple[int, int, int, int]] = []  #: start, end, fd, offset of what is ours
        self._handed: list[_Handed] = []
        self._fresh: list[_Handed] = []
        self._text = ""
        self._kept: frozenset[int] | None = None  #: mappings with MADV_DONTFORK, of one plan
        self._wanted: list[int] = []  #: addresses of private memory that a guest has met

    # --- what a slot gets ---------------------------------------------------------------------

    def begin(self) -> None:
        """An ioctl begins that may make a slot."""
        self._planner, self._plan = get_ident(), []
        self._kept = None
        self._fresh.clear()

    def end(self) -> list[Replacement]:
        """It is over: what must be replaced now; then :meth:`done`."""
        plan, self._plan = self._plan, None
        self.returned()
        return plan or []

    def done(self, replaced: Sequence[Replacement] = (), *, failed: bool) -> bool:
        """These are replaced, and the ioctl succeeds unless it ``failed``.

        Return whether there is memory under slots that was not there before.
        """
        with self._lock:
            fresh = bool(self._fresh) and not failed
            for one in replaced:
                self._ours[_key(one.fd)] = one
                self._where.append((one.start, one.start + one.length, one.fd, 0))
            if fresh:
                self._handed += self._fresh
            self._fresh.clear()
            return fresh

    def host_range(self, start: int, size: int) -> Sequence[HostPiece]:
        """See :class:`~kvmsim.device.caller.Caller`."""
        plan = self._plan if get_ident() == self._planner else None
        if plan is None:  # the device's own thread asks: it has mapped what it got before
            self.returned()
        pieces = []
        with self._lock:
            handed = self._handed if plan is None else self._fresh
            for first, last, mapping in maps.overlapping(self._read(), start, start + size):
                found = self._share(first, last, mapping, plan)
                if found is not None:
                    fd, offset = found
                    key = (mapping.dev, mapping.ino) if mapping.shared else _key(fd)
                    pieces.append(HostPiece(first, last - first, fd, offset, mapping.writable))
                    handed.append(_Handed(first, last, key, offset, mapping.writable))
        return pieces

    @property
    def wanting(self) -> bool:
        """Whether a guest has met private memory that is not shared; then :meth:`wanted`."""
        return bool(self._wanted)

    def wanted(self, slots: Iterable[tuple[int, int]]) -> list[Replacement]:
        """What must be replaced of bytes [start, end) of slots in which it did; OSError."""
        with self._lock:
            addresses, self._wanted = self._wanted, []
            self._kept = None
            text = self._read()
            plan: list[Replacement] = []
            covered = 0
            for start, end in sorted(slots):
                if not any(start <= one < end for one in addresses):
                    continue
                for first, last, mapping in maps.overlapping(text, max(start, covered), end):
                    if not mapping.shared and _usable(mapping):
                        plan.append(self._replacement(first, last, mapping))
                covered = max(covered, end)
            return plan

    def returned(self) -> None:
        """What this thread of ours was lent is closed."""
        for fd in self._lent.pop(get_ident(), ()):
            os.close(fd)

    def lend(self, fd: int) -> None:
        """Close a descriptor of ours when the ioctl is over."""
        self._lent[get_ident()].append(fd)

    def _share(
        self, first: int, last: int, mapping: maps.Mapping, plan: list[Replacement] | None
    ) -> tuple[int, int] | None:
        if not _usable(mapping):
            return None
        if mapping.shared:
            old = self._ours.get((mapping.dev, mapping.ino))
            fd = self._open(mapping) if old is None else old.fd
            if fd is None:
                log.warning("[%#x, %#x): %s cannot be shared", first, last, mapping.name)
                return None
            if old is None:
                self.lend(fd)
            return fd, mapping.offset + first - mapping.start
        if plan is None:
            self._wanted.append(first)
            return None
        start, end = (mapping.start, mapping.end) if self._continues(mapping) else (first, last)
        plan.append(self._replacement(start, end, mapping))
        return plan[-1].fd, first - start

    def _replacement(self, start: int, end: int, mapping: maps.Mapping) -> Replacement:
        if self._kept is None:
            with open(f"/proc/{self.pid}/smaps") as file:
                self._kept = maps.kept_from_children(file.read())
        fd = new_memory(end - start)
        inherited = mapping.start not in self._kept
        return Replacement(
            start, end - start, fd, mapping.protection, mapping.ino == 0, inherited
        )  # fmt: skip

    def _continues(self, mapping: maps.Mapping) -> bool:
        """Whether it is what was left of a mapping when a slot took part of it.

        More slots are to come then: all of it is taken, since each step stops the process.
        """
        return any(mapping.start == end or start == mapping.end for start, end, *_ in self._where)

    def _open(self, mapping: maps.Mapping) -> int | None:
        """A descriptor of what is mapped: root has map_files, others what the process has open."""
        flags = (os.O_RDWR if mapping.writable else os.O_RDONLY) | os.O_CLOEXEC
        name = f"/proc/{self.pid}/map_files/{mapping.start:x}-{mapping.end:x}"
        with contextlib.suppress(OSError):
            return os.open(name, flags)
        for number in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(OSError):
                status = os.stat(f"/proc/{self.pid}/fd/{number}")
                if status.st_ino == mapping.ino and _device(status.st_dev) == mapping.dev:
                    return pidfd_getfd(self._pidfd, int(number))
        return None

    # --- what becomes of it -------------------------------------------------------------------

    def changed(self) -> list[tuple[int, int]]:
        """What was handed out and is there no more as it was, [start, end) ascending.

        It is forgotten here; memory of ours that is mapped nowhere any more is given back.
        """
        with self._lock:
            if not self._handed and not self._ours:
                return []
            try:
                text = self._read()
            except OSError:  # the process is gone, its VMs go with it
                return []
            if text == self._text:
                return []
            self._text = text
            found = list(maps.parse(text))
            self._find_ours(found)
            gone: list[tuple[int, int]] = []
            kept: list[_Handed] = []
            for one in sorted(self._handed, key=lambda handed: handed.start):
                at = one.start
                for first, last in _still(one, found):
                    if at < first:
                        gone.append((at, first))
                    delta = first - one.start
                    kept.append(replace(one, start=first, end=last, offset=one.offset + delta))
                    at = last
                if at < one.end:
                    gone.append((at, one.end))
            self._handed = kept
            return gone

    @property
    def replaced(self) -> bool:
        """Whether memory was replaced by ours."""
        return bool(self._ours)

    def inherited(self, child: int) -> list[Placed]:
        """What a process that was just forked has of ours."""
        with self._lock, open(f"/proc/{child}/maps") as file:
            return [
                Placed(
                    mapping.start, mapping.end, self._ours[key].fd, mapping.offset,
                    mapping.protection,
                )
                for mapping in maps.parse(file.read())
                if mapping.shared and (key := (mapping.dev, mapping.ino)) in self._ours
            ]  # fmt: skip

    def _find_ours(self, found: Sequence[maps.Mapping]) -> None:
        """See where the program has our memory now."""
        self._where = [
            (mapping.start, mapping.end, self._ours[key].fd, mapping.offset)
            for mapping in found
            if mapping.shared and (key := (mapping.dev, mapping.ino)) in self._ours
        ]
        used = {fd for _, _, fd, _ in self._where}
        for key, old in list(self._ours.items()):
            if old.fd not in used:
                os.close(old.fd)
                del self._ours[key]

    def discard(self, start: int, length: int) -> None:
        """madvise(MADV_DONTNEED) of [start, start + length) begins: what is ours becomes zeros.

        Private memory of a file would show the file again, which cannot be had: it stays.
        """
        if start % PAGE_SIZE:
            return  # the kernel refuses it
        end = start + -(-length // PAGE_SIZE) * PAGE_SIZE
        with self._lock:
            files = {old.fd for old in self._ours.values() if not old.anonymous}
            for first, last, fd, offset in self._where:
                lower, upper = max(start, first), min(end, last)
                if lower >= upper:
                    continue
                if fd in files:
                    log.warning(
                        "process %d: MADV_DONTNEED of [%#x, %#x), private memory of a file under "
                        "a slot: it keeps what is there", self.pid, lower, upper,
                    )  # fmt: skip
                else:
                    punch(fd, offset + lower - first, upper - lower)

    def close(self) -> None:
        """The process is gone."""
        for lent in self._lent.values():
            for fd in lent:
                os.close(fd)
        if self.events is not None:
            self.events.close()
        for old in self._ours.values():
            os.close(old.fd)
        self._ours.clear()

    def _read(self) -> str:
        with open(f"/proc/{self.pid}/maps") as file:
            return file.read()


def _still(one: _Handed, found: Sequence[maps.Mapping]) -> Iterator[tuple[int, int]]:
    """Yield the parts of what was handed out that are as they were."""
    at = max(bisect_right(found, one.start, key=lambda mapping: mapping.start) - 1, 0)
    while at < len(found) and found[at].start < one.end:
        first, last = max(one.start, found[at].start), min(one.end, found[at].end)
        if first < last and one.there(found[at]):
            yield first, last
        at += 1


def _usable(mapping: maps.Mapping) -> bool:
    return not mapping.special and bool(mapping.protection)


def _key(fd: int) -> Key:
    status = os.fstat(fd)
    return _device(status.st_dev), status.st_ino


def _device(dev: int) -> tuple[int, int]:
    return os.major(dev), os.minor(dev)
