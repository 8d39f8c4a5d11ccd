# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that carries out what a selftest's guest code would: steps in a script in its memory.

The program reads one step after the other: four words, what to do and with what.  It runs as it
is in ring 0 and in ring 3.  Where a step finds what it must not, the guest says address, found and
expected word, as the kernel's guests do by GUEST_ASSERT.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, Self

from kvmsim import exits
from kvmsim.api import Kvm, Memory, Vm
from kvmsim.api.guest import BOOT_SIZE, BootPage, Guest, Hypercall
from kvmsim.uapi import KVM_HC_MAP_GPA_RANGE, PAGE_SIZE

SCRIPTS: Final = 1 << 20  #: gpa of the scripts, SCRIPT_SIZE for each vCPU
SCRIPT_SIZE: Final = 256 << 10
RESULT: Final = SCRIPT_SIZE - 8  #: where a step of a script leaves what it found
DONE, SYNC, FAIL = 0x80, 0x81, 0x82  #: ports

_NEXT: Final = (
    "48ad"  # next: lodsq: the step
    "488b3e 488b4e08 488b5e10 4883c618"  # its words in rdi, rcx, rbx; rsi behind them
    "48ffc8 7832 7434"  # 0: done; 1: sync
    "48ffc8 7433 48ffc8 743a"  # 2: fill; 3: check
    "48ffc8 744f 48ffc8 745e 48ffc8 7472"  # 4: mark; 5: marked; 6: either
    "48ffc8 0f8487000000 48ffc8 0f8496000000"  # 7: call; 8: wait
    "4889fe ebb8"  # 9: mov rsi, rdi; jmp next
    "e680 ebb4"  # done: out 0x80, al
    "e681 ebb0"  # sync: out 0x81, al
    "4889d8 48c1e903 f348ab eba4"  # fill: rax = rbx; rcx /= 8; rep stosq
    "4889d8 48c1e903 4839c0 f348af 7495 4883ef08 488b07"  # check: repe scasq; else rax = [rdi]
    "e682 eb8a"  # fail: out 0x82, al
    "48891f 4881c700100000 48ffc9 75f1 e976ffffff"  # mark: [rdi] = rbx, page by page
    "488b07 4839d8 75e0 4881c700100000 48ffc9 75ec e95dffffff"  # marked: [rdi] == rbx
    "488b07 4885c0 7405 4839d8 75c2 4881c700100000 48ffc9 75e7 e93fffffff"  # either: 0 or rbx
    "4889da 4889fb b80c000000"  # call: KVM_HC_MAP_GPA_RANGE(rdi, rcx, rbx)
)
_CALLED: Final = (
    "4885c0 759e e927ffffff"  # rax == 0?
    "488b07 4839d8 74f8 488901 e917ffffff"  # wait while [rdi] == rbx; [rcx] = what came
)
_CALLS: Final = {"vmcall": "0f01c1", "vmmcall": "0f01d9"}
_STEP: Final = struct.Struct("<4Q")
_ENCRYPTED, _DECRYPTED = 1 << 4, 0  # KVM_MAP_GPA_RANGE_*
PUNCH_TOO: Final = 1 << 32
"""With a conversion: the host shall allocate or punch the private side as well."""


def word(byte: int) -> int:
    """A word of eight times the same byte."""
    return byte * 0x0101010101010101


