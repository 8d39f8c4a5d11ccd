# SPDX-License-Identifier: GPL-2.0-or-later
"""What the program ``kvmsim`` needs: the guest kernel that it finds, and memory for its VMs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kvmsim_program import MIB
from mounts import Mounted, Mounter


@pytest.fixture
def kernel(image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guest kernel that kvmsim finds by itself, and a runtime directory."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.fspath(tmp_path))
    path = tmp_path / "kernel.elf"
    path.write_bytes(image)
    monkeypatch.setenv("KVMSIM_KERNEL", os.fspath(path))
    return path


@pytest.fixture
def mounted(mount: Mounter) -> Mounted:
    """A mount with a file ``ram`` of 32 MiB."""
    made = mount()
    with open(made.path / "ram", "w") as file:
        os.truncate(file.fileno(), 32 * MIB)
    return made
