# SPDX-License-Identifier: GPL-2.0-or-later
"""x86/private_mem_kvm_exits_test: what KVM_RUN tells of private memory that is not there.

After tools/testing/selftests/kvm/x86/private_mem_kvm_exits_test.c.
"""

from __future__ import annotations

import errno

from selftests.machine import Background, Machine

from kvmsim import exits
from kvmsim.uapi import PAGE_SIZE

GPA = 64 << 20
SIZE = PAGE_SIZE
EXPECTED = exits.MemoryFaultExit(GPA, PAGE_SIZE, private=True, errno=errno.EFAULT)


def test_access_memslot_deleted(machine: Machine) -> None:
    """A slot that goes under a guest in private memory: EFAULT, and which page it was."""
    machine.need_guest_memfd()
    vm = machine.vm(private=True)
    (player,) = machine.players(vm)
    file = vm.create_guest_memfd(SIZE)
    memory = machine.kvm.allocate(SIZE)
    for _ in range(20):
        slot = vm.add_slot(GPA, memory, guest_memfd=file, slot=1)
        vm.convert(GPA, SIZE, private=True)
        player.start(player.script().sync().wait_while(GPA, 0))
        seen = []
        assert player.resume(None) == exits.IoExit(0x81, 1, True, b"\0")  # about to look
        runner = Background(lambda seen=seen: seen.append(player.resume()))
        slot.delete()
        runner.end()
        assert seen == [EXPECTED]


def test_access_memslot_not_private(machine: Machine) -> None:
    """A private gfn in a slot without guest_memfd: the same, and again, until it is shared."""
    vm = machine.vm(private=True)
    (player,) = machine.players(vm)
    memory = machine.kvm.allocate(SIZE)
    memory.write(0, b"\x2a" * 8)
    vm.add_slot(GPA, memory, slot=1)
    vm.convert(GPA, SIZE, private=True)
    script = player.script().check(GPA, 8, 0x2A)
    assert player.play(script) == EXPECTED
    assert player.resume() == EXPECTED
    vm.convert(GPA, SIZE, private=False)
    assert player.resume() is None
