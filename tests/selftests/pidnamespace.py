# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs in pid namespaces of their own, each with its own vm.memfd_noexec."""

from __future__ import annotations

import subprocess
import sys

NESTED = """
import ctypes, os, sys
def sysctl(value):
    try:
        with open("/proc/sys/vm/memfd_noexec", "w") as file:
            file.write(str(value))
        return "0"
    except OSError as error:
        return error.strerror
def made(flags=0):
    try:
        fd = os.memfd_create("x", flags)
        return oct(os.fstat(fd).st_mode & 0o777)
    except OSError as error:
        return error.strerror
def nested(what):
    sys.stdout.flush()
    outer = os.fork()
    if outer == 0:
        assert ctypes.CDLL(None, use_errno=True).unshare(0x20000000) == 0
        child = os.fork()
        if child == 0:
            what()
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        os._exit(0)
    os.waitpid(outer, 0)
"""


def in_pid_namespace(script: str) -> list[str]:
    """Lines that a program prints in a pid namespace, whose sysctl is its own."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", NESTED + script],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
