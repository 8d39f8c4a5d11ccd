# SPDX-License-Identifier: GPL-2.0-or-later
"""Targets by name, each run in a process of its own.

``memfd``, ``guest_memfd:0`` (or 1, 3), ``model:PERSONALITY``, ``mount:PERSONALITY`` (by root: the
kernel refuses, passthrough) and ``user:PERSONALITY`` (in a user, mount and pid namespace of its
own, so without privileges: direct_io). Everything ends with the process that runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

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
    command = _command(name)
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


def _command(name: str) -> list[str]:
    python = [sys.executable, "-P", "-m"]
    suite = [*python, _MODULE, "run", "--json"]
    which = mounted(name)
    if which is None:
        return [*suite, name]
    _check(which)
    inside = [*suite, "--mode", which.mode.value, "--personality", which.personality]
    return [
        *(_NAMESPACE if which.mode is Mode.DIRECT_IO else ()),
        *python, "privfs", "run", "-o", f"personality={which.personality},size=1G",
        "--", "sh", "-c", 'exec "$@" "$PRIVFS"', "sh", *inside,
    ]  # fmt: skip


def _check(which: Mounted) -> None:
    """Raise Unable where the mount cannot be tried."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise Unable("/dev/fuse: missing or not accessible")
    if which.mode is Mode.PASSTHROUGH:
        with open("/proc/self/uid_map") as table:
            if os.geteuid() or table.read().split() != ["0", "0", "4294967295"]:
                raise Unable("passthrough needs root in the initial user namespace")
        return
    try:
        tried = subprocess.run([*_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Unable("unshare(1) of util-linux") from error
    if tried.returncode:
        raise Unable(f"user namespaces: {tried.stderr.strip()}")
