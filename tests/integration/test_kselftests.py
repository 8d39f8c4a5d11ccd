# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/kselftests judges and reports what it ran; the programs here only end as tests do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/kselftests"
PROGRAMS = {
    "guest_memfd_test": "test -f /dev/kvm || exit 1",  # KVM's own is no regular file
    "pre_fault_memory_test": "echo '1..0 # SKIP - Requirement not met: a | b'; exit 4",
    "x86_64/private_mem_kvm_exits_test": "echo '  a message' >&2; exit 254",
    "x86/private_mem_conversions_test": "kill -SEGV $$",
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(
        [*map(str, argv)], capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.fuse
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="kvmsim exec answers x86-64's ioctls")
def test_reports_what_became_of_each(tmp_path: Path) -> None:
    for name, script in PROGRAMS.items():
        program = tmp_path / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    done = run("--reuse", tmp_path, "--times", 1, "--json")
    assert done.returncode == 1, done.stderr  # one failed
    report = json.loads(done.stdout)
    assert report["kernel"] == os.uname().release
    found = {row["test"]: row for row in report["rows"]}
    inside = {name: (row["exec"], row["exec"]["reasons"]) for name, row in found.items()}
    for name, outcome, reasons in (
        ("guest_memfd_test", "pass", []),
        ("pre_fault_memory_test", "skip", ["Requirement not met: a | b"]),
        ("private_mem_kvm_exits_test", "fail", ["a message"]),
        ("private_mem_conversions_test", "fail", ["ended by SIGSEGV"]),
    ):
        counts, why = inside.pop(name)
        assert {one: counts[one] for one in ("pass", "skip", "fail")} == {
            "pass": 0, "skip": 0, "fail": 0, outcome: 1,
        }  # fmt: skip
        assert why == reasons
        assert counts["seconds"] > 0
    assert inside == {}
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        assert found["guest_memfd_test"]["real"]["outcome"] == "fail"
        assert found["pre_fault_memory_test"]["real"]["outcome"] == "skip"
    else:
        assert all(row["real"] is None for row in found.values())


def test_says_that_there_is_nothing_to_run(tmp_path: Path) -> None:
    done = run("--reuse", tmp_path)
    assert done.returncode == 2
    assert "holds none of guest_memfd_test" in done.stderr
