# SPDX-License-Identifier: GPL-2.0-or-later
"""Unmodified programs whose guest_memfds are mapped: as in the kernel, and only so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mounts import Mounter

pytestmark = pytest.mark.fuse
Run = Callable[..., subprocess.CompletedProcess[str]]

PROGRAM = """
import ctypes, errno, fcntl, mmap, os, struct
libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
kvm = os.open("/dev/kvm", os.O_RDWR)
flags = fcntl.ioctl(kvm, 0xAE03, 244)
assert flags == FLAGS, flags
vm = fcntl.ioctl(kvm, 0xAE01, 0)

def create_fd(flags):
    buffer = bytearray(struct.pack("<8Q", 4 << 20, flags, *[0] * 6))
    return fcntl.ioctl(vm, 0xC040AED4, buffer)

def refused(code, call):
    try:
        call()
    except OSError as error:
        assert error.errno == code, error
    else:
        raise AssertionError("not refused")

def collapse(memory):
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return 0 if not libc.madvise(address, len(memory), 25) else ctypes.get_errno()

if not FLAGS:
    refused(errno.EINVAL, lambda: create_fd(1))
    refused(errno.EINVAL, lambda: create_fd(3))
    raise SystemExit(0)
fd = create_fd(3)
memory = mmap.mmap(fd, 4 << 20)
memory[:4] = b"abcd"
refused(errno.EINVAL, lambda: mmap.mmap(fd, 4096, flags=mmap.MAP_PRIVATE))
twin = os.dup(fd)
refused(errno.EINVAL, lambda: mmap.mmap(twin, 4096, flags=mmap.MAP_PRIVATE))
assert collapse(memory) == errno.EINVAL
assert memory[:4] == b"abcd"
refused(errno.ENODEV, lambda: mmap.mmap(create_fd(0), 4096))
refused(errno.EINVAL, lambda: mmap.mmap(create_fd(1), 4096, flags=mmap.MAP_PRIVATE))
private = create_fd(1)
sealed = mmap.mmap(private, 4096)
child = os.fork()
if not child:
    sealed[0]
    os._exit(0)
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 7
with open(os.__file__, "rb") as file:  # of others the kernel decides
    with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as other:
        assert other[:1]
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def inside(flags: int, *options: str) -> subprocess.CompletedProcess[str]:
        program = tmp_path / "program.py"
        program.write_text(PROGRAM.replace("FLAGS", str(flags)))
        command = [sys.executable, "-m", "kvmsim", "exec", *options, "--", sys.executable, program]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)

    return inside


@pytest.mark.parametrize("offered", [True, False])
def test_a_program_maps_its_guest_memfds(mount: Mounter, offered: bool, run: Run) -> None:
    made = mount("personality=guest_memfd")
    if not made.ask("status")["host_mappable"]:
        pytest.skip("no FUSE passthrough: needs root and Linux 6.9")
    done = run(3 * offered, f"--memory={made.path}", *["--gmem-flags"] * offered)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_mount_that_cannot_offers_no_flags(mount: Mounter, run: Run) -> None:
    done = run(0, f"--memory={mount('personality=resizable').path}", "--gmem-flags")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("kvmsim: --gmem-flags: none are offered")
    assert done.stderr.count("\n") == 1


def test_the_interface_of_2022_has_no_flags(run: Run) -> None:
    done = run(0, "--gmem-flags", "--abi=v7")
    assert done.returncode == 2
    assert "2022 has no guest_memfds" in done.stderr
