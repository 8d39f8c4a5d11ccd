# SPDX-License-Identifier: GPL-2.0-or-later
"""Confidential guests (:class:`booted.Guest`) that end with the test."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from booted import AT, PAGES, RAM, WORD, Boot, Guest
from mounts import Mounted
from torture import Console

from hwemu.encryptedaccess import Encrypt
from kvmsim.confidential.platform import Platform
from kvmsim.emulator import Emulator, MemoryBackend, VmConfig
from kvmsim.hostmem import HostMemory
from kvmsim.vmm.bootparams import Technology


@pytest.fixture
def moving() -> Iterator[HostMemory]:
    """A host that would let the memory of its guests be moved."""
    made = HostMemory(movable=True)
    yield made
    made.close()


@pytest.fixture
def boot(mounted: Mounted, image: bytes) -> Iterator[Boot]:
    """Boot a guest with two vCPUs; ``size`` is that of its file."""
    with contextlib.ExitStack() as stack:

        def start(
            host: HostMemory,
            technology: Technology,
            encrypt: Encrypt | None = Encrypt.VIEW,
            *,
            size: int = RAM,
        ) -> Guest:
            ram = mounted.path / "ram"
            ram.touch()
            os.truncate(ram, size)
            platform = Platform(host)
            memory = MemoryBackend(str(ram), size=RAM, prealloc=True)  # accepted by 2 MiB
            config = VmConfig((memory,), 2, technology=technology, encrypt=encrypt)
            console = Console()
            emulator = Emulator(host, config, console.output, platform=platform)
            closing = stack.enter_context(contextlib.ExitStack())
            closing.callback(emulator.close)
            console.emulator = emulator
            emulator.boot(image)
            console.expect(r"^> ")
            guest = Guest(emulator, console, ram, platform, closing.close)
            assert guest.ask(f"fill {AT:#x} {PAGES} {WORD:#x}").startswith("ok")
            return guest

        yield start
