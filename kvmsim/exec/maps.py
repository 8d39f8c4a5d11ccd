# SPDX-License-Identifier: GPL-2.0-or-later
"""The mappings of a process, from the text of /proc/PID/maps (proc_pid_maps(5))."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

#: Mappings that no guest memory lies in, and that are not to be replaced.
_SPECIAL = ("[stack", "[vdso", "[vvar", "[vsyscall", "[uprobes")


@dataclass(frozen=True, slots=True)
class Mapping:
    """Bytes [start, end); ``dev`` (major, minor) and ``ino`` are 0 where there is no file."""

    start: int
    end: int
    permissions: str
    offset: int
    dev: tuple[int, int]
    ino: int
    name: str

    @property
    def shared(self) -> bool:
        """MAP_SHARED."""
        return self.permissions[3] == "s"

    @property
    def writable(self) -> bool:
        """PROT_WRITE."""
        return self.permissions[1] == "w"

    @property
    def protection(self) -> int:
        """PROT_* as mmap(2) takes them."""
        return sum(1 << i for i, letter in enumerate("rwx") if self.permissions[i] == letter)

    @property
    def special(self) -> bool:
        """Whether it is the kernel's, or a stack that grows."""
        return self.name.startswith(_SPECIAL)


def parse(text: str) -> Iterator[Mapping]:
    """Yield the mappings in ascending order."""
    for line in text.splitlines():
        fields = line.split(None, 5)
        start, end = (int(word, 16) for word in fields[0].split("-"))
        major, minor = (int(word, 16) for word in fields[3].split(":"))
        name = fields[5] if len(fields) > 5 else ""
        yield Mapping(
            start, end, fields[1], int(fields[2], 16), (major, minor), int(fields[4]), name
        )


def kept_from_children(smaps: str) -> frozenset[int]:
    """Where the mappings begin that fork(2) leaves out (MADV_DONTFORK), from /proc/PID/smaps."""
    found = set()
    start = 0
    for line in smaps.splitlines():
        word, _, rest = line.partition(" ")
        if word == "VmFlags:":
            if "dc" in rest.split():
                found.add(start)
        elif not word.endswith(":"):
            start = int(word.partition("-")[0], 16)
    return frozenset(found)


def overlapping(text: str, start: int, end: int) -> Iterator[tuple[int, int, Mapping]]:
    """Yield (first, last, mapping) for what there is of [start, end), clipped, ascending."""
    for mapping in parse(text):
        if mapping.start >= end:
            return
        if mapping.end > start:
            yield max(start, mapping.start), min(end, mapping.end), mapping
