# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmsim`` and the memory of its VMs on a real mount: stat, prealloc, payload, ``holds``."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvmsim_program import KVMSIM, MIB, kvmsim, play
from mounts import Mounted, Mounter

from kvmsim.cli.exitcodes import Exit

pytest_plugins = ["guest_fixtures", "program_fixtures"]
pytestmark = pytest.mark.fuse

SECONDS = 40


@pytest.fixture(autouse=True)
def no_socket_is_left(kernel: Path, tmp_path: Path) -> Iterator[None]:
    yield
    assert list(tmp_path.glob("kvmsim/*")) == []


def test_a_script_sees_double_allocation_and_its_end(mounted: Mounted) -> None:
    """The VM is asked from inside, and from outside by ``kvmsim stat``."""
    done = play(
        mounted,
        """
vm keeps memory=$RAM,size=16M,slots=1 vcpus=1 discard=none
vm frees memory=$RAM,offset=16M,slots=1 vcpus=1 discard=both
expect keeps in private memory
expect frees in private memory
holds keeps both=0 stale=0
holds frees both=0 stale=0

say explicit, away from private memory and back
send keeps poke 0x800000 1 private
expect keeps ok poke
send keeps convert 0x800000 1 shared
expect keeps ok convert
holds keeps both=0 stale=4K
send keeps poke 0x800000 2 shared
expect keeps ok poke
holds keeps both=4K stale=4K
host $KVMSIM stat keeps
output ^Held: +\\d+K private, \\d+(\\.\\d)?[KM] shared, 4K on both, 4K stale$
output ^Conversions: +\\d+ explicit, 0 implicit, 0 refused; 0B discarded \\(discard=none\\)$
host $PRIVFS stat $RAM
output ^Users: +keeps\\(\\d+\\) \\d+K, frees\\(\\d+\\) \\d+K$
output ^Shared: .* kvmsim stat$
host $KVMSIM stat --json keeps | grep '"both": 4096'

send frees poke 0x800000 1 private
expect frees ok poke
send frees poke 0x800000 2 shared
expect frees ok poke
holds frees both=0 stale=0
send frees peek 0x800000 private
expect frees value=0x0$
holds frees both=0 stale=0
host $KVMSIM stat frees
output 2 implicit, 0 refused; [\\d.]+[MG] discarded \\(discard=both\\)
output ^Held: .* 0B on both, 0B stale$

host test $($KVMSIM stat | grep -c '^VM: ') = 2
fails $KVMSIM stat nobody
output no VM nobody; name one of yours: keeps\\(\\d+\\), frees\\(\\d+\\)
stop keeps
host test $($KVMSIM stat | grep -c '^VM: ') = 1
""",
        PRIVFS=f"{sys.executable} -m privfs",
        KVMSIM=" ".join(KVMSIM),
    )
    assert done.returncode == 0, done.stderr
    assert kvmsim("stat").stdout.startswith("no VM is up")


def test_what_is_held_is_compared(mounted: Mounted) -> None:
    done = play(mounted, "vm a memory=$RAM,prealloc=on vcpus=1\nholds both=1\n")
    assert done.returncode == Exit.FAILED
    assert ":2: expected a to hold both=1 bytes, it holds 0" in done.stderr


def test_preallocation_is_told_and_kept(mounted: Mounted) -> None:
    done = kvmsim(
        "boot", "--json", "--memory", f"{mounted.path / 'ram'},size=16M,prealloc=on", text="halt\n"
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    told = [event for event in events if event["event"] == "prealloc"]
    assert [(e["done"], e["total"]) for e in told] == [(0, 16 * MIB), (16 * MIB, 16 * MIB)]
    assert events[len(told)]["event"] == "boot"
    assert events[len(told)]["memory"][0]["prealloc"] is True
    assert mounted.stat("ram")["allocated"] == 16 * MIB


def test_preallocation_is_shown_on_a_terminal(mounted: Mounted) -> None:
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [*KVMSIM, "boot", "--memory", f"{mounted.path / 'ram'},prealloc=on"], input=b"halt\n",
            stdout=subprocess.DEVNULL, stderr=theirs, timeout=SECONDS, check=False,
        )  # fmt: skip
        shown = os.read(ours, 65536).decode()
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.returncode == 0
    path = mounted.path / "ram"
    assert f"\r\x1b[Kkvmsim: vm0: {path}: allocating   0% of 32M" in shown
    assert "allocating 100% of 32M\r\x1b[Kkvmsim: vm0: shared-bit, 2 vCPUs, 32768 KiB" in shown


def test_preallocation_of_more_than_there_is(mount: Mounter) -> None:
    mounted = mount("size=96M")
    mounted.expected_log = "budget|memory"
    with open(mounted.path / "ram", "w") as file:
        os.truncate(file.fileno(), 256 * MIB)
    done = kvmsim("boot", "--memory", f"{mounted.path / 'ram'},prealloc=on")
    assert done.returncode == Exit.MEMORY
    assert done.stderr == (
        f"kvmsim: {mounted.path / 'ram'}: prealloc=on: No space left on device after 64M of 256M, "
        "which were given back; see: privfs status\n"
    )
    assert mounted.stat("ram")["allocated"] == 0
    assert mounted.ask("status")["sessions"] == []
    mounted.audit()


def test_a_payload_is_there_when_the_guest_starts(mounted: Mounted, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(bytes(4096) + b"\x2a" + bytes(6))
    ram = mounted.path / "ram"
    done = kvmsim(
        "boot", "--memory", ram, "--payload", f"{data}@8M", text="peek 0x801000 private\nhalt\n"
    )
    assert done.returncode == 0, done.stderr
    assert "value=0x2a" in done.stdout


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        ("{data}@0x8000", "private payload 0x8000–0x8003: below 0x200000 is low memory"),
        ("{data}.none@8M", ".none: No such file or directory"),
    ],
)
def test_a_payload_that_cannot_be(mounted: Mounted, tmp_path: Path, payload: str, why: str) -> None:
    data = tmp_path / "data"
    data.write_bytes(b"abc")
    done = kvmsim("boot", "--memory", mounted.path / "ram", "--payload", payload.format(data=data))
    assert done.returncode == Exit.IMAGE
    assert why in done.stderr
    assert done.stderr.count("\n") == 1
    assert mounted.ask("status")["sessions"] == []
