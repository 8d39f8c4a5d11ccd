# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU as Debian has it, on the simulated /dev/kvm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mounts import Mounter

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64",
                       reason="the program's ioctls are x86-64's"),
]  # fmt: skip

QEMU = "qemu-system-x86_64"
MACHINE = "microvm,kernel-irqchip=off,pit=off,pic=off,rtc=off,isa-serial=off"
CONSOLE, EXIT = 0x402, 0xF4  #: ports of isa-debugcon and isa-debug-exit
STATUS = 16


def firmware(text: bytes) -> bytes:
    """64 KiB whose reset vector prints ``text`` by port in 16-bit mode and leaves."""
    code = b"\xba" + CONSOLE.to_bytes(2, "little")  # mov dx, CONSOLE
    for letter in text:
        code += bytes([0xB0, letter, 0xEE])  # mov al, letter; out dx, al
    code += b"\xba" + EXIT.to_bytes(2, "little") + bytes([0xB0, STATUS, 0xEE])
    code += b"\xf4\xeb\xfd"  # hlt, for ever
    return code.ljust(0xFFF0, b"\0") + b"\xea\x00\x00\x00\xf0".ljust(16, b"\0")  # jmp f000:0


def qemu(mount: Mounter, console: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Run QEMU with a debug console in ``console`` until it ends."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is missing: apt install qemu-system-x86")
    return subprocess.run(
        [
            sys.executable, "-m", "kvmsim", "exec", "--memory", mount().path, "--",
            QEMU, "-accel", "kvm", "-nodefaults", "-display", "none", "-no-reboot",
            "-chardev", f"file,id=console,path={console}",
            "-device", f"isa-debugcon,iobase={CONSOLE:#x},chardev=console",
            *map(str, options),
        ],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def test_a_machine_of_qemu_s_runs_its_firmware(mount: Mounter, tmp_path: Path) -> None:
    image, console = tmp_path / "tiny.bin", tmp_path / "console"
    image.write_bytes(firmware(b"here\n"))
    done = qemu(
        mount, console, "-machine", MACHINE, "-cpu", "qemu64", "-m", "16", "-bios", image,
        "-device", f"isa-debug-exit,iobase={EXIT:#x}",
    )  # fmt: skip
    assert done.returncode == STATUS << 1 | 1, done.stderr
    assert console.read_bytes() == b"here\n"


def test_a_pc_looks_for_a_disk(mount: Mounter, tmp_path: Path) -> None:
    """QEMU's own machine and SeaBIOS, which resets at once what it cannot boot."""
    console = tmp_path / "console"
    done = qemu(mount, console, "-m", "32M", "-boot", "reboot-timeout=1")
    assert done.returncode == 0, done.stderr
    said = console.read_text()
    assert "Running on KVM" in said
    assert "No bootable device." in said
