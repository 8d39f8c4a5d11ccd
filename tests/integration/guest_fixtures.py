# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines at their prompt, for the tests that talk to the guest kernel."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_vm import GuestVm, small_config

GUESTS = Path(__file__).parents[2] / "scripts" / "guests"


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    for tool in ("gcc", "make", "objcopy"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing: apt install gcc make binutils")
    build = tmp_path_factory.mktemp("guest")
    subprocess.run(
        ["make", "-s", "-C", GUESTS, f"BUILD={build}", "CC=gcc"], check=True, timeout=100
    )
    return (build / "kernel.elf").read_bytes()


@pytest.fixture(scope="module")
def shared_vm(image: bytes) -> Iterator[GuestVm]:
    """One machine at its prompt for the tests that leave it as it was."""
    with GuestVm(small_config()) as vm:
        vm.boot(image)
        vm.until("\n> ")
        yield vm


@pytest.fixture
def vm(image: bytes) -> Iterator[GuestVm]:
    with GuestVm(small_config()) as vm:
        vm.boot(image)
        vm.until("\n> ")
        yield vm
