# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounts for tests: each served by a process of its own, watched until it is gone."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

READY_SECONDS = 20
END_SECONDS = 15
BUDGET = "1G"


@dataclass(slots=True)
class Mounted:
    """A mount served by a process of its own."""

    path: Path
    process: subprocess.Popen[bytes]
    log_path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    expected_log: str = ""  #: a pattern; other lines in the log fail the test
    killed: bool = False

    def privfs(self, *arguments: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
        """Run ``privfs`` and return what it said."""
        return privfs(*arguments)

    def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        """Ask the control socket."""
        from privfs import control

        return control.ask(self.path, question, **arguments)

    def stat(self, name: str) -> dict[str, Any]:
        """Return the counts of one file."""
        from privfs import control

        return control.ask_file(self.path / name, "stat")

    def audit(self) -> None:
        """Assert that bitmaps and memory agree, file by file."""
        found = self.ask("audit")
        assert (found["findings"], found["skipped"]) == ([], 0)

    def log(self) -> str:
        return self.log_path.read_text()

    def kill(self) -> None:
        """End the process with SIGKILL and leave a dead mount."""
        self.killed = True
        self.process.kill()
        self.process.wait(END_SECONDS)

    def end(self) -> None:
        """End the mount in order."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(END_SECONDS) == 0, self.log()

    def is_mounted(self) -> bool:
        return any(place == os.fspath(self.path) for place in mount_points())


def privfs(
    *arguments: str | os.PathLike[str], timeout: float = 60, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run the program ``privfs``."""
    return subprocess.run(
        [sys.executable, "-m", "privfs", *map(os.fspath, arguments)],
        capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL,
        **more,
    )  # fmt: skip


def mount_points() -> list[str]:
    """Return the places in our mount table."""
    with open("/proc/self/mountinfo", "rb") as table:
        fields = [line.split()[4] for line in table]
    return [os.fsdecode(place).encode().decode("unicode_escape") for place in fields]


Mounter = Callable[..., Mounted]


def start(path: Path, options: tuple[str, ...], log_path: Path) -> Mounted:
    """Mount, with a budget that a test which allocates too much cannot harm the machine with."""
    options = (f"size={BUDGET}", *options)
    ready, theirs = os.pipe()
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "privfs", "mount", f"--ready-fd={theirs}",
             *[f"-o{option}" for option in options], "--", path],
            pass_fds=[theirs], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    os.close(theirs)
    mounted = Mounted(path, process, log_path)
    with open(ready, "rb") as stream:
        answered = select.select([stream], [], [], READY_SECONDS)[0]
        line = stream.readline() if answered else b""
    if not line:
        process.kill()
        process.wait()
        cleared(mounted)
        pytest.fail(f"privfs mount {' '.join(options)} failed: {mounted.log()}")
    mounted.facts = json.loads(line)
    return mounted


@contextlib.contextmanager
def for_many(place: Path, *options: str) -> Iterator[Mounted]:
    """A mount for many tests, in an empty directory; every test leaves it empty."""
    (place / "mount").mkdir()
    made = start(place / "mount", options, place / "log")
    try:
        yield made
        made.audit()
        assert made.ask("status")["files"] == 0, "files are left"
        made.end()
    finally:
        cleared(made)
    assert made.log() == ""


def cleared(mounted: Mounted) -> bool:
    """Kill and unmount what is left of a mount; return whether a mount was left."""
    if mounted.process.poll() is None:
        mounted.process.kill()
        mounted.process.wait()
    was = mounted.is_mounted()
    while mounted.is_mounted():
        done = subprocess.run(["umount", "-l", mounted.path], capture_output=True, check=False)
        if done.returncode:
            break
    with contextlib.suppress(OSError):
        mounted.path.rmdir()
    return was
