# SPDX-License-Identifier: GPL-2.0-or-later
"""What all tests share: who may run, mounts that leave nothing behind, no unexpected words.

Markers skip with a reason; a run in which every mount test was skipped although there is a
/dev/fuse fails, since it has tested nothing.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401 - before gc.freeze(): it looks for what refers to its PRNGs
import psutil
import pytest
from mounts import Mounted, Mounter, cleared, start

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
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Let what was not closed say so while its test is known (ResourceWarning is an error)."""
    gc.collect()
    if nextitem is not None and nextitem.path != item.path:
        gc.freeze()  # modules that were imported, reports of what has run


# --- mounts ------------------------------------------------------------------------------------


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
        mounted = start(path, options, tmp_path / f"mount{len(made)}.log")
        mounted.expected_log = expected_log
        made.append(mounted)
        return mounted

    try:
        yield make
        for mounted in made:
            if not mounted.killed:
                mounted.end()
    finally:
        left = [mounted for mounted in made if cleared(mounted)]
    assert not [str(mounted.path) for mounted in left if not mounted.killed], "left mounted"
    for mounted in made:
        allowed = re.compile(mounted.expected_log or r"(?!)")
        said = [line for line in mounted.log().splitlines() if not allowed.search(line)]
        assert not said, "the mount said:\n" + "\n".join(said)
    now = psutil.Process().children(recursive=True)
    assert not [child for child in now if child.pid not in children], "processes are left"