class Script:
    """Steps for a guest, in order. Addresses are gpas, sizes bytes."""

    def __init__(self, at: int) -> None:
        self._at = at
        self._steps: list[tuple[int, int, int, int]] = []

    def _add(self, what: int, *words: int) -> Self:
        self._steps.append((what, *words, *[0] * (3 - len(words))))  # type: ignore[arg-type]
        return self

    def sync(self, *words: int) -> Self:
        """Let the host look, and tell it up to three words."""
        return self._add(1, *words)

    def fill(self, gpa: int, size: int, byte: int) -> Self:
        """memset()."""
        return self._add(2, gpa, size, word(byte))

    def check(self, gpa: int, size: int, byte: int) -> Self:
        """Each byte is ``byte``."""
        return self._add(3, gpa, size, word(byte))

    def mark(self, gpa: int, size: int, value: int) -> Self:
        """Store a word at the beginning of each page."""
        return self._add(4, gpa, size // PAGE_SIZE, value) if size else self

    def marked(self, gpa: int, size: int, value: int) -> Self:
        """Each page begins with a word."""
        return self._add(5, gpa, size // PAGE_SIZE, value) if size else self

    def either(self, gpa: int, size: int, value: int) -> Self:
        """Each page begins with a word or with zero."""
        return self._add(6, gpa, size // PAGE_SIZE, value) if size else self

    def map_private(self, gpa: int, size: int, *, punch_too: bool = False) -> Self:
        """Ask the host to make a range private."""
        flags = _ENCRYPTED | (PUNCH_TOO if punch_too else 0)
        return self._add(7, gpa, size // PAGE_SIZE, flags)

    def map_shared(self, gpa: int, size: int, *, punch_too: bool = False) -> Self:
        """Ask the host to make a range shared."""
        flags = _DECRYPTED | (PUNCH_TOO if punch_too else 0)
        return self._add(7, gpa, size // PAGE_SIZE, flags)

    def wait_while(self, gpa: int, value: int) -> Self:
        """Read until another word than ``value`` comes; it is left as the result."""
        return self._add(8, gpa, self._at + RESULT, value)

    def again(self) -> Self:
        """Begin anew."""
        return self._add(9, self._at)

    def to_bytes(self) -> bytes:
        """As the guest reads it."""
        steps = [*self._steps, (0, 0, 0, 0)]
        return b"".join(_STEP.pack(*step) for step in steps)


class GuestAssert(AssertionError):
    """The guest found what it must not."""


class Player:
    """One vCPU and its script."""

    def __init__(self, guest: Guest, vm: Vm, scripts: Memory, number: int) -> None:
        self.vcpu = vm.create_vcpu(number)
        self._guest = guest
        self._scripts = scripts
        self._offset = number * SCRIPT_SIZE
        guest.enter(self.vcpu)

    def script(self) -> Script:
        """An empty script for this vCPU."""
        return Script(SCRIPTS + self._offset)

    @property
    def result(self) -> int:
        """What the last ``wait_while`` found."""
        return int.from_bytes(self._scripts.read(self._offset + RESULT, 8), "little")

    def start(self, script: Script) -> None:
        """Have the vCPU begin with ``script`` at the next :meth:`resume`."""
        data = script.to_bytes()
        assert len(data) <= RESULT, f"a script of {len(data)} bytes"
        self._scripts.write(self._offset, data)
        self._guest.jump(self.vcpu, 0, rsi=SCRIPTS + self._offset)

    def resume(
        self,
        on_sync: Callable[[int, int, int], None] | None = None,
        on_map: Callable[[int, int, int], None] | None = None,
    ) -> exits.Exit | None:
        """Run until the script is done (None) or another exit comes.

        ``on_sync`` gets a sync's words, ``on_map`` gpa, size and flags of a conversion.
        """
        while True:
            left = self.vcpu.run()
            match left:
                case exits.IoExit(port=0x80):
                    return None
                case exits.IoExit(port=0x81) if on_sync is not None:
                    regs = self.vcpu.regs
                    on_sync(regs.rdi, regs.rcx, regs.rbx)
                case exits.IoExit(port=0x82):
                    regs = self.vcpu.regs
                    raise GuestAssert(f"gpa {regs.rdi:#x}: {regs.rax:#x} instead of {regs.rbx:#x}")
                case exits.HypercallExit(nr, (gpa, npages, flags, *_)) if on_map is not None:
                    assert nr == KVM_HC_MAP_GPA_RANGE
                    on_map(gpa, npages * PAGE_SIZE, flags)
                    self.vcpu.complete(0)
                case _:
                    return left

    def play(
        self,
        script: Script,
        on_sync: Callable[[int, int, int], None] | None = None,
        on_map: Callable[[int, int, int], None] | None = None,
    ) -> exits.Exit | None:
        """Start and resume."""
        self.start(script)
        return self.resume(on_sync, on_map)


def players(kvm: Kvm, vm: Vm, count: int = 1, *, ring: int, slot: int = 100) -> list[Player]:
    """The guest's own memory, in slots ``slot`` and the next, and vCPUs in it."""
    instruction = kvm.transport.hypercall
    page = BootPage(hypercall=Hypercall[instruction.upper()])
    guest = Guest(kvm, vm, page, ring=ring, slot=slot)
    guest.load(bytes.fromhex(_NEXT + _CALLS[instruction] + _CALLED))
    scripts = kvm.allocate(count * SCRIPT_SIZE)
    assert SCRIPTS >= BOOT_SIZE
    vm.add_slot(SCRIPTS, scripts, slot=slot + 1)
    return [Player(guest, vm, scripts, number) for number in range(count)]
