# SPDX-License-Identifier: GPL-2.0-or-later
"""Probes: KVM_RUN, and what may happen before, between and after exits."""

from __future__ import annotations

import contextlib
import struct
import threading
from dataclasses import replace

from selftests.machine import Background
from selftests.probes.bench import RAM, Answers, Bench, attempt, probe, said

from kvmsim import exits
from kvmsim.api.guest import MAILBOX, SHARED_VIEW
from kvmsim.uapi import (
    KVM_RUN,
    KVM_RUN_EXIT_REASON_OFFSET,
    PAGE_SIZE,
    RUN_EXIT_REASON,
    requests,
    structs,
)

START = SHARED_VIEW + 0x8000
IN_OUT = "e404 e680 ebfa"  # 1: in al, 4; out 0x80, al; jmp 1b
LOAD = "488b19 e680 ebf9"  # 1: mov rbx, [rcx]; out 0x80, al; jmp 1b
STORE = "488919 e680 ebf9"  # 1: mov [rcx], rbx; out 0x80, al; jmp 1b
SPIN = "48ff06 488b01 4839d8 74f5 e680 ebf1"  # 1: inc [rsi]; cmp [rcx], rbx; je 1b; out; jmp 1b


def reason(bench: Bench) -> str:
    return str(RUN_EXIT_REASON.unpack_from(bench.vcpu._run, KVM_RUN_EXIT_REASON_OFFSET)[0])


def rip(bench: Bench) -> str:
    return f"{bench.vcpu.regs.rip - START:+#x}"


def raw_run(bench: Bench) -> str:
    """KVM_RUN without a word of the API's: result, and the reason that is there then."""
    return f"{bench.ask(bench.vcpu.handle, KVM_RUN)} {reason(bench)}"


# --- completion ---------------------------------------------------------------------------------


@probe
def an_in_that_is_answered_or_not(bench: Bench) -> Answers:
    """The next run finds what lies in kvm_run, whoever put it there."""
    bench.load(IN_OUT)
    found = {"in": bench.run(), "at": rip(bench)}
    bench.vcpu.complete(b"\x5a")
    found |= {"out": bench.run(), "in again": bench.run()}
    found["not answered"] = bench.run()
    return found


@probe
def registers_between_exit_and_completion(bench: Bench) -> Answers:
    """Registers that are set while an IN waits: RIP and the rest of RAX are the new ones'."""
    bench.load(IN_OUT, rax=0x1111)
    bench.run()
    bench.vcpu.regs = replace(bench.vcpu.regs, rax=0x2222, rbx=7)
    bench.vcpu.complete(b"\x5a")
    found = {"out": bench.run(), "rax": hex(bench.vcpu.regs.rax), "rbx": str(bench.vcpu.regs.rbx)}
    bench.run()
    bench.vcpu.regs = replace(bench.vcpu.regs, rip=START)
    bench.vcpu.complete(b"\x5b")
    found["after RIP was set"] = bench.run()
    return found


@probe
def a_load_from_a_device(bench: Bench) -> Answers:
    """Completed, completed wrongly, and not: as many bytes as the instruction takes."""
    bench.load(LOAD, rcx=RAM)
    found = {"read": bench.run(), "at": rip(bench)}
    bench.vcpu.complete(struct.pack("<Q", 0x1122334455667788))
    found |= {"then": bench.run(), "rbx": hex(bench.vcpu.regs.rbx), "again": bench.run()}
    found["not answered"] = bench.run()
    return found


@probe
def a_store_to_a_device(bench: Bench) -> Answers:
    """Complete when it is told."""
    bench.load(STORE, rcx=RAM + 8, rbx=0x0102030405060708)
    return {"write": bench.run(), "then": bench.run(), "again": bench.run()}


@probe
def an_access_across_two_device_pages(bench: Bench) -> Answers:
    """Eight bytes, three of them behind a page's end."""
    bench.load(LOAD, rcx=RAM + PAGE_SIZE - 5)
    found = {"first": bench.run()}
    if isinstance(bench.vcpu.exit, exits.MmioExit):
        bench.vcpu.complete(b"\x11" * bench.vcpu.exit.length)
        found["second"] = bench.run()
        if isinstance(bench.vcpu.exit, exits.MmioExit):
            bench.vcpu.complete(b"\x22" * bench.vcpu.exit.length)
            found["then"] = bench.run()
        found["rbx"] = hex(bench.vcpu.regs.rbx)
    return found


