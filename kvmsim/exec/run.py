# SPDX-License-Identifier: GPL-2.0-or-later
"""Starts a program under a supervisor and ends with it."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvmsim.device.system import KvmDevice
from kvmsim.exec.notification import Listener
from kvmsim.exec.supervisor import Supervisor


class LaunchFailed(Exception):
    """The program did not begin; ``status`` is the launcher's, which has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the launcher ended with status {status}")
        self.status = status


def run(program: Sequence[str], device: KvmDevice) -> int:
    """Run a program on ``device`` and return its status, negative for a signal."""
    with tempfile.TemporaryDirectory(prefix="kvmsim-exec.") as folder:
        node = Path(folder, "kvm")
        node.touch(0o666)
        status = os.stat(node)
        child, listener = _start(program, os.fspath(node))
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the program's
        try:
            Supervisor(device, listener, (status.st_dev, status.st_ino)).serve()
            return child.wait()
        finally:
            signal.signal(signal.SIGINT, previous)
            os.close(listener.fd)
            if child.poll() is None:
                child.kill()
                child.wait()


def _start(program: Sequence[str], node: str) -> tuple[subprocess.Popen[bytes], Listener]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            command = [sys.executable, "-m", "kvmsim.exec.launch", str(theirs.fileno()), node]
            child = subprocess.Popen([*command, "--", *program], pass_fds=[theirs.fileno()])
        data, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
        if not data:
            raise LaunchFailed(child.wait())
        (_, _, payload), *_ = ancillary
        (fd,) = array.array("i", payload)
        os.set_inheritable(fd, False)
        ours.send(b"R")
    return child, Listener(fd)
