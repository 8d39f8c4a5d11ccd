# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel can do for privfs: each probe tries it and says what mends it.

Nothing is derived from version numbers where it can be tried: kernels are configured and patched.
"""

from __future__ import annotations

import ctypes
import enum
import fcntl
import os
import platform
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from privfs.backing import hugetlb, secretmem, shmem

_libc = ctypes.CDLL(None, use_errno=True)

_SYS_MQ_OPEN: Final = 240  # asm/unistd_64.h
_SYS_MQ_UNLINK: Final = 241
_SYS_USERFAULTFD: Final = 323
_SO_PEERPIDFD: Final = 77  # asm-generic/socket.h, Linux 6.5
_UFFDIO_API: Final = 0xC018AA3F
_UFFD_API: Final = 0xAA
_UFFD_USER_MODE_ONLY: Final = 1
_USERFAULT_DEVICE: Final = Path("/dev/userfaultfd")  # Linux 6.1, for whom seccomp denies the call
_USERFAULTFD_IOC_NEW: Final = 0xAA00
_SWAPS: Final = Path("/proc/swaps")
#: linux/userfaultfd.h: features that fencing an extent needs.
_UFFD_FEATURES: Final = {"missing faults of shmem": 1 << 5, "minor faults of shmem": 1 << 10}
_CAP_IPC_LOCK: Final = 14  # linux/capability.h
_OLDEST_KERNEL: Final = (5, 15)
_FEW_FILES: Final = 4096


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


def passed(name: str, text: str) -> Check:
    """Return a check that passed."""
    return Check(name, Result.PASS, text)


def skipped(name: str, text: str, remedy: str) -> Check:
    """Return a check of something optional that is missing."""
    return Check(name, Result.SKIP, text, remedy)


def failed(name: str, text: str, remedy: str) -> Check:
    """Return a check that found a requirement missing."""
    return Check(name, Result.FAIL, text, remedy)


def _syscall(number: int, *arguments: object) -> int:
    """Make a system call; raises OSError."""
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def kernel() -> Check:
    """Whether the kernel is one that privfs is made for."""
    name = "kernel"
    release = platform.release()
    numbers = re.match(r"(\d+)\.(\d+)", release)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if platform.machine() != "x86_64" or version < _OLDEST_KERNEL:
        return failed(name, f"Linux {release} {platform.machine()}", "needs x86-64, Linux 5.15")
    return passed(name, f"Linux {release}")


def message_queues() -> Check:
    """Whether POSIX message queues can be made: passthrough refuses by one (mq_overview(7))."""
    name = "POSIX message queue"
    queue = f"privfs-doctor-{os.getpid()}".encode()
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(_syscall(_SYS_MQ_OPEN, queue, flags, 0o600, None))
        _syscall(_SYS_MQ_UNLINK, queue)
    except OSError as error:
        mend = "sysctl -w fs.mqueue.queues_max=1024; needs CONFIG_POSIX_MQUEUE"
        return skipped(name, f"{error.strerror}: no passthrough", mend)
    return passed(name, "works")


def pidfd() -> Check:
    """Whether the death of a user can be proven: pidfd_open(2), pidfd_send_signal(2)."""
    name = "pidfd"
    try:
        fd = os.pidfd_open(os.getpid())
        try:
            signal.pidfd_send_signal(fd, 0)
        finally:
            os.close(fd)
    except OSError as error:
        return failed(name, error.strerror or str(error), "allow pidfd_* in the seccomp profile")
    return passed(name, "works")


def peer_pidfd() -> Check:
    """Whether a peer's process can be had without a race: SO_PEERPIDFD of unix(7)."""
    name = "SO_PEERPIDFD"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        try:
            os.close(ours.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
        except OSError as error:
            text = f"{error.strerror}; a user's process is found by its pid"
            return skipped(name, text, "needs Linux 6.5")
    return passed(name, "works")


def memfd() -> Check:
    """Whether extents can be made: memfd_create(2) with seals, fallocate, hole punching."""
    name = "memfd"
    real = "needs Linux's own shmem, not an emulation of it"
    try:
        fd = os.memfd_create("doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, 1 << 16)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            for mode in (1, 3):  # KEEP_SIZE; KEEP_SIZE | PUNCH_HOLE
                if _libc.fallocate(fd, mode, ctypes.c_int64(0), ctypes.c_int64(4096)):
                    raise OSError(ctypes.get_errno(), "fallocate")
            if os.fstat(fd).st_blocks:
                return failed(
                    name,
                    "a punched hole keeps its memory",
                    real,
                )
            try:
                os.ftruncate(fd, 1 << 17)
            except PermissionError:
                os.ftruncate(fd, 0)
            else:
                return failed(name, "F_SEAL_GROW does not hold", real)
        finally:
            os.close(fd)
    except OSError as error:
        return failed(name, error.strerror or str(error), "free memory; sysctl vm.memfd_noexec=0")
    return passed(name, "sealing and punching work")


def shmem_pages() -> Check:
    """Whether a page of shmem is one page, or a huge one that nobody asked for."""
    name = "-o backing=shmem"
    setting = shmem.huge_setting()
    try:
        shmem.Shmem().require_exact()
    except OSError:
        text = f"transparent huge pages unasked ({setting}): only with -o pagesize=2M"
        return skipped(name, text, f"to mount without: echo advise > {shmem.SETTING}")
    return passed(name, f"pages of 4K (transparent huge pages: {setting})")


def huge_pages() -> Check:
    """Whether there is a huge page for -o backing=hugetlb."""
    name = "-o backing=hugetlb"
    try:
        store = hugetlb.Hugetlb()
        store.require_pool()
    except OSError as error:
        mend = hugetlb.enlarge(hugetlb.DEFAULT_PAGE_SIZE)
        return skipped(name, f"no huge page of 2M is free: {_cause(error)}", mend)
    return passed(name, f"a pool of {hugetlb.pool_bytes(store.page_size) >> 20}M in pages of 2M")


def secret_pages() -> Check:
    """Whether there is secret memory for -o backing=secretmem, and how much a user may map."""
    name = "-o backing=secretmem"
    store = secretmem.Secretmem()
    try:
        store.require_works()
    except OSError as error:
        mend = secretmem.REMEDIES.get(error.errno or 0, "see dmesg")
        return skipped(name, f"no secret memory can be had: {_cause(error)}", mend)
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if hard != resource.RLIM_INFINITY and not _locks_freely():
        text = f"works; a user may map at most {hard >> 10}K of it (RLIMIT_MEMLOCK)"
        mend = "as root: ulimit -l unlimited, LimitMEMLOCK= in a systemd unit, limits.conf(5)"
        return skipped(name, text, mend)
    return passed(name, "works; memory that was given up is not audited")


def _locks_freely() -> bool:
    """Whether RLIMIT_MEMLOCK does not bind us: CAP_IPC_LOCK of capabilities(7)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.M)
    return found is not None and bool(int(found[1], 16) >> _CAP_IPC_LOCK & 1)


def _cause(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def userfaults() -> Check:
    """Whether users can be fenced: userfaultfd(2) with missing and minor faults of shmem."""
    name = "userfaultfd"
    none = "kvmsim runs without a fence"
    mend = (
        "needs Linux 5.14 with CONFIG_USERFAULTFD; in a container: --device /dev/userfaultfd, "
        "or a seccomp profile that allows userfaultfd"
    )
    try:
        fd = _userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY)
        try:
            answer = bytearray(struct.pack("=QQQ", _UFFD_API, 0, 0))  # struct uffdio_api
            fcntl.ioctl(fd, _UFFDIO_API, answer)
        finally:
            os.close(fd)
    except OSError as error:
        return skipped(name, f"{error.strerror}: {none}", mend)
    features = struct.unpack("=QQQ", answer)[1]
    missing = [text for text, bit in _UFFD_FEATURES.items() if not features & bit]
    if missing:
        return skipped(name, f"without {', '.join(missing)}: {none}", mend)
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    locks = _locks_freely() or limit == resource.RLIM_INFINITY
    if len(_SWAPS.read_text().splitlines()) > 1 and not locks:
        text = f"works, but there is swap and memory may not be locked without limit: {none}"
        return skipped(name, text, "ulimit -l unlimited, LimitMEMLOCK=infinity, or swapoff -a")
    return passed(name, "missing and minor faults of shmem")


def _userfaultfd(flags: int) -> int:
    try:
        return _syscall(_SYS_USERFAULTFD, flags)
    except OSError as refused:
        try:
            device = os.open(_USERFAULT_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            raise refused from None
        try:
            return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags)
        finally:
            os.close(device)


def open_files() -> Check:
    """Whether there may be enough descriptors: every extent of every file is one."""
    name = "open files"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < _FEW_FILES:
        mend = "ulimit -Hn 1048576, LimitNOFILE= in a systemd unit, limits.conf(5)"
        return skipped(name, f"at most {hard}: few files at a time", mend)
    return passed(name, f"at most {'any number' if hard == resource.RLIM_INFINITY else hard}")


def user_namespaces() -> Check:
    """Whether `unshare -r` works: mounting without fusermount3, umount(8) of users' mounts."""
    name = "user namespaces"
    tool = shutil.which("unshare")
    if tool is None:
        return skipped(name, "unshare not found", "apt install util-linux")
    done = subprocess.run(
        [tool, "--user", "--map-root-user", "--mount", "true"],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["refused"])[-1]
        mend = "sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000"
        return skipped(
            name,
            f"{said}; without root, umount(8) finds mounts busy and privfs umount does not",
            f"{mend}; in a container: --security-opt seccomp=unconfined",
        )
    return passed(name, "may be made")
