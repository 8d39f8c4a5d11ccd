# SPDX-License-Identifier: GPL-2.0-or-later
"""Helper processes that end with the test, and what they need."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from actors import Actor, Cast

from kvmsim.emulator import prepare_process
from kvmsim.hostmem import HostMemory


@pytest.fixture(scope="session")
def vm_kernel(image: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the guest kernel as a file, for vm_process.py."""
    path = tmp_path_factory.mktemp("kernel") / "kernel.elf"
    path.write_bytes(image)
    return path


@pytest.fixture
def actor(mount: object) -> Iterator[Cast]:
    """Return a function that starts an :class:`Actor`; they end before the mounts do."""
    cast: list[Actor] = []

    def start(program: str | Path, *arguments: str | os.PathLike[str]) -> Actor:
        cast.append(Actor(program, *arguments))
        return cast[-1]

    try:
        yield start
    finally:
        for one in cast:
            one.close()


@pytest.fixture
def host() -> Iterator[HostMemory]:
    """Make this process fit to be an emulator."""
    yield from _host("auto")


@pytest.fixture
def unfenced() -> Iterator[HostMemory]:
    """The same, with nothing that would keep a forgotten flush from doing harm."""
    yield from _host("none")


def _host(fence: str) -> Iterator[HostMemory]:
    interval = sys.getswitchinterval()
    prepare_process()
    host = HostMemory(fence)
    yield host
    host.close()
    sys.setswitchinterval(interval)
