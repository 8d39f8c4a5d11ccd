# SPDX-License-Identifier: GPL-2.0-or-later
"""Many ranges converted by one call: the guest kernel under each technology, on a mount."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from booted import Prompt
from mounts import Mounter
from torture import Console

from kvmsim.confidential.platform import Platform
from kvmsim.emulator import Emulator, MemoryBackend, VmConfig
from kvmsim.hostmem import HostMemory
from kvmsim.vmm.bootparams import Technology

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

MIB = 1 << 20
PAGE = 4096
FRESH = 12 * MIB
BATCH = f"batch {FRESH:#x} 1 2 64"
KINDS = (Technology.SHARED_BIT, Technology.SW_PROTECTED, Technology.TDX, Technology.SNP)


@contextlib.contextmanager
def booted(
    technology: Technology, mount: Mounter, host: HostMemory, image: bytes, *, batches: bool = True
) -> Iterator[Prompt]:
    ram = mount().path / "ram"
    ram.touch()
    os.truncate(ram, 16 * MIB)
    config = VmConfig(
        (MemoryBackend(str(ram), slots=1),), vcpus=1, technology=technology, batches=batches
    )
    console = Console()
    emulator = Emulator(host, config, console.output, platform=Platform(host))
    console.emulator = emulator
    try:
        emulator.boot(image)
        console.expect(r"^> ")
        yield Prompt(emulator, console)
    finally:
        emulator.close()


def held(guest: Prompt) -> int:
    """Private pages that the owner holds."""
    return sum(slot.private for slot in guest.emulator.allocated().values())


@pytest.mark.parametrize("technology", KINDS, ids=lambda t: t.kind)
def test_one_call_converts_scattered_pages(
    technology: Technology, image: bytes, mount: Mounter, host: HostMemory
) -> None:
    with booted(technology, mount, host, image) as guest:
        assert guest.ask(f"fill {FRESH:#x} 128 0x77").startswith("ok")
        before, stats = held(guest), guest.emulator.machine.statistics
        assert guest.ask(f"{BATCH} shared").endswith("ranges=64 done=64 side=shared")
        assert held(guest) == before - 64
        assert guest.number(f"peek {FRESH:#x} shared", "value") == 0
        assert guest.number(f"peek {FRESH + PAGE:#x}", "value") == 0x77, (
            "in between nothing happens"
        )
        assert guest.ask(f"poke {FRESH:#x} 5 shared").startswith("ok")
        batches, calls, ranges = stats.batches, stats.hypercalls, stats.conversions_explicit
        assert guest.ask(f"{BATCH} private").endswith("ranges=64 done=64 side=private")
        assert stats.batches == batches + 1
        assert stats.hypercalls == calls + 1
        assert stats.conversions_explicit == ranges + 64
        assert guest.number(f"peek {FRESH:#x}", "value") == 0
        assert guest.number(f"peek {FRESH + 127 * PAGE:#x}", "value") == 0x77
        assert guest.ask(f"{BATCH} shared").endswith("done=64 side=shared")
        assert guest.number(f"peek {FRESH:#x} shared", "value") == 0, "both sides were given back"
        assert guest.ask("halt 0").startswith("ok")


def test_neighbours_are_one_conversion(image: bytes, mount: Mounter, host: HostMemory) -> None:
    with booted(Technology.SHARED_BIT, mount, host, image) as guest:
        assert guest.ask(f"fill {FRESH:#x} 128 0x77").startswith("ok")
        stats, vm = guest.emulator.machine.statistics, guest.emulator.running.vm
        explicit, invalidations = stats.conversions_explicit, vm.statistics().invalidations
        assert guest.ask(f"batch {FRESH:#x} 2 2 64 shared").endswith("done=64 side=shared")
        assert stats.conversions_explicit == explicit + 1
        # the attributes, and what comes back from the owner for the punch
        assert vm.statistics().invalidations == invalidations + 2
        past = guest.ask(f"batch {16 * MIB:#x} 1 2 64 private")
        assert "done=64" in past, "RAM goes on above its shared low memory"
        for line, message in (
            (f"batch {17 * MIB + 512 * 1024:#x} 64 64 16 private", "done=2 side=private"),
            (f"batch {18 * MIB:#x} 1 1 4 private", "the VMM answered -22"),
            (f"batch {FRESH + 1:#x} 1 1 4 shared", "the VMM answered -22"),
            (f"batch {FRESH:#x} 2 1 4 shared", "overlap"),
            (f"batch {FRESH:#x} 1 1 171 shared", "1 to 170"),
            ("batch 0x100000 1 512 9 shared", "the kernel lives there"),
        ):
            assert message in guest.ask(line)


def test_it_is_off_by_default(image: bytes, mount: Mounter, host: HostMemory) -> None:
    with booted(Technology.SHARED_BIT, mount, host, image, batches=False) as guest:
        assert "the VMM answered -1000" in guest.ask(f"{BATCH} shared")
        assert guest.emulator.machine.statistics.batches == 0


@pytest.mark.parametrize("technology", [Technology.TDX, Technology.SNP], ids=lambda t: t.kind)
@pytest.mark.parametrize("batches", [False, True])
def test_the_calls_of_a_confidential_guest_go_as_lists(
    technology: Technology, batches: bool, image: bytes, mount: Mounter, host: HostMemory
) -> None:
    """TDVMCALL<MapGPA> and the PSC list: the same for the guest, another exit for the VMM."""
    with booted(technology, mount, host, image, batches=batches) as guest:
        stats = guest.emulator.machine.statistics
        before, explicit = stats.batches, stats.conversions_explicit
        assert guest.ask(f"fill {10 * MIB:#x} 1024 9").startswith("ok")
        assert guest.ask(f"convert {10 * MIB:#x} 1024 shared").startswith("ok")
        assert (stats.batches > before) is batches
        # MapGPA goes by 2 MiB, which join in a list; large entries of a PSC list join anyway.
        chunks = 2 if technology is Technology.TDX and not batches else 1
        assert stats.conversions_explicit == explicit + chunks
        assert guest.number(f"peek {10 * MIB:#x} shared", "value") == 0
        assert guest.ask(f"convert {10 * MIB:#x} 1024 private").startswith("ok")
        assert guest.number(f"peek {14 * MIB - 8:#x}", "value") == 0
