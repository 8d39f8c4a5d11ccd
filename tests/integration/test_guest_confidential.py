# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest kernel on private files of a mount, under the processors that hwemu models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from booted import Prompt
from mounts import Mounter
from torture import Console

from kvmsim.confidential.platform import Platform
from kvmsim.diskfile import FileDisk
from kvmsim.emulator import Emulator, MemoryBackend, VmConfig
from kvmsim.hostmem import HostMemory
from kvmsim.vmm.bootparams import BootFlag, Technology

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

MIB = 1 << 20
FRESH = 12 * MIB
PAGE = 4096


@contextlib.contextmanager
def booted(
    technology: Technology,
    mount: Mounter,
    host: HostMemory,
    image: bytes,
    disk: Path,
    flags: BootFlag = BootFlag.NONE,
) -> Iterator[Prompt]:
    ram = mount().path / "ram"
    ram.touch()
    os.truncate(ram, 16 * MIB)
    disk.write_bytes(bytes(MIB))
    config = VmConfig((MemoryBackend(str(ram)),), technology=technology, flags=flags)
    console = Console()
    with FileDisk(disk) as opened:
        emulator = Emulator(host, config, console.output, platform=Platform(host), disk=opened)
        console.emulator = emulator
        try:
            emulator.boot(image)
            console.expect(r"^> ")
            yield Prompt(emulator, console)
        finally:
            emulator.close()


@pytest.mark.parametrize(
    "technology",
    [Technology.SW_PROTECTED, Technology.TDX, Technology.SNP, Technology.PKVM],
    ids=lambda t: t.kind,
)
def test_a_guest_lives(
    technology: Technology, mount: Mounter, host: HostMemory, image: bytes, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    kept = 5 if technology is Technology.PKVM else 0  # what a conversion leaves of a page
    with booted(technology, mount, host, image, disk) as guest:
        assert f"name={technology.kind} " in guest.ask("tech")
        if technology.accepts:
            assert guest.number("info", "unaccepted") == 10 * MIB
            assert "#V" in guest.ask(f"touch {FRESH:#x}")
        assert guest.ask(f"poke {FRESH:#x} 5").startswith("ok")
        assert guest.number(f"peek {FRESH:#x}", "value") == 5
        assert guest.ask(f"convert {FRESH:#x} 3 shared").startswith("ok")
        assert guest.number(f"peek {FRESH:#x} shared", "value") == kept
        assert guest.ask(f"convert {FRESH:#x} 3 private").startswith("ok")
        assert guest.number(f"peek {FRESH:#x}", "value") == kept
        assert guest.number("test 0x800000 64", "errors") == 0
        assert guest.number("port 0x80", "value") == 0xFF
        assert guest.number("peek 0x20000000 shared", "value") == (1 << 64) - 1
        assert guest.ask("fill 0xa00000 70 7").startswith("ok")
        assert guest.ask("bounce write 0xa00000 70 0").startswith("ok")
        assert disk.read_bytes() == ((7).to_bytes(8, "little") * 512 * 70).ljust(MIB, b"\0")
        assert guest.ask("fill 0xa00000 70 0").startswith("ok")
        assert guest.ask("bounce read 0xa00000 70 0").startswith("ok")
        assert guest.number("sum 0xa00000 70", "sum") == 7 * 512 * 70
        if technology.accepts:
            assert guest.ask("accept 0xa00000 1") == (
                "error accept: page 0xa00000: already accepted"
            )
            assert guest.number("report 00ff", "bytes") >= 1024


@pytest.mark.parametrize("technology", [Technology.TDX, Technology.SNP], ids=lambda t: t.kind)
def test_an_eager_guest_accepts_everything(
    technology: Technology, mount: Mounter, host: HostMemory, image: bytes, tmp_path: Path
) -> None:
    flags = BootFlag.EAGER | BootFlag.SELFTEST
    with booted(technology, mount, host, image, tmp_path / "disk", flags) as guest:
        assert guest.number("info", "unaccepted") == 0
        assert guest.number("info", "accepted") == 14 * MIB
