# SPDX-License-Identifier: GPL-2.0-or-later
"""A VMM in C that launches confidential guests on the simulated /dev/kvm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mounts import Mounter

pytest_plugins = ["twin_fixtures"]
pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64",
                       reason="the program's ioctls are x86-64's"),
]  # fmt: skip


_CALLS = {"td": "tdcall", "snp": "vmgexit"}


@pytest.mark.parametrize("kind", ["td", "snp"])
def test_a_vmm_in_c_launches_confidential_guests(
    twins: Path, kind: str, mount: Mounter, tmp_path: Path
) -> None:
    trace = tmp_path / "vm.txt"
    memory = mount("personality=guest_memfd").path
    command = [sys.executable, "-m", "kvmsim", "exec", "--memory", os.fspath(memory)]
    command += ["--trace", os.fspath(trace)]
    done = subprocess.run(
        [*command, "--", twins / "coco", kind], capture_output=True, text=True, timeout=90,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
    assert f"reason {_CALLS[kind]} " in trace.read_text()
