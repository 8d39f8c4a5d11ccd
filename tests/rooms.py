# SPDX-License-Identifier: GPL-2.0-or-later
"""A room for tests: mount and pid namespaces of their own, in which ordinary users are at home.

What a test needs of the machine is laid over it in there: a /dev/fuse that all may open, fuse.conf,
fstab and passwd of /etc, /usr/local/bin/privfs.  Nothing of it is seen outside.  When the room
ends, all of its processes and mounts end.  Only root can make one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from privfs.testing.ordinary import UID, laid_open

ROOT = Path(__file__).parents[1]
#: Who the ordinary users are; they are in the passwd(5) of the room, since fusermount3 wants names.
USER, OTHER, NAMELESS = UID, UID + 1, UID + 2

_SETUP = r"""
set -eu
exec 3>&1 1>&2
mknod "$1/fuse" c 10 229
chmod 666 "$1/fuse"
mount --bind "$1/fuse" /dev/fuse
for name in fuse.conf fstab passwd; do
    [ -e "/etc/$name" ] && mount --bind "$1/$name" "/etc/$name"
done
mount --bind "$1/bin" /usr/local/bin
shift
while [ $# -gt 0 ]; do
    mount --"$1" "$2" "$3"
    shift 3
done
echo ready >&3
exec 3>&-
while read -r _; do :; done
"""


class Room:
    """Runs commands in the namespaces, by default as :data:`USER`."""

    def __init__(self, place: Path, holder: int) -> None:
        self.place = place  #: a directory that all may enter; ``home`` belongs to USER
        self.home = place / "home"
        self._holder = holder

    def command(self, *arguments: str | os.PathLike[str], uid: int = USER) -> list[str]:
        """Return a command line that runs ``arguments`` as ``uid`` in the room."""
        return [
            "nsenter", f"--target={self._holder}", "--mount", "--pid", "--",
            "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups",
            "--", "env", "-i", "-C", os.fspath(self.place),
            f"HOME={self.home}", f"PYTHONPATH={ROOT}", f"TMPDIR={self.place / 'tmp'}", "LC_ALL=C",
            f"PATH=/usr/local/bin:{os.path.dirname(sys.executable)}:/usr/sbin:/usr/bin:/sbin:/bin",
            *[os.fspath(argument) for argument in arguments],
        ]  # fmt: skip

    def run(
        self,
        *arguments: str | os.PathLike[str],
        uid: int = USER,
        timeout: float = 60,
        input: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command and return what it said, stderr with stdout."""
        return subprocess.run(
            self.command(*arguments, uid=uid), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=timeout, check=False, input=input,
        )  # fmt: skip

    def sh(self, script: str, *arguments: str | os.PathLike[str], uid: int = USER) -> str:
        """Run a shell script that must succeed; ``$1`` and so on are ``arguments``."""
        done = self.run("sh", "-euc", script, "sh", *arguments, uid=uid)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def privfs(
        self, *arguments: str | os.PathLike[str], uid: int = USER
    ) -> subprocess.CompletedProcess[str]:
        """Run ``privfs``."""
        return self.run(sys.executable, "-P", "-m", "privfs", *arguments, uid=uid)

    def status(self, mounted: Path, uid: int = USER) -> dict[str, Any]:
        """Return what a mount says of itself."""
        done = self.privfs("status", "--json", mounted, uid=uid)
        assert done.returncode == 0, done.stdout
        found: dict[str, Any] = json.loads(done.stdout)[0]
        return found

    def directory(self, name: str, uid: int = USER) -> Path:
        """Make a directory of ``uid``."""
        made = self.place / name
        made.mkdir()
        os.chown(made, uid, uid)
        return made

    def alive(self, pid: int) -> bool:
        """Whether a process of the room, named by its pid in there, runs."""
        state = self.run("sh", "-c", f"sed -n 's/^State:.//p' /proc/{pid}/status", uid=0).stdout
        return state[:1] not in ("", "Z", "X", "s")


@contextlib.contextmanager
def room(*, user_allow_other: bool = False, fstab: str = "") -> Iterator[Room]:
    """Make a room; skips where it cannot be made."""
    missing = [tool for tool in ("unshare", "nsenter", "setpriv") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt install util-linux")
    place = Path(tempfile.mkdtemp(prefix="privfs-room."))
    try:
        place.chmod(0o755)
        for name in ("bin", "home", "tmp"):
            (place / name).mkdir()
        os.chown(place / "home", USER, USER)
        (place / "tmp").chmod(0o1777)
        (place / "fuse.conf").write_text("user_allow_other\n" if user_allow_other else "")
        (place / "fstab").write_text(fstab)
        users = "".join(
            f"user{uid}:x:{uid}:{uid}::{place / 'home'}:/bin/sh\n" for uid in (USER, OTHER)
        )
        (place / "passwd").write_text(Path("/etc/passwd").read_text() + users)
        ours = place / "bin" / "privfs"
        start = f"PYTHONPATH={ROOT} exec {sys.executable} -P -m privfs"
        ours.write_text(f'#!/bin/sh\n{start} "$@"\n')
        ours.chmod(0o755)
        with subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child",
             "--mount-proc", "sh", "-c", _SETUP, "sh", place,
             *laid_open(place, (Path(sys.base_prefix).resolve(), ROOT))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as outer:  # fmt: skip
            assert outer.stdout is not None
            try:
                if outer.stdout.readline() != "ready\n":
                    pytest.skip("no mount and pid namespaces here")
                children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text()
                yield Room(place, int(children))
            finally:
                outer.kill()
    finally:
        shutil.rmtree(place)
