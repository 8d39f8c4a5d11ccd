# SPDX-License-Identifier: GPL-2.0-or-later
"""Conversion in place through the Python API and under kvmsim exec."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from mounts import Mounter

from kvmsim.api import ConversionError, IoctlError, Kvm, Simulation
from kvmsim.uapi import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_X86_SW_PROTECTED_VM,
    PAGE_SIZE,
)

pytestmark = pytest.mark.fuse
ROOT = Path(__file__).parents[2]
MAPPABLE = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED

# What a program with nothing but ioctl(2) sees; kvmsim is not imported.
PROGRAM = r"""
import ctypes, fcntl, os, struct
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 1)
print("cap", fcntl.ioctl(vm, 0xAE03, 250), fcntl.ioctl(vm, 0xAE03, 233))
create = bytearray(struct.pack("<QQ48x", 16 * 4096, 3))
gmem = fcntl.ioctl(vm, 0xC040AED4, create)
def convert(fd, offset, size, attributes, flags=2):
    asked = bytearray(struct.pack("<16Q", offset, size, attributes, flags, 0x77, *[0] * 11))
    try:
        answer = fcntl.ioctl(fd, 0xC080AED2, asked)
    except OSError as error:
        answer = error.errno
    return answer, struct.unpack_from("<Q", asked, 32)[0]
print("private", *convert(gmem, 0, 4096, 8))
print("duplicate", *convert(os.dup(gmem), 0, 16 * 4096, 0))
print("unaligned", *convert(gmem, 4097, 4096, 8))
print("not private", *convert(gmem, 4096, 4096, 1))
print("contents", *convert(gmem, 8192, 4096, 8, 1))
print("a vm", *convert(vm, 0, 4096, 8))
"""


def test_the_example_of_the_documentation(mount: Mounter) -> None:
    folder = mount("personality=guest_memfd").path
    text = (ROOT / "docs/inplace.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    names = {
        "Kvm": Kvm, "Simulation": Simulation, "ConversionError": ConversionError, "errno": errno,
        "KVM_X86_SW_PROTECTED_VM": KVM_X86_SW_PROTECTED_VM, "folder": folder,
        "GUEST_MEMFD_FLAG_MMAP": GUEST_MEMFD_FLAG_MMAP,
        "GUEST_MEMFD_FLAG_INIT_SHARED": GUEST_MEMFD_FLAG_INIT_SHARED,
    }  # fmt: skip
    exec(example, names)


def test_what_a_vmm_meets(mount: Mounter) -> None:
    folder = mount("personality=guest_memfd").path
    with Kvm(Simulation(folder, in_place=True)) as kvm:
        vm = kvm.create_vm(KVM_X86_SW_PROTECTED_VM)
        file = vm.create_guest_memfd(16 * PAGE_SIZE, MAPPABLE)
        slot = vm.add_slot(1 << 20, guest_memfd=file, offset=4 * PAGE_SIZE)
        slot.write((1 << 20) + 5, b"seen by both")
        view = file.map(4 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert view.read(5, 12) == b"seen by both"

        pages = file.pin(4 * PAGE_SIZE, PAGE_SIZE)
        with pytest.raises(ConversionError) as caught:
            vm.convert(1 << 20, 4 * PAGE_SIZE, private=True)
        assert (caught.value.errno, caught.value.error_offset) == (errno.EAGAIN, 4 * PAGE_SIZE)
        assert pages.held
        pages.close()
        assert not pages.held
        vm.convert(1 << 20, PAGE_SIZE, private=True)
        for touch in (lambda: slot.read(1 << 20, 1), lambda: view.write(0, b"x")):
            with pytest.raises(IoctlError, match="the index is private") as refused:
                touch()
            assert refused.value.errno == errno.EFAULT
        view.write(PAGE_SIZE, b"the next page is shared")
        file.discard(5 * PAGE_SIZE, PAGE_SIZE)
        assert view.read(PAGE_SIZE, 8) == bytes(8)
        with pytest.raises(IoctlError, match="bytes"):
            view.read(2 * PAGE_SIZE, 1)
        view.close()
        with pytest.raises(IoctlError, match="unmapped"):
            view.read(0, 1)

        plain = vm.create_guest_memfd(PAGE_SIZE, GUEST_MEMFD_FLAG_INIT_SHARED)
        for use in (plain.map, lambda: plain.pin(0, PAGE_SIZE)):
            with pytest.raises(IoctlError, match="GUEST_MEMFD_FLAG_MMAP") as refused:
                use()
            assert refused.value.errno == errno.ENODEV
    with Kvm(Simulation(folder)) as kvm:
        file = kvm.create_vm(KVM_X86_SW_PROTECTED_VM).create_guest_memfd(PAGE_SIZE)
        with pytest.raises(ConversionError, match="ENOTTY"):
            file.convert(0, PAGE_SIZE, private=True)
        with pytest.raises(IoctlError, match="do not convert in place"):
            file.pin(0, PAGE_SIZE)


@pytest.mark.kvm
def test_the_kernel_has_none() -> None:
    with Kvm() as kvm:
        file = kvm.create_vm().create_guest_memfd(PAGE_SIZE)
        with pytest.raises(ConversionError) as caught:
            file.convert(0, PAGE_SIZE, private=True)
        assert caught.value.errno == errno.ENOTTY


def test_a_program_that_knows_nothing_of_us(mount: Mounter) -> None:
    folder = mount("personality=guest_memfd").path
    command = [
        sys.executable, "-m", "kvmsim", "exec", "--in-place", f"--memory={folder}", "--",
        sys.executable, "-c", PROGRAM,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "cap 8 0",
        "private 0 119",
        "duplicate 0 119",
        f"unaligned {errno.EINVAL} 4097",
        f"not private {errno.EINVAL} 4096",
        f"contents {errno.EOPNOTSUPP} 8192",
        f"a vm {errno.ENOTTY} 119",
    ]