@probe
def an_access_from_memory_into_a_device(bench: Bench) -> Answers:
    """The first half is in a slot, the second where none is."""
    memory = bench.kvm.allocate(PAGE_SIZE)
    memory.write(PAGE_SIZE - 4, b"\xaa" * 4)
    bench.vm.add_slot(RAM, memory, slot=1)
    bench.load(LOAD, rcx=RAM + PAGE_SIZE - 4)
    found = {"first": bench.run()}
    if isinstance(bench.vcpu.exit, exits.MmioExit):
        bench.vcpu.complete(b"\xbb" * bench.vcpu.exit.length)
        found["then"] = bench.run()
        found["rbx"] = hex(bench.vcpu.regs.rbx)
    return found


@probe
def a_slot_that_comes_while_a_load_waits(bench: Bench) -> Answers:
    """The load that was answered is over; the next finds memory."""
    bench.load(LOAD, rcx=RAM)
    found = {"read": bench.run()}
    memory = bench.kvm.allocate(PAGE_SIZE)
    memory.write(0, struct.pack("<Q", 0x77))
    bench.vm.add_slot(RAM, memory, slot=1)
    bench.vcpu.complete(struct.pack("<Q", 0x66))
    found |= {"then": bench.run(), "rbx": hex(bench.vcpu.regs.rbx)}
    found |= {"again": bench.run(), "rbx then": hex(bench.vcpu.regs.rbx)}
    return found


# --- being told to return -----------------------------------------------------------------------


@probe
def immediate_exit_before_the_run(bench: Bench) -> Answers:
    """Nothing runs, the reason stays as it was, and what waits is completed."""
    bench.load(IN_OUT)
    bench.vcpu.immediate_exit = True
    found = {"first": raw_run(bench), "at": rip(bench)}
    bench.vcpu.immediate_exit = False
    found["in"] = bench.run()
    bench.vcpu.complete(b"\x5a")
    bench.vcpu.immediate_exit = True
    found["completing"] = raw_run(bench)
    found["at then"] = rip(bench)
    found["twice"] = raw_run(bench)
    bench.vcpu.immediate_exit = False
    found |= {"out": bench.run(), "any value": ""}
    bench.vcpu._run[1] = 0x80
    found["any value"] = raw_run(bench)
    return found


@contextlib.contextmanager
def spinning(bench: Bench):  # type: ignore[no-untyped-def]
    """A guest that counts, in a thread; it is cancelled at the end if it still runs."""
    memory = bench.kvm.allocate(2 * PAGE_SIZE)
    slot = bench.vm.add_slot(RAM, memory, slot=1)
    bench.load(SPIN, rcx=RAM, rbx=0, rsi=SHARED_VIEW + MAILBOX)
    bench.guest.memory.write(MAILBOX, bytes(8))
    runner = Background(lambda: attempt(bench.vcpu.run))
    while not any(bench.guest.memory.read(MAILBOX, 8)):
        assert runner.alive, runner.end()
    try:
        yield slot, memory, runner
    finally:
        if runner.alive:
            bench.vcpu.cancel()
        runner.end()


@probe
def immediate_exit_while_it_runs(bench: Bench) -> Answers:
    """It is looked at before the guest is entered: a signal has to make the run come back."""
    found = {}
    with spinning(bench) as (_, _, runner):
        bench.vcpu.immediate_exit = True
        before = bench.guest.memory.read(MAILBOX, 8)
        while bench.guest.memory.read(MAILBOX, 8) == before:
            assert runner.alive
        found["it runs on"] = str(runner.alive)
        bench.vcpu.cancel()
        found["and ends with"] = said(runner.end())
        found["the next run"] = bench.run()
        bench.vcpu.immediate_exit = False
    return found


@probe
def a_slot_that_goes_while_it_is_used(bench: Bench) -> Answers:
    """The guest meets a device where it read memory, at the very instruction."""
    found = {}
    with spinning(bench) as (slot, _, runner):
        slot.delete()
        found["exit"] = said(runner.end())
        found["at"] = rip(bench)
        bench.vcpu.complete(struct.pack("<Q", 5))
        found["completed"] = bench.run()
    return found


