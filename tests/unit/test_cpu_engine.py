# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine proves at start that it is the build whose inner layout is known."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator

import pytest
from unicorn import x86_const

from hwemu.arena import Arena, ArenaRangeError
from hwemu.cpu import rawcontext, vmcb
from hwemu.cpu.api import HltExit
from hwemu.cpu.engine import QUANTUM
from hwemu.cpu.rawcontext import EngineMismatchError, find_no_exit_request, find_state, peek
from hwemu.cpu.unicorn_svm import SvmCpu
from hwemu.stage2 import RangeError, Stage2
from hwemu.testing import HEAP, POOL_HPA, Machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


def another(machine: Machine) -> SvmCpu:
    return SvmCpu(machine.arena, machine.pool, POOL_HPA, machine.stage2.root_hpa)


def test_another_version_is_refused_by_name(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hwemu.cpu.engine.unicorn.__version__", "2.1.5")
    with pytest.raises(EngineMismatchError, match=r"Unicorn 2\.1\.5.*unicorn==2\.1\.4"):
        another(machine)


def test_a_processor_model_without_svm_is_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other models drop EFER.SVME silently."""
    monkeypatch.setattr(x86_const, "UC_CPU_X86_EPYC", x86_const.UC_CPU_X86_HASWELL)
    with pytest.raises(EngineMismatchError, match="EFER"):
        another(machine)


def test_other_exit_numbers_are_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmcb, "EXIT_NPF", 0x401)
    with pytest.raises(EngineMismatchError, match=r"empty guest: exits \[1280\]"):
        another(machine)


def test_a_moved_fault_address_is_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vmcb, "EXIT_INFO_2", 0x78)
    with pytest.raises(EngineMismatchError, match="faulting address"):
        another(machine)


def test_moved_fields_are_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, what in (("_CPU_CFLAGS_NEXT_TB", "cflags_next_tb"), ("VM_VMCB", "vm_vmcb")):
        with monkeypatch.context() as patch:
            patch.setattr(rawcontext, name, getattr(rawcontext, name) + 4)
            with pytest.raises(EngineMismatchError, match=what):
                another(machine)


def test_registers_that_are_not_there_are_not_found(machine: Machine) -> None:
    handle = machine.cpu._engine._uc._uch.value
    with pytest.raises(EngineMismatchError, match="found 0 times"):
        find_state(handle, tuple(range(100, 116)), "2.1.4")


def test_stop_byte_is_found_exactly_once_or_not_at_all(machine: Machine) -> None:
    handle = machine.cpu._engine._uc._uch.value
    byte = find_no_exit_request(handle, "2.1.4")
    assert handle < byte < handle + 4096
    assert peek(byte, 1) == b"\x01", "set by the engine"
    copy = ctypes.create_string_buffer(peek(handle, 4096), 4096)
    address = ctypes.addressof(copy)
    assert find_no_exit_request(address, "2.1.4") - address == byte - handle
    anchor = copy.raw.find(struct.pack("<II", 4096, 4095))
    ctypes.memmove(address + 64, address + anchor, 64)
    with pytest.raises(EngineMismatchError, match="found 2 times"):
        find_no_exit_request(address, "2.1.4")
    ctypes.memset(address, 0, 4096)
    with pytest.raises(EngineMismatchError, match="found 0 times"):
        find_no_exit_request(address, "2.1.4")


def test_peek_at_nothing_is_empty_and_no_signal() -> None:
    assert peek(0x10, 64) == b""
    assert peek((1 << 47) - 4096, 8) == b""


def test_slices_do_not_need_the_stop_byte(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(handle: int, version: str) -> int:
        raise EngineMismatchError(version, "gone")

    monkeypatch.setattr(rawcontext, "find_no_exit_request", missing)
    with pytest.raises(EngineMismatchError, match="gone"):
        another(machine)
    with Machine(precise="quanta") as sliced:
        # dec rcx; jnz; hlt: more than one slice
        cpu = sliced.boot(bytes.fromhex("48 ff c9 75 fb f4"), rcx=2 * QUANTUM)
        assert cpu.run() == HltExit()


def test_nothing_writes_the_tables_but_we(machine: Machine) -> None:
    """The engine would set accessed bits with a 32-bit store of its own."""
    cpu = machine.boot(bytes.fromhex("48 ff 06 f4"), rsi=HEAP)
    assert cpu.run() == HltExit()
    before = bytes(machine.pool[: 64 * 4096])
    machine.boot(bytes.fromhex("48 ff 06 f4"), rsi=HEAP)
    assert cpu.run() == HltExit()
    assert bytes(machine.pool[: 64 * 4096]) == before


def test_pages_that_are_not_executable_may_hold_page_tables(machine: Machine) -> None:
    """With NX in the entry the engine would follow a null pointer here."""
    for page in (0x1000, 0x2000, 0x3000):
        machine.stage2.map(page, machine.hpa + page, 1, executable=False)
    assert machine.boot(b"\xf4").run() == HltExit()


def test_host_physical_space_ends_at_two_to_the_forty(machine: Machine) -> None:
    with pytest.raises(ArenaRangeError, match=r"2\*\*40"):
        Arena(size=1 << 39, hpa_base=(1 << 39) + 4096)
    with pytest.raises(RangeError, match=r"2\*\*40"):
        Stage2(machine.pool, 1 << 40)
    with pytest.raises(RangeError, match=r"2\*\*40"):
        machine.stage2.map(0, 1 << 40, 1)


def test_a_misaligned_pool_is_refused(machine: Machine) -> None:
    pool = memoryview(machine.pool)[8 : 8 + 4096 * 8]
    with pytest.raises(ValueError, match="page boundary"):
        SvmCpu(machine.arena, pool, POOL_HPA, POOL_HPA)
    pool.release()


def test_engines_give_back_what_they_took() -> None:
    """Open and close many: memory, mappings and descriptors stay where they were."""

    def mappings() -> int:
        with open("/proc/self/maps") as maps:
            return sum(1 for _ in maps)

    def cycle(count: int) -> None:
        for _ in range(count):
            with Machine(size=1 << 20) as machine:
                assert machine.boot(b"\xf4").run() == HltExit()

    cycle(5)
    before, fds = mappings(), len(os.listdir("/proc/self/fd"))
    cycle(40)
    assert mappings() - before < 20
    assert len(os.listdir("/proc/self/fd")) == fds
