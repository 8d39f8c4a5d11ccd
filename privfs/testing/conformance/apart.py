# SPDX-License-Identifier: GPL-2.0-or-later
"""Targets by name, each run in a process of its own.

``memfd``, ``guest_memfd:0`` (or 1, 3), ``model:PERSONALITY``, ``mount:PERSONALITY`` (by root: the
kernel refuses, passthrough) and ``user:PERSONALITY`` (by an ordinary user, as whom root runs it
too, in a user, mount and pid namespace of its own: direct_io). Everything ends with the process
that runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from privfs.testing import ordinary
from privfs.testing.conformance.row import REFERENCE, Mode, Outcome

SECONDS: Final = 300
#: Nothing is left behind: the mount is the namespace's own, the daemon dies with its init.
_NAMESPACE: Final = (
    "unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child",
    "--mount-proc",
)  # fmt: skip
_MODULE: Final = "privfs.testing.conformance"


class Unable(Exception):
    """A target cannot be had on this machine; ``str()`` says what is missing."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """A personality of a mount in one of its modes."""

    personality: str
    mode: Mode

    @property
    def column(self) -> str:
        """The column of the file that it stands for."""
        return REFERENCE[self.personality]


def mounted(name: str) -> Mounted | None:
    """Return what ``mount:P`` or ``user:P`` names, None for other targets."""
    kind, _, personality = name.partition(":")
    modes = {"mount": Mode.PASSTHROUGH, "user": Mode.DIRECT_IO}
    if kind not in modes or personality not in REFERENCE:
        return None
    return Mounted(personality, modes[kind])


def outcomes(name: str, log: Callable[[str], None] = lambda line: None) -> dict[str, Outcome]:
    """Run a target and return row name → outcome; raises Unable."""
    with tempfile.TemporaryDirectory(prefix="privfs-conformance.") as place:
        command = _command(name, Path(place))
        log(f"{name}: {' '.join(command)}")
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SECONDS,
            stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name}: status {done.returncode}\n{done.stderr}{done.stdout}")
    found = json.loads(done.stdout)
    if "unable" in found:
        raise Unable(found["unable"])
    return {str(row): str(outcome) for row, outcome in found["outcomes"].items()}


def _command(name: str, place: Path) -> list[str]:
    python = [sys.executable, "-P", "-m"]
    suite = [*python, _MODULE, "run", "--json"]
    which = mounted(name)
    if which is None:
        return [*suite, name]
    inside = [*suite, "--mode", which.mode.value, "--personality", which.personality]
    serving = [
        *python, "privfs", "run", "-o", f"personality={which.personality},size=1G",
        "--", "sh", "-c", 'exec "$@" "$PRIVFS"', "sh", *inside,
    ]  # fmt: skip
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise Unable("/dev/fuse: missing or not accessible")
    if which.mode is Mode.PASSTHROUGH:
        if not _initial_root():
            raise Unable("passthrough needs root in the initial user namespace")
        return serving
    return as_a_user(serving, place)


def _initial_root() -> bool:
    with open("/proc/self/uid_map") as table:
        return os.geteuid() == 0 and table.read().split() == ["0", "0", "4294967295"]


def as_a_user(serving: list[str], place: Path) -> list[str]:
    """Return a command line that runs ``serving`` as root of a user namespace, but nowhere else.

    Root becomes an ordinary user first. Where it may not (a container that has no CAP_MKNOD or
    lets no device be bound), it is mapped to itself: it lacks all rights in the initial namespace
    too, and only its uid is not that of somebody else.
    """
    inside = [*_NAMESPACE, *serving]
    if _initial_root():
        with tempfile.TemporaryDirectory(prefix="privfs-conformance.") as trial:
            impossible = ordinary.why_not(Path(trial))
        if not impossible:
            wanted = [Path(sys.base_prefix).resolve(), *map(Path, sys.path[1:])]
            inside = ordinary.command(place, [p for p in wanted if p.is_dir()], *inside)
    try:
        tried = subprocess.run([*_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Unable("unshare(1) of util-linux") from error
    if tried.returncode:
        raise Unable(f"user namespaces: {tried.stderr.strip()}")
    return inside
