# SPDX-License-Identifier: GPL-2.0-or-later
"""Conversions through the API, for every kind of VM with private memory.

What private_mem_conversions_test.c and private_mem_kvm_exits_test.c (tools/testing/selftests/kvm)
ask of a SW_PROTECTED_VM; a kernel that has one answers too.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from kvm.world import PAGES, RAM, SIZE, name_of

from kvmsim import exits
from kvmsim.api import GuestMemfd, IoctlError, Kvm, Memory, Memslot, Simulation, Vm
from kvmsim.api.guest import SHARED_VIEW, Agent, BootPage, Guest, Hypercall
from kvmsim.uapi import (
    KVM_CAP_EXIT_HYPERCALL,
    KVM_CAP_VM_TYPES,
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVM_X86_SW_PROTECTED_VM,
    KVMSIM_SHARED_BIT_VM,
    PAGE_SIZE,
    Abi,
)

EPERM, EINVAL = -1 & (1 << 64) - 1, -22 & (1 << 64) - 1


@dataclass
class Machine:
    """A VM whose guest, in ring 0, asks for conversions, and a VMM that grants them."""

    kvm: Kvm
    vm: Vm
    agent: Agent
    memory: Memory
    file: GuestMemfd
    slot: Memslot
    discards: bool = True

    @property
    def selects(self) -> bool:
        """Whether the guest selects the side by an address."""
        return self.vm.shared_bit != 0

    def serve(self, left: exits.Exit | None) -> None:
        """Answer exits until the agent is done."""
        while left is not None:
            match left:
                case exits.HypercallExit(nr, (gpa, npages, attributes, *_)) if (
                    nr == KVM_HC_MAP_GPA_RANGE
                ):
                    private = bool(attributes & KVM_MAP_GPA_RANGE_ENCRYPTED)
                    self.convert(gpa, npages * PAGE_SIZE, private)
                    self.agent.vcpu.complete(0)
                case exits.MemoryFaultExit(gpa, size, private):
                    self.convert(gpa, size, private)
                case _:
                    raise AssertionError(left)
            left = self.agent.resume()

    def convert(self, gpa: int, size: int, private: bool) -> None:
        self.vm.convert(gpa, size, private=private)
        if self.discards:
            self.slot.discard(gpa, size, private=not private)

    def ask(self, page: int, pages: int, *, private: bool) -> int:
        """The guest asks; what its hypercall returned."""
        what = self.agent.guest.page.hypercall.name.lower()
        attributes = KVM_MAP_GPA_RANGE_ENCRYPTED if private else 0
        gpa = RAM + page * PAGE_SIZE
        self.serve(self.agent.do(what, rax=12, rbx=gpa, rcx=pages, rdx=attributes))
        return self.agent.vcpu.regs.rax

    def at(self, page: int, *, private: bool) -> int:
        """The guest's address of one side of a page."""
        view = 0 if private or not self.selects else SHARED_VIEW
        return view + RAM + page * PAGE_SIZE

    def load(self, page: int, *, private: bool) -> int:
        self.serve(self.agent.do("load", rcx=self.at(page, private=private)))
        return self.agent.vcpu.regs.rbx

    def store(self, page: int, value: int, *, private: bool) -> None:
        at = self.at(page, private=private)
        self.serve(self.agent.do("store", rcx=at, rbx=value))

    def host(self, page: int) -> int:
        """What the host finds in the shared side."""
        return int.from_bytes(self.memory.read(page * PAGE_SIZE, 8), "little")


def build(kvm: Kvm, type: int, make: Callable[[Vm], GuestMemfd], ring: int = 0) -> Machine:
    vm = kvm.create_vm(type)
    vm.enable_cap(KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
    hypercall = Hypercall[kvm.transport.hypercall.upper()]
    guest = Guest(kvm, vm, BootPage(hypercall), ring=ring, slot=9)
    agent = Agent(guest, vm.create_vcpu())
    memory, file = kvm.allocate(SIZE), make(vm)
    return Machine(kvm, vm, agent, memory, file, vm.add_slot(RAM, memory, guest_memfd=file))


Maker = Callable[..., Machine]


@pytest.fixture(params=[
    pytest.param("real", marks=pytest.mark.kvm),
    pytest.param("sw-protected", marks=pytest.mark.fuse),
    pytest.param("shared-bit", marks=pytest.mark.fuse),
    pytest.param("v7", marks=pytest.mark.fuse),
])  # fmt: skip
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Maker]:
    """Makes machines of one kind; ``ring=3`` for a guest that may not ask."""
    kind = request.param
    abi: Abi = "v7" if kind == "v7" else "upstream"
    type = {"shared-bit": KVMSIM_SHARED_BIT_VM, "v7": 0}.get(kind, KVM_X86_SW_PROTECTED_VM)
    with contextlib.ExitStack() as stack:
        if kind == "real":
            kvm = stack.enter_context(Kvm())
            if not kvm.check_extension(KVM_CAP_VM_TYPES) >> type & 1:
                pytest.skip("KVM_X86_SW_PROTECTED_VM (CONFIG_KVM_SW_PROTECTED_VM, a second stage)")
        else:
            directory = request.getfixturevalue("directory")
            kvm = stack.enter_context(Kvm(Simulation(directory, abi=abi)))

        def make_file(vm: Vm) -> GuestMemfd:
            if abi == "upstream":
                return vm.create_guest_memfd(SIZE)
            path = directory / "v7"
            with open(path, "x") as made:
                os.truncate(made.fileno(), SIZE)
            stack.callback(path.unlink)
            return kvm.open_file(path)

        yield lambda ring=0: build(kvm, type, make_file, ring)


