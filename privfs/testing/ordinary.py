# SPDX-License-Identifier: GPL-2.0-or-later
"""An ordinary user, for the time of one command: what root needs to see what others see.

The command runs in a mount namespace of its own, in which /dev/fuse may be opened by all, with a
uid that no account has, without groups and capabilities.  Nothing of it is seen outside.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Final

#: Who it is; the rooms of the tests know the same user.
UID: Final = 60_001

_SETUP: Final = r"""
set -eu
place=$1; shift
mount -t tmpfs -o mode=755,nosuid none "$place/dev"  # place itself may be nodev
mknod "$place/dev/fuse" c 10 229
chmod 666 "$place/dev/fuse"
mount --bind "$place/dev/fuse" /dev/fuse
while [ "$1" != -- ]; do
    mount --"$1" "$2" "$3"
    shift 3
done
shift
exec setpriv "$@"
"""


def command(place: Path, wanted: Iterable[Path], *arguments: str | os.PathLike[str]) -> list[str]:
    """Return a command line of root's that runs ``arguments`` as :data:`UID`.

    ``place`` is an empty directory, for what the namespace needs and for the user's temporary
    files; whoever made it removes it after the command.  ``wanted`` are directories that the user
    must be able to read, whatever lies above them.
    """
    place.chmod(0o755)
    (place / "dev").mkdir()
    (place / "tmp").mkdir()
    (place / "tmp").chmod(0o1777)
    return [
        "unshare", "--mount", "--propagation=private",
        "sh", "-c", _SETUP, "sh", os.fspath(place), *laid_open(place, wanted), "--",
        f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--",
        "env", f"HOME={place / 'tmp'}", f"TMPDIR={place / 'tmp'}",
        *[os.fspath(argument) for argument in arguments],
    ]  # fmt: skip


def why_not(place: Path) -> str:
    """Return what keeps root from becoming an ordinary user here, empty if nothing does."""
    fuse = "[ -r /dev/fuse ] && [ -w /dev/fuse ]"
    try:
        tried = subprocess.run(
            command(place, (), "sh", "-c", fuse), capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "no unshare(1): install util-linux"
    if not tried.returncode:
        return ""
    return tried.stderr.strip() or "/dev/fuse cannot be opened by others (cgroup of devices?)"


def laid_open(place: Path, wanted: Iterable[Path]) -> list[str]:
    """Make covers for the directories above ``wanted`` that are closed to ordinary users.

    Returns how to lay them, three arguments a mount(8): bind or rbind, what, and over what. Each
    closed directory is covered by one in which only what is wanted of it is seen.
    """
    paths = set(wanted)
    binds: list[str] = []
    covers: dict[Path, Path] = {}
    for path in sorted(path for path in paths if not paths & set(path.parents)):
        for closed in reversed(path.parents):
            if not closed.stat().st_mode & 0o001:
                cover = covers.setdefault(closed, place / f"cover{len(covers)}")
                inner = cover / path.relative_to(closed)
                inner.mkdir(parents=True)
                binds += ["bind", str(path), str(inner)]
                break
    for closed, cover in covers.items():
        binds += ["rbind", str(cover), str(closed)]
    return binds
