# SPDX-License-Identifier: GPL-2.0-or-later
"""What this machine can do for privfs: named checks, each with the command that mends it.

Needs nothing of the rest of privfs, so that it can say what keeps the rest from working.
"""

from __future__ import annotations

import enum
import errno
import importlib.metadata
import os
import platform
import shutil
import stat
from dataclasses import dataclass


class Result(enum.Enum):
    """How a check ended; SKIP: something optional is missing, and what is done instead."""

    PASS = "PASS"
    SKIP = "SKIP"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: what was found, and the command or setting that mends it."""

    name: str
    result: Result
    text: str
    remedy: str = ""


def fuse_device() -> Check:
    """Whether we can mount at all: /dev/fuse, directly or through fusermount3."""
    name = "/dev/fuse"
    helper = shutil.which("fusermount3")
    try:
        mode = os.stat(name).st_mode
        if not stat.S_ISCHR(mode):
            return Check(name, Result.FAIL, f"{name} is no device", "modprobe fuse")
        os.close(os.open(name, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            mend = "as root: modprobe fuse; in a container: --device /dev/fuse"
            return Check(name, Result.FAIL, f"{name}: {error.strerror}", mend)
        return Check(name, Result.FAIL, f"{name}: {error.strerror}", f"as root: chmod 666 {name}")
    if os.geteuid() != 0 and helper is None:
        return Check(name, Result.FAIL, "fusermount3 not found", "apt install fuse3")
    return Check(name, Result.PASS, "present, may be opened")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def libfuse_version() -> str:
    """Return the version of the libfuse that pyfuse3 uses, or why there is none."""
    try:
        from privfs.fuse import lowlevel
    except ImportError as error:
        return f"unusable: {error}"
    return lowlevel.LIBFUSE_VERSION


def versions() -> dict[str, str]:
    """Return the versions that a report of a problem should name."""
    return {
        "privfs": _version("privfs"),
        "python": platform.python_version(),
        "pyfuse3": _version("pyfuse3"),
        "libfuse": libfuse_version(),
        "trio": _version("trio"),
        "unicorn": _version("unicorn"),
        "kernel": platform.release(),
    }


#: All checks, in the order in which they are shown.
CHECKS = (fuse_device,)
