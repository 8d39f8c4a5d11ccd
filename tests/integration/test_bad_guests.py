# SPDX-License-Identifier: GPL-2.0-or-later
"""Impossible ranges, an exhausted budget, guests that crash: each its own error or exit."""

from __future__ import annotations

import errno
import os

import pytest
import torture
from actors import until
from bystander import FREE, LOW, PAGE, RAM, Bystander, fallocate, private_file
from mounts import Mounter

from kvmsim.hostmem import HostMemory

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

# --- ranges and budget -------------------------------------------------------------------------


def test_impossible_ranges(mount: Mounter, host: HostMemory, image: bytes) -> None:
    mounted = mount()
    bystander = Bystander(host, image, mounted)
    punch, keep, top = 3, 1, (1 << 63) - 1
    try:
        before = mounted.stat("bystander")
        for mode, offset, length, code in (
            (punch, 1, PAGE, errno.EINVAL),
            (punch, 0, 1, errno.EINVAL),
            (punch, 0, 0, errno.EINVAL),
            (punch, -PAGE, PAGE, errno.EINVAL),
            (punch, top - PAGE + 1, PAGE, errno.EFBIG),
            (punch, PAGE, top, errno.EFBIG),
            (keep, 0, 0, errno.EINVAL),
            (keep, top - PAGE + 1, PAGE, errno.EFBIG),
            (keep, 1 << 50, PAGE, errno.EINVAL),
        ):
            got = fallocate(bystander.path, mode, offset, length)
            assert got == code, (mode, offset, length, errno.errorcode.get(got))
        after = mounted.stat("bystander")
        assert (after["size"], after["allocated"]) == (before["size"], before["allocated"])
        bystander.check()
    finally:
        bystander.close()


def test_a_budget_that_is_used_up(mount: Mounter, host: HostMemory, image: bytes) -> None:
    mounted = mount("size=4M")
    bystander = Bystander(host, image, mounted)
    try:
        greedy = torture.boot(host, image, path := private_file(mounted, "ram"), label="greedy")
        try:
            assert fallocate(path, 0, 0, RAM) == errno.ENOSPC
            bystander.check()
            greedy.emulator.feed(f"fill {FREE:#x} 1024 7\n".encode())
            outcome = greedy.emulator.wait(60)
            assert outcome is not None
            assert outcome.status == 1
            assert "ENOMEM: no memory for the private page" in outcome.message
            memory = mounted.ask("status")["memory"]
            assert memory["free"] == 0
        finally:
            greedy.close()
        path.unlink()
        until(lambda: mounted.ask("status")["files"] == 1, "end of the file")
        bystander.check()
        bystander.guest.console.command(f"fill {FREE:#x} 256 7")
    finally:
        bystander.close()


# --- guests ------------------------------------------------------------------------------------

#: What a guest does, and how its machine ends.
CRASHES = {
    "triple": "triple fault",
    "jump 0x20000000 shared": "internal error",
    "jump 0x20000000 private": "private access to 0x20000000",
    "peek 0x20000000 private": "private access to 0x20000000",
}


@pytest.mark.parametrize("command", CRASHES)
def test_a_guest_that_crashes(mount: Mounter, host: HostMemory, image: bytes, command: str) -> None:
    mounted = mount()
    bystander = Bystander(host, image, mounted)
    try:
        guest = torture.boot(host, image, path := private_file(mounted, "ram"))
        try:
            guest.emulator.feed(command.encode() + b"\n")
            outcome = guest.emulator.wait(60)
            assert outcome is not None, guest.console.text
            assert outcome.status == 1
            assert CRASHES[command] in outcome.message
            bystander.check()
            assert fallocate(path, 3, 0, RAM) == 0, "a VM that has ended still acknowledges"
            bystander.check()
        finally:
            guest.close()
        torture.boot(host, image, path).close()
        bystander.check()
    finally:
        bystander.close()


def test_a_guest_that_touches_what_a_shrink_took(
    mount: Mounter, host: HostMemory, image: bytes
) -> None:
    mounted = mount()
    bystander = Bystander(host, image, mounted)
    try:
        guest = torture.boot(host, image, path := private_file(mounted, "ram"))
        try:
            guest.console.command(f"poke {FREE:#x} 0x1234")
            os.truncate(path, FREE - LOW)
            bystander.check()
            guest.emulator.feed(f"peek {FREE:#x}\n".encode())
            outcome = guest.emulator.wait(60)
            assert outcome is not None, guest.console.text
            assert outcome.status == 1
            assert f"private access to {FREE:#x}" in outcome.message
            assert "beyond the end of the private file" in outcome.message
            bystander.check()
        finally:
            guest.close()
    finally:
        bystander.close()
