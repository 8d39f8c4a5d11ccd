# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmsim boot --trace`` on a real mount: a conversion and a punch as the trace tells them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mounts import Mounter

pytest_plugins = ["guest_fixtures"]
pytestmark = pytest.mark.fuse

GPA = 0x800000
SESSION = (
    f"poke {GPA:#x} 5\nconvert {GPA:#x} 4 shared\nconvert {GPA:#x} 4 private\n"
    f"poke {GPA:#x} 5\nhalt 0\n"
)


@pytest.fixture
def memory(mount: Mounter, image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private file of 16 MiB, and the kernel where kvmsim finds it."""
    kernel = tmp_path / "kernel.elf"
    kernel.write_bytes(image)
    monkeypatch.setenv("KVMSIM_KERNEL", os.fspath(kernel))
    path = mount().path / "ram"
    with open(path, "w") as file:
        os.truncate(file.fileno(), 16 << 20)
    return path


def boot(memory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmsim", "boot", f"--memory={memory},slots=1", "--vcpus=1", "-q",
         *options],
        input=SESSION, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_conversion_in_the_kernels_words(memory: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    done = boot(memory, f"--trace={path}")
    assert (done.returncode, done.stderr) == (0, "")
    text = path.read_text()
    first, last = f"{GPA >> 12:#016x}", f"{(GPA >> 12) + 4:#016x}"
    changes = re.findall(rf"kvm_vm_set_mem_attributes: {first} -- {last} \[(\w+)\]", text)
    assert changes == ["0x0", "0x8"]
    assert re.search(rf"kvm_hypercall: nr 0xc a0 {GPA:#x} a1 0x4 a2 0x0 ", text)
    hva = f"{GPA:#016x} -- {GPA + 0x4000:#016x}"
    assert f"kvm_unmap_hva_range: mmu notifier unmap range: {hva}\n" in text
    page = (GPA - 0x200000) >> 12
    punch = rf"unmap range: {page:#016x} -- {page + 4:#016x}\n"
    assert re.search(f"kvmsim_gmem_invalidate: file [0-9a-f]+ {punch}", text)
    faults = re.findall(r"kvm_page_fault: vcpu 0 rip 0x\w+ address (0x\w{16}) error_code", text)
    assert f"{GPA:#018x}" in faults
    assert text.count("kvm_entry:") == text.count("kvm_exit:")


def test_perfetto_and_scripts_can_read_it(memory: Path, tmp_path: Path) -> None:
    chrome, by_line = tmp_path / "trace.json", tmp_path / "lines"
    assert boot(memory, f"--trace={chrome}").returncode == 0
    events = json.loads(chrome.read_text())
    assert {event["ph"] for event in events} == {"M", "X", "i"}
    assert any(event["name"] == "guest" and event["dur"] > 0 for event in events)
    assert any(event["name"] == "kvmsim_page_arrived" and event["ph"] == "X" for event in events)
    assert boot(memory, f"--trace={by_line}", "--trace-format=jsonl").returncode == 0
    names = {json.loads(line)["event"] for line in by_line.read_text().splitlines()}
    assert {"kvm_exit", "kvm_page_fault", "kvmsim_get_page", "kvmsim_drained"} <= names
