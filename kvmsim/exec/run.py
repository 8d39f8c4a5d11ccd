# SPDX-License-Identifier: GPL-2.0-or-later
"""Starts a program under a supervisor and ends with it."""

from __future__ import annotations

import array
import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from hwemu import processmemory
from kvmsim.device.system import KvmDevice
from kvmsim.exec.launch import BEGIN
from kvmsim.exec.notification import Listener
from kvmsim.exec.process import Identity
from kvmsim.exec.refusals import no_access
from kvmsim.exec.requests import Requests
from kvmsim.exec.supervisor import Supervisor
from kvmsim.exec.syscalls import pidfd_getfd


class LaunchFailed(Exception):
    """The program did not begin; ``status`` is the launcher's, which has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the launcher ended with status {status}")
        self.status = status


def run(program: Sequence[str], device: KvmDevice) -> int:
    """Run a program on ``device`` and return its status, negative for a signal.

    LaunchFailed; Refused where its memory is out of reach here.
    """
    with Requests() as requests:
        child, listener, node = _start(program)
        requests.pass_to(child)
        try:
            Supervisor(device, listener, node, requests).serve()
            if requests.over:
                child.kill()
            return child.wait()
        finally:
            os.close(listener.fd)
            if child.poll() is None:
                child.kill()
                child.wait()


def _start(program: Sequence[str]) -> tuple[subprocess.Popen[bytes], Listener, Identity]:
    """The program about to begin, and what /dev/kvm is for it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-m", "kvmsim.exec.launch", str(number)]
            child = subprocess.Popen([*command, "--", *program], pass_fds=[number])
        data, ancillary, _, _ = ours.recvmsg(BEGIN.size, socket.CMSG_SPACE(4))
        if not data:
            raise LaunchFailed(child.wait())
        (_, _, payload), *_ = ancillary
        (fd,) = array.array("i", payload)
        os.set_inheritable(fd, False)
        try:
            _reach(child.pid, number)
        except OSError as error:
            os.close(fd)
            child.kill()
            child.wait()
            raise no_access(error) from error
        ours.send(b"R")
    return child, Listener(fd), BEGIN.unpack(data)


def _reach(pid: int, number: int) -> None:
    """See whether a process's descriptors and memory are within reach; OSError."""
    pidfd = os.pidfd_open(pid)
    try:
        os.close(pidfd_getfd(pidfd, number))
    finally:
        os.close(pidfd)
    with open(f"/proc/{pid}/maps") as file:
        start = int(file.readline().partition("-")[0], 16)
    byte = ctypes.create_string_buffer(1)
    processmemory.read(pid, start, ctypes.addressof(byte), 1)
