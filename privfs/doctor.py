# SPDX-License-Identifier: GPL-2.0-or-later
"""What this machine can do for privfs: named checks, each with the command that mends it.

Needs nothing of the rest of privfs but to try it, so that it can say what keeps it from working.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import platform
import pwd
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from privfs import probes
from privfs.probes import Check, failed, passed, skipped
from privfs.program import program

_FUSE_DEVICE: Final = os.makedev(10, 229)  # linux/miscdevice.h: MISC_MAJOR, FUSE_MINOR

# --- mounting ----------------------------------------------------------------------------------


def fuse_device() -> Check:
    """Whether we may open /dev/fuse, which mounting needs even through fusermount3."""
    name = "/dev/fuse"
    try:
        fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        try:
            device = os.fstat(fd).st_rdev
        finally:
            os.close(fd)
    except OSError as error:
        mend = f"as root: chmod 666 {name}"
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            mend = "as root: modprobe fuse; in a container: --device /dev/fuse"
        elif error.errno == errno.EPERM:
            mend = "the container forbids the device: --device /dev/fuse --cap-add SYS_ADMIN"
        return failed(name, f"cannot be opened: {error.strerror}", mend)
    if device != _FUSE_DEVICE:
        mend = "as root: rm /dev/fuse && mknod --mode=666 /dev/fuse c 10 229"
        return failed(name, "is not the FUSE device", mend)
    return passed(name, "present, may be opened")


def fusermount() -> Check:
    """Whether fusermount3 is there: unprivileged mounts and every unmount need it."""
    name = "fusermount3"
    found = shutil.which(name)
    if found is None:
        return failed(name, "not found", "apt install fuse3")
    if os.geteuid() != 0 and not os.stat(found).st_mode & stat.S_ISUID:
        return failed(name, f"{found} is not setuid root", f"as root: chmod u+s {found}")
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        if os.geteuid() != 0:
            text = f"refuses uid {os.getuid()}, which has no name in passwd(5)"
            return failed(name, text, f"as root: useradd --uid {os.getuid()} NAME")
    return passed(name, found)


def trial_mount() -> Check:
    """Whether a mount works, tried on a temporary directory, and how it refuses."""
    name = "mounting"
    script = 'exec "$@" "$PRIVFS"'
    asked = [*program(), "status", "--json"]
    try:
        done = subprocess.run(
            [*program(), "run", "-o", "size=1M", "--", "sh", "-c", script, "sh", *asked],
            capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return failed(name, "a trial mount did not answer for 60 s", "see dmesg")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return failed(name, last.removeprefix("privfs: "), "mend what failed above")
    mount = json.loads(done.stdout)[0]
    busy = "; umount(8) finds it busy, privfs umount does not" if mount.get("pinned") else ""
    if mount["mode"] == "passthrough":
        return passed(
            name,
            "works; the kernel itself refuses read, write and mmap (passthrough), and "
            "guest_memfds can be made that the host maps",
        )
    reason = mount["passthrough_errno"]
    mend = {
        errno.EPERM: "mount as root of the machine, not of a container",
        errno.EOPNOTSUPP: "needs Linux 6.9 with CONFIG_FUSE_PASSTHROUGH",
        errno.ENOSYS: "needs CONFIG_POSIX_MQUEUE",
        errno.ENOSPC: "sysctl -w fs.mqueue.queues_max=1024",
    }.get(reason, "see dmesg")
    text = f"works, but without passthrough ({os.strerror(reason)}): a private mapping is made "
    flags = ", and no guest_memfd can be mapped by the host"
    return skipped(name, f"{text}and answers SIGBUS{flags}{busy}", mend)


def stale_mounts() -> Check:
    """Whether privfs mounts are left that nobody serves."""
    from privfs.fuse import ground

    name = "stale mounts"
    dead = []
    for mount in ground.mounts():
        if mount.type == ground.TYPE and _lost(mount.place):
            dead.append(mount.place)
    if dead:
        mend = "; ".join(f"privfs umount {place}" for place in dead)
        return skipped(name, f"dead or hung: {', '.join(dead)}", mend)
    return passed(name, "none")


def _lost(place: str) -> bool:
    """Whether nobody serves a mount; asked by a process of its own, which a hung one may keep."""
    command = ["stat", "--file-system", "--", place]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=5, check=False, env={"LC_ALL": "C"}
        )
    except subprocess.TimeoutExpired:
        return True
    gone = (errno.ENOTCONN, errno.ECONNABORTED)
    return any(os.strerror(code).encode() in done.stderr for code in gone)


def allow_other() -> Check:
    """Whether -o allow_other may be used."""
    name = "allow_other"
    if os.geteuid() == 0:
        return passed(name, "root may")
    mend = "as root: echo user_allow_other >> /etc/fuse.conf"
    with contextlib.suppress(OSError):
        if re.search(r"^\s*user_allow_other\s*$", Path("/etc/fuse.conf").read_text(), re.M):
            return passed(name, "user_allow_other is set in /etc/fuse.conf")
    return skipped(name, "only root; other users cannot enter your mounts", mend)


def mount_helper() -> Check:
    """Whether mount(8) will find us: mount.fuse3 runs ``privfs`` by a PATH of its own."""
    name = "mount -t fuse.privfs"
    if shutil.which("mount.fuse3", path="/sbin:/usr/sbin:/usr/local/sbin") is None:
        return skipped(name, "mount.fuse3 not found", "apt install fuse3")
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    found = shutil.which("privfs", path=path)
    if found is None:
        ours = shutil.which("privfs", path=os.path.dirname(sys.executable)) or "PATH/TO/privfs"
        return skipped(name, "privfs is in no directory of the system", f"as root: ln -s {ours} "
                        "/usr/local/bin/privfs")  # fmt: skip
    return passed(name, found)


# --- programs ----------------------------------------------------------------------------------


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


def fuse_library() -> Check:
    """Whether pyfuse3 can be loaded through our layer."""
    name = "pyfuse3"
    library = libfuse_version()
    if library.startswith("unusable"):
        mend = "scripts/setup; without it: apt install libfuse3-dev pkg-config gcc && pip install ."
        return failed(name, library, mend)
    return passed(name, f"{_version('pyfuse3')} with libfuse {library}")


def engine() -> Check:
    """Whether guests can be run (kvmsim); mounting does not need it."""
    name = "unicorn"
    found = _version("unicorn")
    wanted = _required("unicorn")
    if found == "missing" or (wanted and found != wanted):
        text = f"{found}; kvmsim needs {wanted or 'it'}: no guests"
        return skipped(name, text, f"pip install unicorn=={wanted}" if wanted else "scripts/setup")
    return passed(name, found)


def _required(package: str) -> str:
    """Return the exact version that our metadata asks for, empty without one."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("privfs") or []:
            found = re.match(rf"{package}\s*==\s*([\w.]+)", line)
            if found:
                return found[1]
    return ""


def compiler() -> Check:
    """Whether guest programs and benchmarks can be built."""
    name = "gcc"
    found = shutil.which("gcc")
    if found is None:
        return skipped(name, "not found: guest programs cannot be built", "apt install gcc make")
    return passed(name, found)


#: All checks, in the order in which they are shown.
CHECKS: Final[tuple[Callable[[], Check], ...]] = (
    probes.kernel, fuse_device, fusermount, fuse_library, probes.memfd, probes.pidfd, trial_mount,
    probes.shmem_pages, probes.huge_pages, probes.secret_pages, probes.message_queues,
    probes.peer_pidfd, probes.userfaults, probes.open_files, allow_other,
    probes.user_namespaces, mount_helper, stale_mounts, engine, compiler,
)  # fmt: skip


def run_all() -> Iterator[Check]:
    """Make all checks; one that breaks is a failed one, with what it said."""
    for check in CHECKS:
        try:
            yield check()
        except Exception as error:  # whatever this machine does to us is a finding
            text = f"the check broke: {type(error).__name__}: {error}"
            yield failed(check.__name__, text, "report it")
