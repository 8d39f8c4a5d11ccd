# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks through KVM's interface on what the guest finds at a gpa, on a guest at work."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, replace
from typing import Final

from kvmsim.attack.guest import FORGED, SECRET, Ended, LabGuest, value_of
from kvmsim.attack.lab import VICTIM_SIZE, Lab
from kvmsim.attack.outcome import (
    NONE,
    AttackError,
    Layer,
    Outcome,
    concealed,
    noticed,
    refused,
    succeeds,
)
from kvmsim.fallocate import punch
from kvmsim.region import Region
from kvmsim.uapi import KVM_MEM_GUEST_MEMFD, PAGE_SHIFT, PAGE_SIZE, KvmError
from kvmsim.vmm.loader import LAYOUT

#: Who speaks when the hardware does not take a page.
_HARDWARE: Final = {"tdx": Layer.MODULE, "snp": Layer.RMP, "pkvm": Layer.EL2}
_LOST: Final = "zeros, where the guest had written"
_EXCEPTIONS: Final = {"#VE": "#VE", "#VC": "#VC 0x404"}


@dataclass(frozen=True, slots=True)
class Found:
    """What the guest found: a word, or who said no."""

    value: int = 0
    outcome: Outcome | None = None


def look(lab: Lab, guest: LabGuest, command: str) -> Found:
    """Have the guest touch the page."""
    before = len(guest.faults)
    try:
        answer = guest.ask(command)
    except Ended as ended:
        death = guest.running.death
        if death is None and len(guest.faults) == before:
            raise AttackError(f"{command!r}: the guest has ended: {ended}") from ended
        layer = _HARDWARE.get(lab.kind, Layer.KVM)
        number = death.errno if death is not None else guest.faults[-1].errno or errno.EFAULT
        return Found(outcome=refused(layer, errno.errorcode[number]))
    for word, code in _EXCEPTIONS.items():
        if word in answer:
            return Found(outcome=noticed(Layer.GUEST, code))
    if answer.startswith("ok"):
        return Found(value_of(answer))
    raise AttackError(f"{command!r}: {answer}")


def remap(lab: Lab) -> Outcome:
    """Another file under the memslot: delete it, and make it anew."""
    if lab.technology is None:
        return lab.kernel().split(0)
    guest = lab.guest()
    swap(lab, guest)
    found = look(lab, guest, f"peek {lab.gpa:#x}")
    return found.outcome or _replaced(found.value, "another page's content")


def accept_twice(lab: Lab) -> Outcome:
    """Swap the page, and have the guest accept the gpa once more: then there would be two."""
    if lab.technology is None or not lab.technology.accepts:
        return NONE
    guest = lab.guest()
    swap(lab, guest)
    answer = guest.ask(f"accept {lab.gpa:#x} 1")
    if "lost" in answer:
        return noticed(Layer.GUEST, "accepted before: lost")
    return succeeds(answer)


def accept_again(lab: Lab) -> Outcome:
    """Have the guest accept a page that it has."""
    if lab.technology is None or not lab.technology.accepts:
        return NONE
    guest = lab.guest()
    answer = guest.ask(f"accept {lab.gpa:#x} 1")
    if "already accepted" not in answer or guest.peek(lab.gpa) != SECRET:
        return succeeds(answer)
    code = {"tdx": "PAGE_ALREADY_ACCEPTED", "snp": "CF = 1"}[lab.kind]
    return refused(_HARDWARE[lab.kind], code)


def punch_refill(lab: Lab) -> Outcome:
    """Punch the page in use, allocate it anew."""
    if lab.technology is None:
        return lab.sev().refill(0)
    return _punched(lab)


def punch_part(lab: Lab) -> Outcome:
    """Punch 4 KiB out of 2 MiB; what is around it stays."""
    if lab.technology is None:
        return NONE
    guest, neighbour = lab.guest(), lab.gpa + PAGE_SIZE
    guest.poke(neighbour, FORGED)
    ended = _punched(lab)
    if guest.running.death is None and guest.peek(neighbour) != FORGED:
        return succeeds("pages around it are lost too")
    return ended


