# SPDX-License-Identifier: GPL-2.0-or-later
"""What all tests share: who may run, mounts that leave nothing behind, no unexpected words.

Markers skip with a reason; a run in which every mount test was skipped although there is a
/dev/fuse fails, since it has tested nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

READY_SECONDS = 20
END_SECONDS = 15


# --- who may run -------------------------------------------------------------------------------


@functools.cache
def why_not(marker: str) -> str:
    """Return why tests with a marker cannot run here, empty if they can."""
    if marker == "root":
        if os.geteuid() != 0:
            return "needs uid 0"
        mapped = Path("/proc/self/uid_map").read_text().split()
        return "" if mapped == ["0", "0", "4294967295"] else "needs the initial user namespace"
    device = {"fuse": "/dev/fuse", "kvm": "/dev/kvm"}[marker]
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{device}: {error.strerror}"
    if marker == "fuse" and os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "needs root or fusermount3"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in ("fuse", "kvm", "root"):
        if item.get_closest_marker(marker) and (reason := why_not(marker)):
            pytest.skip(f"{marker}: {reason}")


class MountTests:
    """Notices a run that skipped all of its mount tests."""

    def __init__(self) -> None:
        self.skipped = self.ran = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "fuse" not in report.keywords:
            return
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped += 1
        elif report.when == "call":
            self.ran += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped and not self.ran and os.path.exists("/dev/fuse"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.skipped and not self.ran and os.path.exists("/dev/fuse"):
            terminalreporter.write_line(
                "FAILED: /dev/fuse exists, but every test that mounts was skipped", red=True
            )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(MountTests(), "mount-tests")


# --- no unexpected words, nothing unclosed -----------------------------------------------------


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test that logs WARNING or above without the marker ``logs``."""
    yield
    allowed = [mark.args[0] for mark in request.node.iter_markers("logs")]
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    unexpected = [
        f"{record.name}: {record.getMessage()}"
        for record in records
        if record.levelno >= logging.WARNING
        and not any(re.search(pattern, record.getMessage()) for pattern in allowed)
    ]
    assert not unexpected, "unexpected log messages:\n" + "\n".join(unexpected)


def pytest_collection_finish() -> None:
    """Leave what lives as long as the run out of the collections below: they take 45 ms else."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Let what was not closed say so while its test is known (ResourceWarning is an error)."""
    gc.collect()


# --- mounts ------------------------------------------------------------------------------------


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
        assert self.ask("audit") == {"findings": [], "skipped": 0}

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


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounter]:
    """Return a function that mounts: ``mount("size=1G", "direct_io", at=..., expected_log=...)``.

    At the end every mount ends in order, and neither mounts nor processes may be left.
    """
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    made: list[Mounted] = []

    def make(*options: str, at: Path | None = None, expected_log: str = "") -> Mounted:
        path = at or tmp_path / f"mount{len(made)}"
        path.mkdir(exist_ok=True)
        mounted = _start(path, options, tmp_path / f"mount{len(made)}.log")
        mounted.expected_log = expected_log
        made.append(mounted)
        return mounted

    try:
        yield make
        for mounted in made:
            if not mounted.killed:
                mounted.end()
    finally:
        left = [mounted for mounted in made if _cleared(mounted)]
    assert not [str(mounted.path) for mounted in left if not mounted.killed], "left mounted"
    for mounted in made:
        allowed = re.compile(mounted.expected_log or r"(?!)")
        said = [line for line in mounted.log().splitlines() if not allowed.search(line)]
        assert not said, "the mount said:\n" + "\n".join(said)
    now = psutil.Process().children(recursive=True)
    assert not [child for child in now if child.pid not in children], "processes are left"


def _start(path: Path, options: tuple[str, ...], log_path: Path) -> Mounted:
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
        _cleared(mounted)
        pytest.fail(f"privfs mount {' '.join(options)} failed: {mounted.log()}")
    mounted.facts = json.loads(line)
    return mounted


def _cleared(mounted: Mounted) -> bool:
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
