# SPDX-License-Identifier: GPL-2.0-or-later
"""Who keeps a mount busy, read from /proc as fuser(1) does, without one request into any mount."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from privfs.fuse.ground import Mount, mounts

_MNT_ID: Final = re.compile(r"^mnt_id:\s*(\d+)$", re.M)


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that uses a mount."""

    pid: int
    name: str
    how: str  #: ``open file``, ``directory``, ``root`` or ``mapping``

    def __str__(self) -> str:
        return f"{self.name} ({self.pid}, {self.how})"


def of(mount: Mount) -> list[Holder]:
    """Return the processes that hold ``mount``; those that we may not look into are left out.

    Non-dumpable processes and, without root, those of others cannot be looked into (ptrace(2)).
    """
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            process = Path("/proc", entry)
            with contextlib.suppress(OSError):
                how = next(_uses(process, mount), None)
                if how is not None:
                    name = (process / "comm").read_text().strip()
                    found.append(Holder(int(entry), name, how))
    return found


def mounts_in(mount: Mount) -> list[str]:
    """Return the mounts that lie in ``mount``, as texts."""
    below = mount.place.rstrip("/") + "/"
    return [f"a mount on {other.place}" for other in mounts() if other.place.startswith(below)]


def _uses(process: Path, mount: Mount) -> Iterator[str]:
    for name, how in (("cwd", "directory"), ("root", "root")):
        with contextlib.suppress(OSError):
            if _mount_of_link(process / name) == mount.id:
                yield how
    with contextlib.suppress(OSError):
        for info in (process / "fdinfo").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if _mount_id(info.read_text()) == mount.id:
                    yield "open file"
    device = f"{os.major(mount.dev):02x}:{os.minor(mount.dev):02x}"  # proc_pid_maps(5)
    with contextlib.suppress(OSError):
        lines = (process / "maps").read_bytes().splitlines()
        if any(line.split(None, 4)[3] == device.encode() for line in lines):
            yield "mapping"


def _mount_of_link(link: Path) -> int:
    """Return the mount that a link of /proc leads into; O_PATH asks it nothing."""
    fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
    try:
        return _mount_id(Path(f"/proc/self/fdinfo/{fd}").read_text())
    finally:
        os.close(fd)


def _mount_id(info: str) -> int:
    found = _MNT_ID.search(info)
    return int(found[1]) if found else -1