def _punched(lab: Lab) -> Outcome:
    guest, offset = lab.guest(), lab.offset
    fd = os.open(lab.path("victim"), os.O_RDWR | os.O_CLOEXEC)
    try:
        punch(fd, offset, PAGE_SIZE)
        os.posix_fallocate(fd, offset, PAGE_SIZE)
    finally:
        os.close(fd)
    found = look(lab, guest, f"peek {lab.gpa:#x}")
    return found.outcome or _replaced(found.value, _LOST)


def convert(lab: Lab) -> Outcome:
    """Convert the page to shared unasked, and back when the guest touches it."""
    if lab.technology is None:
        return NONE
    guest, gpa = lab.guest(), lab.gpa
    result = guest.in_runner(lambda: guest.machine.convert(gpa, PAGE_SIZE, private=False))
    if result:
        return refused(Layer.KVM, errno.errorcode[-result])
    try:
        guest.in_runner(lambda: guest.memory.write_shared(gpa, FORGED.to_bytes(8, "little")))
    except KvmError as error:
        if guest.peek(gpa) != SECRET:
            raise AttackError("the host cannot write, and the page is lost") from error
        return refused(_HARDWARE.get(lab.kind, Layer.KVM), errno.errorcode[error.errno or 0])
    found = look(lab, guest, f"peek {gpa:#x}")
    return found.outcome or _replaced(found.value, _LOST)


def wrong_bit(lab: Lab) -> Outcome:
    """Have the guest use the other side's bit for its page, once."""
    if lab.technology is None:
        return lab.kernel().other_side(0)
    guest, gpa = lab.guest(), lab.gpa
    if guest.half(private=True) == guest.half(private=False):
        return NONE
    if guest.peek(gpa, "shared") == SECRET:
        return succeeds("the private page as a shared one")
    found = look(lab, guest, f"peek {gpa:#x}")
    return found.outcome or _replaced(found.value, _LOST)


def convert_dma(lab: Lab) -> Outcome:
    """Convert the buffer to private while a device is about to store there."""
    if lab.technology is None:
        return lab.kernel().dma(0)
    guest = lab.guest()
    buffer = LAYOUT["bounce buffers"][0] + PAGE_SIZE  # behind the ring's page
    results: list[int] = []
    lab.disk.meanwhile = lambda: results.append(
        guest.machine.convert(buffer, PAGE_SIZE, private=True)
    )
    answer = guest.ask(f"bounce read {lab.gpa:#x} 1 0")
    lab.disk.meanwhile = lambda: None
    if results[0]:
        return refused(Layer.KVM, errno.errorcode[-results[0]])
    if "the device refused the address" in answer:
        return refused(Layer.KVM, "EFAULT")
    with guest.running.lock:
        reached = guest.running.stage2.zap(buffer | guest.half(), 1)
    return succeeds("a private page") if reached else concealed(Layer.KVM, "other memory")


def swap(lab: Lab, guest: LabGuest) -> None:
    """Delete the memslot of ``victim``, make one of ``other`` in its place."""
    running = guest.running
    file = running.private.open(os.fspath(lab.path("other")))
    with running.lock:
        slot = running.vm.mmu.slots.find(lab.gpa >> PAGE_SHIFT)
        assert slot is not None
        region = Region(slot.id, KVM_MEM_GUEST_MEMFD, lab.victim_gpa, VICTIM_SIZE, lab.victim_gpa)
        zapped = running.vm.set_user_memory_region2(replace(region, memory_size=0))
    running.flush_zapped(zapped)
    with running.lock:
        running.vm.set_user_memory_region2(region, shared=guest.shared, file=file)
        running.private.placed(file.id)


def _replaced(value: int, what: str) -> Outcome:
    """The guest was not told: what it has found."""
    if value == SECRET:
        return refused(Layer.KVM, "the page stays")
    return succeeds("the host's bytes" if value == FORGED else what)
