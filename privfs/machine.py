# SPDX-License-Identifier: GPL-2.0-or-later
"""What the machine can give: memory that is available now, less what keeps it alive.

Private memory is never reclaimed, so a mount that takes the last of it calls the OOM killer on
whoever asks next.  :class:`Machine` is asked before pages are promised; it reads ``MemAvailable``
(proc(5)) and the limits of the memory cgroups that this process is in (v1 and v2), since the pages
of a memfd are charged to who allocates them: us.  Swap is not counted.

Units: pages of 4096 bytes, except where a name says bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from privfs.personality import PAGE_SIZE

#: Seconds that a reading is good for; what is promised meanwhile is taken off it.
_FRESH: Final = 0.01
_MIB: Final = 1 << 20

#: Per version of cgroups: limit, usage, and the lines of memory.stat that can be reclaimed.
_FILES: Final = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file")),
    2: ("memory.max", "memory.current",
        ("inactive_file", "active_file", "slab_reclaimable")),
}  # fmt: skip


def headroom_bytes(total: int) -> int:
    """Return how much of ``total`` bytes of memory is left alone: 1/32, 64 MiB to 512 MiB."""
    return min(max(total // 32, 64 * _MIB), 512 * _MIB)


class Machine:
    """The memory of this machine, as far as this process may use it.

    ``promised`` returns the pages that were promised and are not in the readings yet.
    """

    def __init__(
        self,
        promised: Callable[[], int] = lambda: 0,
        *,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._promised = promised
        self._meminfo = os.fspath(root / "proc/meminfo")
        self._groups = [(os.fspath(folder), files) for folder, files in _groups(root)]
        self._clock = clock
        self._read_at = float("-inf")
        self._room = 0

    def total_bytes(self) -> int:
        """Return the memory of the machine, or the lowest limit of a cgroup."""
        return self._reading()[0]

    def available_bytes(self) -> int:
        """Return what can be had now, head-room included."""
        return self._reading()[1]

    def room(self, pages: int) -> int:
        """Return the pages that can be promised now; ``pages`` are, if they are no more."""
        now = self._clock()
        if now - self._read_at > _FRESH or pages > self._room:
            try:
                total, spare = self._reading()
            except OSError:
                pass  # no descriptor is left to ask with: what was known last must do
            else:
                self._room = (spare - headroom_bytes(total)) // PAGE_SIZE - self._promised()
                self._read_at = now
        room = max(self._room, 0)
        if pages <= room:
            self._room -= pages
        return room

    def _reading(self) -> tuple[int, int]:
        """Return the memory that there is and what of it can be had, in bytes."""
        text = _read(self._meminfo)
        total, available = (_field(text, name) * 1024 for name in (b"MemTotal:", b"MemAvailable:"))
        for limit, left in self._limits():
            total, available = min(total, limit), min(available, left)
        return total, available

    def _limits(self) -> list[tuple[int, int]]:
        """Return (limit, what is left of it) in bytes for each cgroup that has one."""
        found = []
        for folder, (limit_file, usage_file, reclaimable) in self._groups:
            try:
                limit = _read(f"{folder}/{limit_file}").strip()
                if limit == b"max" or int(limit) >= 1 << 62:  # v1 writes 2^63 in whole pages
                    continue
                used = int(_read(f"{folder}/{usage_file}"))
                stat = b"\n" + _read(f"{folder}/memory.stat")
            except OSError:
                continue  # a cgroup that we were moved out of
            used -= sum(_field(stat, f"\n{name} ".encode()) for name in reclaimable)
            found.append((int(limit), int(limit) - used))
        return found


def _read(path: str) -> bytes:
    """Return the contents of a file that is read often: three system calls, no file object."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def _field(text: bytes, name: bytes) -> int:
    """Return the number behind ``name``, 0 if it is not there."""
    rest = text.partition(name)[2].split(None, 1)
    return int(rest[0]) if rest else 0


def _groups(root: Path) -> list[tuple[Path, tuple[str, str, tuple[str, ...]]]]:
    """Return the memory cgroups of this process, from its own up to the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            version, top = 1, root / "sys/fs/cgroup/memory"
        elif not controllers:
            version, top = 2, root / "sys/fs/cgroup"
        else:
            continue
        folder = Path(os.path.normpath(top / path.lstrip("/")))
        for place in (folder, *folder.parents):
            if not place.is_relative_to(top):
                break  # a path outside our cgroup namespace begins with ..
            if (place / _FILES[version][0]).exists():
                found.append((place, _FILES[version]))
    return found