def test_a_guest_asks_for_private_memory(machine: Maker) -> None:
    one = machine()
    for page in range(PAGES):
        one.memory.write(page * PAGE_SIZE, (0x100 + page).to_bytes(8, "little"))
    assert one.load(3, private=False) == 0x103
    assert one.ask(2, 4, private=True) == 0
    assert [one.load(page, private=True) for page in range(2, 6)] == [0, 0, 0, 0]
    one.store(3, 0xAAAA, private=True)
    assert one.load(3, private=True) == 0xAAAA
    assert [one.host(page) for page in (1, 2, 3, 5, 6)] == [0x101, 0, 0, 0, 0x106]
    assert [one.load(page, private=False) for page in (1, 6)] == [0x101, 0x106]
    assert one.ask(2, 4, private=False) == 0
    assert one.load(3, private=False) == 0, "neither side has kept anything"
    one.store(3, 0xBBBB, private=False)
    assert one.host(3) == 0xBBBB


def test_without_a_discard_each_side_keeps_its_bytes(machine: Maker) -> None:
    one = machine()
    one.discards = False
    one.store(0, 0x5AED, private=False)
    one.ask(0, 1, private=True)
    one.store(0, 0x5EC2E7, private=True)
    assert one.host(0) == 0x5AED
    one.ask(0, 1, private=False)
    assert one.load(0, private=False) == 0x5AED
    one.ask(0, 1, private=True)
    assert one.load(0, private=True) == 0x5EC2E7
    one.file.discard(0, PAGE_SIZE)
    assert one.load(0, private=True) == 0


def test_odd_pages_come_back(machine: Maker) -> None:
    one = machine()
    assert one.ask(0, PAGES, private=True) == 0
    for page in range(PAGES):
        one.store(page, page + 1, private=True)
    for page in range(1, PAGES, 2):
        assert one.ask(page, 1, private=False) == 0
    assert [one.load(page, private=not page % 2) for page in range(PAGES)] == [
        0 if page % 2 else page + 1 for page in range(PAGES)
    ]


def test_memory_that_was_allocated_before(machine: Maker) -> None:
    one = machine()
    one.file.allocate(0, SIZE)
    assert one.ask(0, PAGES, private=True) == 0
    one.store(5, 7, private=True)
    assert one.load(5, private=True) == 7


def test_what_kvm_answers_itself(machine: Maker) -> None:
    one = machine()
    agent, number = one.agent, one.agent.guest.page.hypercall.name.lower()
    for registers in ({"rbx": RAM + 1, "rcx": 1}, {"rbx": RAM, "rcx": 0}):
        assert agent.do(number, rax=12, **registers) is None
        assert agent.vcpu.regs.rax == EINVAL
    assert agent.do(number, rax=77) is None
    assert agent.vcpu.regs.rax == -1000 & (1 << 64) - 1


def test_ring_3_may_not_ask(machine: Maker) -> None:
    one = machine(ring=3)
    assert one.ask(0, 1, private=True) == EPERM


def test_an_access_of_the_wrong_type_asks_too(machine: Maker) -> None:
    one = machine()
    if not one.selects:
        pytest.skip("no address selects a side in this kind of VM: an access is of the gfn's type")
    number = None if one.kvm.transport.abi == "v7" else errno.EFAULT
    left = one.agent.do("load", rcx=one.at(4, private=True))
    wanted = exits.MemoryFaultExit(RAM + 4 * PAGE_SIZE, PAGE_SIZE, True, number)
    assert left == wanted
    assert one.agent.resume() == wanted, "it asks until it is answered"
    one.serve(one.agent.exit)
    assert one.agent.vcpu.regs.rbx == 0
    left = one.agent.do("load", rcx=one.at(4, private=False))
    assert left == exits.MemoryFaultExit(RAM + 4 * PAGE_SIZE, PAGE_SIZE, False, number)
    one.serve(left)


def test_a_private_slot_that_is_deleted(machine: Maker) -> None:
    one = machine()
    one.ask(0, PAGES, private=True)
    one.store(2, 9, private=True)
    one.slot.delete()
    left = one.agent.do("load", rcx=one.at(2, private=True))
    if one.kvm.transport.abi == "v7":
        assert isinstance(left, exits.MmioExit)
    else:
        assert left == exits.MemoryFaultExit(RAM + 2 * PAGE_SIZE, PAGE_SIZE, True, errno.EFAULT)


def test_what_cannot_be_converted(machine: Maker) -> None:
    one = machine()
    for gpa, size in ((RAM + 1, PAGE_SIZE), (RAM, PAGE_SIZE - 1), (RAM, 0)):
        with pytest.raises(IoctlError) as caught:
            one.vm.convert(gpa, size, private=True)
        assert name_of(caught.value) == "EINVAL"
    one.vm.convert(1 << 32, PAGE_SIZE, private=True)  # a range may have no slot
    assert one.load(0, private=False) == 0