@probe
def other_ioctls_while_it_runs(bench: Bench) -> Answers:
    """They wait for the run to end, and then see what it left."""
    found = {}
    with spinning(bench) as (_, memory, runner):
        done = threading.Event()
        regs = Background(lambda: (bench.vcpu.regs, done.set())[0])
        found["while it runs"] = str(done.wait(0.05))
        memory.write(0, struct.pack("<Q", 9))
        found["exit"] = said(runner.end())
        found["rax"] = hex(regs.end().rax & 0xFF)
    return found


@probe
def signal_masks(bench: Bench) -> Answers:
    """KVM_SET_SIGNAL_MASK: the size of a set, a pointer, none at all."""
    edge = bench.edge()
    head = structs.SIGNAL_MASK.pack
    return bench.each(bench.vcpu.handle, requests.KVM_SET_SIGNAL_MASK, {
        "8 bytes": head(8) + bytes(8), "none": 0, "4 bytes": head(4) + bytes(8),
        "16 bytes": head(16) + bytes(16), "0 bytes": head(0), "pointer": 16,
        "set beyond the page": edge.put(head(8) + bytes(8), 1),
    })  # fmt: skip


# --- failures -----------------------------------------------------------------------------------


@probe
def a_hole_of_the_process(bench: Bench) -> Answers:
    """Nothing behind userspace_addr: EFAULT at the instruction, as often as one asks."""
    bench.vm.set_user_memory_region(1, RAM, PAGE_SIZE, bench.edge().end)
    bench.load(LOAD, rcx=RAM)
    found = {"run": raw_run(bench), "at": rip(bench), "again": raw_run(bench)}
    bench.vm.set_user_memory_region(1, RAM, 0, 0)
    found["without the slot"] = bench.run()
    return found


@probe
def a_store_to_a_read_only_slot(bench: Bench) -> Answers:
    """It is a device to stores, and memory to loads."""
    memory = bench.kvm.allocate(PAGE_SIZE)
    memory.write(0, b"\x2a")
    bench.vm.set_user_memory_region(1, RAM, PAGE_SIZE, memory.address, 2)
    bench.load(LOAD, rcx=RAM)
    found = {"load": bench.run(), "rbx": hex(bench.vcpu.regs.rbx)}
    bench.guest.load(bytes.fromhex(STORE))
    bench.guest.jump(bench.vcpu, 0, rcx=RAM, rbx=5)
    found |= {"store": bench.run(), "then": bench.run(), "memory": memory.read(0, 1).hex()}
    return found


@probe
def running_on_after_a_shutdown(bench: Bench) -> Answers:
    """A triple fault; the guest is where it was, and does it again."""
    bench.load("0f0b")  # ud2, and no table of handlers
    return {"first": bench.run(), "second": bench.run(), "reason": reason(bench)}


@probe
def what_kvm_run_says_besides(bench: Bench) -> Answers:
    """Flags and cr8 after an exit, and a cr8 that is none."""
    bench.load(IN_OUT)
    bench.run()
    run = bench.vcpu._run
    found = {"ready": str(run[12]), "if_flag": str(run[13]), "flags": str(run[14]),
             "cr8": run[16:24].hex(), "apic_base": run[24:32].hex()}  # fmt: skip
    run[16:24] = struct.pack("<Q", 0x10)
    found["cr8 0x10"] = bench.run()
    run[16:24] = struct.pack("<Q", 3)
    found["cr8 3"] = bench.run()
    found["cr8 then"] = run[16:24].hex()
    return found


@probe
def registers_that_travel_in_kvm_run(bench: Bench) -> Answers:
    """kvm_valid_regs and kvm_dirty_regs: known ones, unknown ones."""
    bench.load(IN_OUT)
    run = bench.vcpu._run
    found = {}
    for name, valid, dirty in (("regs", 1, 0), ("all", 7, 0), ("unknown", 8, 0),
                               ("dirty unknown", 0, 8), ("none", 0, 0)):  # fmt: skip
        run[288:304] = struct.pack("<QQ", valid, dirty)
        found[name] = bench.run()
    run[288:304] = bytes(16)
    return found
