# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/bench prints a whole report and leaves nothing behind.  No time is ever judged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from kvmsim.fence import FenceError
from kvmsim.hostmem import HostMemory

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "scripts/bench"
CALLS = {"fstat", "ftruncate_up", "ftruncate_down", "punch", "allocate", "punch_with_user"}
CROWDS = {"users_64", "files_32", "files_10000"}
RATES = {"files_32", "encrypt_view", "encrypt_backing"}  # and whatever is emulated
UNTIMED = {"healthy_p99", "punch_sparse", "punch_resident"}  # one number a round
CONVERSIONS = {"convert_4k", "convert_2m", "convert_1g"}
EMULATED = {"touch_fresh", "touch_allocated", "guest_count", "guest_memory"} | CONVERSIONS
EXEC_KVM = {"exec_check_extension", "exec_get_regs", "exec_run"}  # beside the kernel's /dev/kvm
EXEC_OTHER = {"exec_getppid", "exec_fionread", "exec_pread"}
WITHOUT_FUSE = ["invalidation", "guest_count", "guest_memory"]
ENCRYPTED = {("encrypt_view", "same"), ("encrypt_backing", "same")}
MPROTECT = {("mprotect_grant", "same"), ("mprotect_punch", "same")}
UFFD = {("uffd_grant", "same"), ("uffd_punch", "same")}

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="the rivals need a C compiler"),
    pytest.mark.skipif(shutil.which("make") is None, reason="the rivals need make"),
]


def command(tmp: Path, *arguments: object) -> tuple[list[str], dict[str, str]]:
    return [str(BENCH), *map(str, arguments)], os.environ | {"TMPDIR": str(tmp)}


def report(tmp: Path, *arguments: object, seconds: float = 110) -> dict[str, Any]:
    argv, environment = command(tmp, "--quick", "--rounds", 2, "--json", "-", *arguments)
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert list(tmp.iterdir()) == [], "the scratch directory is left"
    assert str(tmp) not in Path("/proc/self/mounts").read_text(), "a mount is left"
    return found


def only(*cases: str) -> list[str]:
    return [word for case in cases for word in ("--only", case)]


def check_side(side: dict[str, Any], rounds: int, *, timed: bool) -> None:
    assert side["note"] == ""
    assert len(side["rounds"]) == rounds
    for sample in (side, *side["rounds"]):
        assert sample["p50"] > 0
        if timed:
            assert sample["p99"] >= min(r["p50"] for r in side["rounds"])
        else:
            assert sample["p99"] is None


def check(found: dict[str, Any], rows: set[tuple[str, str]]) -> None:
    """Every row is there once, measured to the end on both sides."""
    assert sorted((r["row"], r["placement"]) for r in found["rows"]) == sorted(rows)
    for row in found["rows"]:
        assert (row["unit"] == "ns") == (row["row"] not in EMULATED | RATES)
        timed = row["unit"] == "ns" and row["row"] not in UNTIMED
        check_side(row["privfs"], 2, timed=timed)
        check_side(row["rival"], 2, timed=timed)
        assert row["rival"]["name"]
        assert row["times_c"] > 0


