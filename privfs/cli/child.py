# SPDX-License-Identifier: GPL-2.0-or-later
"""A mount in a process of its own, started by exec and watched through pipes.

Two pipes tie it to its parent: on one it says that it is ready; while the other is open at the
parent's end the mount stays, so that even SIGKILL of the parent ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from privfs.cli.exitcodes import Exit
from privfs.cli.failure import Failure
from privfs.program import program

#: Seconds that a mount may take to answer: more than the FUSE INIT exchange may.
_READY_TIMEOUT: Final = 30.0
#: Seconds that a mount may take to end, beyond the ladder for users that do not acknowledge.
_END_TIMEOUT: Final = 15.0


@dataclass(slots=True)
class MountProcess:
    """A mount that answers, and what it said of itself."""

    process: subprocess.Popen[bytes]
    facts: dict[str, Any]
    lifeline: int  #: our end of the pipe that keeps it alive, -1 without

    def end(self, patience: float = _END_TIMEOUT) -> int:
        """Ask it to unmount and wait; returns its status, negative for a signal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1
        return status


def start(arguments: Sequence[str], *, tied: bool) -> MountProcess:
    """Start ``privfs mount`` with ``arguments`` and return when it answers; raises Failure.

    ``tied``: it ends when this process does.  Its messages go to our stderr.
    """
    ready, ready_theirs = os.pipe()
    life_theirs, life = os.pipe() if tied else (-1, -1)
    fds = [ready_theirs] + ([life_theirs] if tied else [])
    hidden = [f"--ready-fd={ready_theirs}"] + ([f"--life-fd={life_theirs}"] if tied else [])
    try:
        process = subprocess.Popen(
            [*program(), "mount", *hidden, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=fds,
            start_new_session=True,
        )
    finally:
        for fd in fds:
            os.close(fd)
    mount = MountProcess(process, {}, life)
    try:
        line = _line(ready)
        if line:
            mount.facts = json.loads(line)
            return mount
    except BaseException:
        mount.end()
        raise
    finally:
        os.close(ready)
    raise _why(mount)


def _line(fd: int) -> bytes:
    """Read up to a newline, or return nothing at the end of file or after the time."""
    deadline = time.monotonic() + _READY_TIMEOUT
    text = b""
    while not text.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return b""
        chunk = os.read(fd, 4096)
        if not chunk:
            return b""
        text += chunk
    return text


def _why(mount: MountProcess) -> Failure:
    try:
        status = mount.process.wait(1)
    except subprocess.TimeoutExpired:
        mount.end(0)
        return Failure(Exit.FUSE, f"the mount did not answer within {_READY_TIMEOUT:.0f} s")
    mount.end(0)
    if status > 0:
        return Failure(status)  # it has said why
    return Failure(Exit.FUSE, f"the mount process was ended by {signal.Signals(-status).name}")


# --- the mount's side --------------------------------------------------------------------------


def tell_ready(fd: int, facts: dict[str, Any]) -> None:
    """Tell the parent; it may have gone."""
    with contextlib.suppress(BrokenPipeError):
        os.write(fd, json.dumps(facts).encode() + b"\n")
    os.close(fd)


def end_with_parent(fd: int) -> None:
    """Send ourselves SIGTERM when the other end of the pipe ``fd`` is closed."""

    def watch() -> None:
        while os.read(fd, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def detach_streams() -> None:
    """Let go of the terminal: whoever reads our output must see its end."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
