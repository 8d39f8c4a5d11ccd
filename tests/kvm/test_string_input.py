# SPDX-License-Identifier: GPL-2.0-or-later
"""REP INS: how many elements a port is asked for at once, and where they go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvmsim import exits
from kvmsim.api import Kvm, Simulation
from kvmsim.api.transport import Transport

CODE, MEMORY, PORT = 0x1000, 0x10000, 0x60
INSB, INSW, INSD = "f36c", "f36d", "66f36d"
CLD_STD = {False: "fc", True: "fd"}

Devices = Callable[[], "str | Transport"]


@pytest.fixture(params=[pytest.param("real", marks=pytest.mark.kvm), "simulated"])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> str | Transport:
    return "/dev/kvm" if request.param == "real" else Simulation(tmp_path)


def data(at: int, length: int) -> bytes:
    return bytes(1 + index % 251 for index in range(at, at + length))


def stored(size: int, total: int, rdi: int, *, backwards: bool) -> dict[int, bytes]:
    """Where each element goes in 16-bit code."""
    step = -size if backwards else size
    return {
        (rdi + index * step) & 0xFFFF: data(index * size, size) for index in range(total)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "size", "rcx", "rdi", "backwards", "counts"),
    [
        (INSB, 1, 16, 0x2000, False, [16]),
        (INSW, 2, 16, 0x2000, False, [16]),
        (INSD, 4, 1000, 0x2000, False, [256, 256, 256, 232]),
        (INSB, 1, 3000, 0x2FFD, False, [3, 1024, 1024, 949]),
        (INSD, 4, 8, 0x2FFC, False, [4, 4]),  # bytes that are left of the page, taken for elements
        (INSW, 2, 8, 0x2FFD, False, [3, 5]),
        (INSB, 1, 16, 0x2100, True, [16]),
        (INSB, 1, 16, 0x2005, True, [5, 1, 10]),
        (INSW, 2, 16, 0x2004, True, [4, 12]),
        (INSB, 1, 5, 0xFFFD, False, [3, 2]),  # the offset wraps
        (INSB, 1, 0x10005, 0x2000, False, [5]),  # only CX counts
        ("67" + INSB, 1, 5, 0x2FFE, False, [2, 3]),
        ("f26c", 1, 5, 0x2000, False, [5]),  # REPNE is REP
        ("6c", 1, 5, 0x2000, False, [1]),
        (INSB, 1, 0, 0x2000, False, []),
    ],
)
def test_elements(
    device: str | Transport,
    code: str,
    size: int,
    rcx: int,
    rdi: int,
    backwards: bool,
    counts: list[int],
) -> None:
    with Kvm(device) as kvm, kvm.create_vm() as vm:
        memory = kvm.allocate(MEMORY)
        vm.add_slot(0, memory)
        program = bytes.fromhex(CLD_STD[backwards] + code + "f4")
        memory.write(CODE, program)
        vcpu = vm.create_vcpu()
        sregs = vcpu.sregs
        flat = {
            name: replace(getattr(sregs, name), base=0, selector=0)
            for name in ("cs", "ds", "es", "ss")
        }
        vcpu.sregs = replace(sregs, **flat)
        vcpu.regs = replace(vcpu.regs, rip=CODE, rdx=PORT, rcx=rcx, rdi=rdi)
        seen, total = [], 0
        while isinstance(left := vcpu.run(), exits.IoExit):
            assert left == exits.IoExit(PORT, size, False, count=left.count)
            vcpu.complete(data(total * size, size * left.count))
            seen.append(left.count)
            total += left.count
        assert left == exits.HltExit()
        assert seen == counts
        expected = bytearray(MEMORY)
        expected[CODE : CODE + len(program)] = program
        for at, element in stored(size, total, rdi, backwards=backwards).items():
            expected[at : at + size] = element
        assert memory.read(0, MEMORY) == expected
        regs = vcpu.regs
        assert regs.rip == CODE + len(program)
        assert regs.rcx == rcx - (total if code != "6c" else 0)
