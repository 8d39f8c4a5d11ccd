# SPDX-License-Identifier: GPL-2.0-or-later
"""The two file systems that are compared, each mounted for as long as a block lasts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from model import Bench, Placement, Unavailable
from spawn import floor, pin, serving

from privfs.cli import child
from privfs.cli.failure import Failure

_MOUNT_SECONDS = 10.0


def _require_fuse() -> None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise Unavailable(f"no FUSE: /dev/fuse: {error.strerror}; see privfs doctor") from error


@contextlib.contextmanager
def _mountpoint(bench: Bench) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(dir=bench.scratch))
    try:
        yield place
    finally:
        if os.path.ismount(place):  # its server was killed
            subprocess.run(["umount", "-l", place], capture_output=True, timeout=10, check=False)
        place.rmdir()


@contextlib.contextmanager
def privfs_mount(bench: Bench, placement: Placement, *options: str) -> Iterator[Path]:
    """Mount privfs, with options, with its daemon on the server's CPU."""
    _require_fuse()
    with _mountpoint(bench) as place:
        try:
            mount = child.start(["-q", *options, "--", str(place)], tied=True)
        except Failure as failure:
            why = str(failure) or "its message is on stderr; privfs doctor may know more"
            raise Unavailable(f"privfs does not mount: {why}") from failure
        try:
            pin(mount.process.pid, placement.server)
            yield place
        finally:
            mount.end()


@contextlib.contextmanager
def floor_mount(bench: Bench, placement: Placement, *, user: bool = False) -> Iterator[Path]:
    """Mount fuse_floor; with ``user``, a C program must answer before each punch is made."""
    _require_fuse()
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(_mountpoint(bench))
        path = bench.scratch / f"{place.name}.socket"
        options = ["--user-socket", str(path)] if user else []
        command = floor(bench.floors, "fuse_floor", *options, place)
        server = stack.enter_context(serving(command, placement.server, ready=False))
        deadline = time.monotonic() + _MOUNT_SECONDS
        while not os.path.ismount(place):
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"fuse_floor did not mount: {server.said()}")
            time.sleep(0.01)
        if user:
            echo = floor(bench.floors, "echo_floor", "user", path)
            stack.enter_context(serving(echo, placement.caller, ready=True))
        yield place
