# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests of every kind as a person boots them: ``kvmsim boot`` and scripts, on a real mount."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from kvmsim_program import KVMSIM, MIB, kvmsim, play
from mounts import Mounted

from kvmsim.cli.exitcodes import Exit
from kvmsim.scriptvalues import KINDS

pytest_plugins = ["guest_fixtures", "program_fixtures"]
pytestmark = [pytest.mark.fuse, pytest.mark.usefixtures("kernel")]

UNIT = 2 * MIB
ASK = "info\nbounce write 0x1000000 1 8\nhalt 5\n"


def sized(mounted: Mounted, name: str, size: int) -> Path:
    path = mounted.path / name
    with open(path, "w") as file:
        os.truncate(file.fileno(), size)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_guest_of_every_kind_boots_and_reaches_its_disk(
    kind: str, mounted: Mounted, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"\xee" * MIB)
    memory = f"{mounted.path}/ram,prealloc=on"
    text = "fill 0x1000000 1 0x1122334455667788\n" + ASK
    done = kvmsim("boot", "--memory", memory, "--kind", kind, "--disk", disk, "--vcpus", "1",
                  "--eager", text=text)  # fmt: skip
    assert done.returncode == 5, done.stdout + done.stderr
    assert f"vm0: {kind}, 1 vCPUs" in done.stderr
    assert re.search(r"ok info .* unaccepted=0$", done.stdout, re.MULTILINE)
    data = disk.read_bytes()
    assert data[8 * 512 :][:4096] == bytes.fromhex("8877665544332211") * 512
    assert data[: 8 * 512] + data[8 * 512 + 4096 :] == b"\xee" * (MIB - 4096)


def test_guests_of_two_kinds_share_one_host(mounted: Mounted, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    sized(mounted, "b", 16 * MIB)
    sized(mounted, "c", 16 * MIB)
    done = play(
        mounted,
        "vm a memory=$RAM kind=tdx vcpus=1 disk=$DISK\n"
        "vm b memory=$DIR/b kind=snp vcpus=1\n"
        "vm c memory=$DIR/c kind=tdx vcpus=1\n"
        "expect a in private memory\nexpect b in private memory\nexpect c in private memory\n"
        "send a bounce write 0x1000000 1 0\nexpect a ok bounce\n"
        f"host {shlex.join(KVMSIM)} stat\n"
        "output ^Kind: +tdx \\(TDX\n"
        "output ^mrtd: +[0-9a-f]{96}$\n"
        "output ^measurement: +[0-9a-f]{96}$\n"
        "send a halt\nsend b halt 3\nsend c halt\n"
        "wait a\nwait b status 3\nwait c\n",
        DISK=disk,
    )
    assert done.returncode == 0, done.stderr


def test_the_boot_event_says_the_kind(mounted: Mounted) -> None:
    memory = f"{mounted.path}/ram"
    done = kvmsim("boot", "--memory", memory, "--kind", "snp", "--json", text="halt\n")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert next(e for e in events if e["event"] == "boot")["kind"] == "snp"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("", "truncate -s 6144K {path}, or give size=4M"),
        (",size=3M", "3145728 bytes are no multiple of that; give size=2M"),
        (",offset=2M", "truncate -s 6144K {path}, or give size=2M"),
        (",size=1M", "no multiple of that; give size=32M"),
    ],
)
def test_memory_that_cannot_be_accepted_by_units(options: str, why: str, mounted: Mounted) -> None:
    path = sized(mounted, "odd", 5 * MIB)
    done = kvmsim("boot", "--memory", f"{path}{options}", "--kind", "tdx")
    assert done.returncode == Exit.MEMORY
    assert "a tdx guest accepts memory by 2 MiB" in done.stderr
    assert why.format(path=path) in done.stderr
    assert done.stderr.count("\n") == 1


def test_disks_that_cannot_be(mounted: Mounted, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"x")
    for path, why in (
        (tmp_path / "none", "make it with: truncate -s 1M"),
        (tmp_path, "disk"),
        (short, "shorter than a sector of 512 bytes"),
    ):
        done = kvmsim("boot", "--memory", mounted.path / "ram", "--disk", path)
        assert done.returncode == Exit.USAGE
        assert why in done.stderr
        assert done.stderr.count("\n") == 1


def test_memory_that_is_too_small_for_the_kernel(mounted: Mounted) -> None:
    path = sized(mounted, "small", UNIT)
    done = kvmsim("boot", "--memory", path, "--kind", "tdx", "--timeout", "20")
    assert done.returncode not in (0, Exit.INTERNAL, Exit.TIMEOUT), done.stderr
    assert "ReportFatalError> code 0x0: no private-capable RAM range with room" in done.stderr