def test_reports_what_needs_no_mount(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    found = report(tmp_path, "--cpus", cpu, *only(*WITHOUT_FUSE, "fence_mprotect"))
    check(found, {(row, "same") for row in WITHOUT_FUSE} | MPROTECT)
    assert found["schema"] == 1
    assert found["placements"] == {"same": {"caller": cpu, "server": cpu}}
    assert found["machine"]["versions"]["kernel"] == os.uname().release
    assert found["counts"]["rounds"] == 2


@pytest.mark.fuse
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_reports_every_case_on_every_placement(tmp_path: Path) -> None:
    found = report(tmp_path, seconds=380)
    places = ["same", "split"] if len(os.sched_getaffinity(0)) > 1 else ["same"]
    rows = {
        (row, place)
        for row in CALLS | CROWDS | EMULATED | EXEC_OTHER | {"invalidation", "healthy_p99"}
        if not row.startswith("guest_") and row != "convert_1g"
        for place in places
    }
    rows |= {
        (row, "split")
        for row in ("punch_sparse", "punch_resident", "convert_1g")
        if "split" in places
    }
    rows |= {("guest_count", "same"), ("guest_memory", "same")} | MPROTECT | UFFD | ENCRYPTED
    try:
        HostMemory("uffd").close()
    except FenceError:
        rows -= UFFD
        found["rows"] = [r for r in found["rows"] if (r["row"], r["placement"]) not in UFFD]
    beside_kvm = [r for r in found["rows"] if r["row"] in EXEC_KVM]
    found["rows"] = [r for r in found["rows"] if r["row"] not in EXEC_KVM]
    check(found, rows)
    check_exec(beside_kvm, {(row, place) for row in EXEC_KVM for place in places})


def check_exec(found: list[dict[str, Any]], rows: set[tuple[str, str]]) -> None:
    """Ours is measured everywhere; the rival is the machine's own /dev/kvm, or named as missing."""
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        check({"rows": found}, rows)
        return
    assert sorted((r["row"], r["placement"]) for r in found) == sorted(rows)
    for row in found:
        check_side(row["privfs"], 2, timed=True)
        assert "/dev/kvm" in row["rival"]["note"]
        assert row["times_c"] is None


@pytest.mark.fuse
def test_calls_of_an_unmodified_program_are_measured(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    found = report(tmp_path, "--cpus", cpu, *only("exec_kvm", "exec_other"))
    beside_kvm = [r for r in found["rows"] if r["row"] in EXEC_KVM]
    found["rows"] = [r for r in found["rows"] if r["row"] not in EXEC_KVM]
    check_exec(beside_kvm, {(row, "same") for row in EXEC_KVM})
    check(found, {(row, "same") for row in EXEC_OTHER})


@pytest.mark.fuse
def test_mounts_are_measured_and_unmounted(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    found = report(tmp_path, "--cpus", cpu, *only("fallocate", "punch_with_user"))
    check(found, {(row, "same") for row in ("punch", "allocate", "punch_with_user")})


def test_crowds_are_told_and_heard(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    found = report(tmp_path, "--cpus", cpu, *only("users_64", "files_32"))
    check(found, {(row, "same") for row in ("users_64", "files_32")})


def test_a_rival_that_was_not_built_is_named_and_ours_is_measured(tmp_path: Path) -> None:
    scratch, empty = tmp_path / "scratch", tmp_path / "empty"
    scratch.mkdir()
    empty.mkdir()
    cpu = min(os.sched_getaffinity(0))
    found = report(scratch, "--cpus", cpu, "--floors", empty, *only("invalidation"))
    (row,) = found["rows"]
    check_side(row["privfs"], 2, timed=True)
    assert row["rival"]["rounds"] == []
    assert "echo_floor is not built: make -C scripts/bench.d" in row["rival"]["note"]
    assert row["times_c"] is None


def test_the_table_names_what_is_missing(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    floors = tmp_path / "empty"
    floors.mkdir()
    argv, environment = command(
        tmp_path, "--quick", "--rounds", 1, "--cpus", cpu, "--floors", floors, *only("guest_count")
    )  # fmt: skip
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "million instructions/s" in done.stdout
    assert "cpu_floor: cpu_floor is not built" in done.stdout
    assert "guest_count (same)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--cpus", "0,0"], "one or two of the CPUs"),
        (["--cpus", "70000"], "one or two of the CPUs"),
        (["--rounds", "0"], "a number from 1"),
    ],
)
def test_refuses_what_it_cannot_do(tmp_path: Path, arguments: list[str], said: str) -> None:
    argv, environment = command(tmp_path, *arguments)
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.fuse
def test_a_signal_ends_mounts_and_processes(tmp_path: Path) -> None:
    argv, environment = command(tmp_path, "--rounds", 1000, *only("punch_with_user"))
    bench = subprocess.Popen(
        argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 40
        while Path("/proc/self/mounts").read_text().count(str(tmp_path)) < 2:
            assert bench.poll() is None
            assert time.monotonic() < deadline, "neither side was mounted"
            time.sleep(0.05)
        bench.send_signal(signal.SIGTERM)
        bench.communicate(timeout=40)
    finally:
        bench.kill()
        bench.wait()
    assert bench.returncode == 128 + signal.SIGTERM
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert list(tmp_path.iterdir()) == []
