# SPDX-License-Identifier: GPL-2.0-or-later
"""VMGEXIT, message by message and event by event: what is asked, answered, refused, ended."""

from __future__ import annotations

import pytest
from guest_calls import FakeRunning, SharedPages

from hwemu.cpu.api import Regs
from hwemu.snp import ghcbmsr
from hwemu.snp.ghcb import Event, Ghcb, Malformed, Response
from hwemu.snp.ghcbmsr import Info, message
from hwemu.snp.psc import PscEntry, PscOp, pack
from kvmsim import exits
from kvmsim.confidential.vmgexit import _EVENTS, _MESSAGES, VmgExits
from kvmsim.guard import Answer, Leave, Verdict
from kvmsim.uapi import KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_ENCRYPTED

GHCB, REQUEST, RESPONSE, PRIVATE = 0x18_0000, 0x19_0000, 0x19_1000, 0x20_0000
SCRATCH = GHCB + 0x800
REGS = Regs(rip=0x1000, rax=1, rcx=2)


class Guest:
    """An SNP guest's vCPU 0 and its hypervisor."""

    def __init__(self) -> None:
        self.running = FakeRunning("snp")
        self.memory = SharedPages(GHCB, REQUEST, RESPONSE)
        self.asked: list[bytes] = []
        self.exits = VmgExits(self.running, 39, self._firmware)  # type: ignore[arg-type]
        self.exits._view = self.memory  # type: ignore[assignment]

    def _firmware(self, request: bytes) -> tuple[bytes, int]:
        self.asked.append(request)
        return b"answer", 0

    def message(self, word: int) -> Verdict:
        self.exits.write_msr(0, word)
        return self.exits.begin(0, REGS)

    def said(self) -> ghcbmsr.MsrMessage:
        return ghcbmsr.decode(self.exits.read_msr(0))

    def register(self) -> None:
        assert self.message(message(Info.REG_GPA_REQ, gfn=GHCB >> 12)) == Answer(REGS)
        assert self.said().fields["gfn"] == GHCB >> 12

    def event(self, event: int, info_1: int = 0, info_2: int = 0, **fields: int) -> Verdict:
        ghcb = Ghcb(bytearray(4096))
        ghcb.page[0x800:0xFF0] = self.memory.pages[GHCB][0x800:0xFF0]
        ghcb.version, ghcb.usage = 2, 0
        for name, value in {
            "sw_exit_code": event, "sw_exit_info_1": info_1, "sw_exit_info_2": info_2, **fields
        }.items():  # fmt: skip
            ghcb.set(name, value)
        self.memory.write(GHCB, bytes(ghcb.page))
        return self.message(message(Info.GHCB_GPA, gfn=GHCB >> 12))

    @property
    def ghcb(self) -> Ghcb:
        return Ghcb(bytearray(self.memory.pages[GHCB]))

    def refused(self, reason: Malformed) -> None:
        assert self.ghcb.get("sw_exit_info_1") == Response.MALFORMED_INPUT
        assert self.ghcb.get("sw_exit_info_2") == reason


@pytest.fixture
def guest() -> Guest:
    made = Guest()
    made.register()
    return made


def ended(verdict: Verdict) -> None:
    assert isinstance(verdict, Leave)
    assert isinstance(verdict.exit, exits.SystemEventExit)


def exit_of(verdict: Verdict) -> exits.Exit:
    assert isinstance(verdict, Leave), verdict
    return verdict.exit


# --- the MSR protocol ---------------------------------------------------------------------------


def test_every_request_is_answered_by_its_own_message() -> None:
    guest = Guest()
    requests: dict[Info, dict[str, int]] = {
        Info.SEV_INFO_REQ: {},
        Info.CPUID_REQ: {"register": 1, "function": 0},
        Info.PREF_GPA_REQ: {},
        Info.REG_GPA_REQ: {"gfn": 7},
        Info.HV_FT_REQ: {},
    }
    for info, fields in requests.items():
        assert guest.message(message(info, **fields)) == Answer(REGS)
        assert guest.said().info is ghcbmsr.ANSWERS[info]
    assert set(requests) | {Info.PSC_REQ, Info.TERM_REQ} == set(_MESSAGES)


def test_sev_info_names_the_c_bit_and_the_versions() -> None:
    guest = Guest()
    guest.message(message(Info.SEV_INFO_REQ))
    assert guest.said().fields == {"cbit": 39, "min": 1, "max": 2}
    guest.message(message(Info.CPUID_REQ, register=1, function=0x8000_001F))
    assert guest.said().fields["value"] & 0x3F == 39
    guest.message(message(Info.HV_FT_REQ))
    assert guest.said().fields["features"] & ghcbmsr.Feature.SNP


@pytest.mark.parametrize(
    "word",
    [
        0xFFF, message(Info.VMPL_REQ, vmpl=1), message(Info.AP_RESET_HOLD_REQ),
        message(Info.SEV_INFO_RESP, cbit=1, min=1, max=2),
        message(Info.TERM_REQ, reason_set=0, reason=1),
    ],
)  # fmt: skip
def test_what_has_no_answer_ends_the_guest(word: int) -> None:
    guest = Guest()
    verdict = guest.message(word)
    ended(verdict)
    assert guest.exits.read_msr(0) == word


@pytest.mark.parametrize(
    ("operation", "attributes"), [(1, KVM_MAP_GPA_RANGE_ENCRYPTED), (2, 0)]
)  # fmt: skip
@pytest.mark.parametrize("answer", [0, -22])
def test_a_page_changes_its_state_by_message(operation: int, attributes: int, answer: int) -> None:
    guest = Guest()
    left = exit_of(guest.message(message(Info.PSC_REQ, gfn=0x200, operation=operation)))
    assert isinstance(left, exits.HypercallExit)
    assert (left.nr, left.args[:3]) == (KVM_HC_MAP_GPA_RANGE, (0x20_0000, 1, attributes))
    assert guest.exits.complete(0, answer, REGS) == Answer(REGS)
    assert guest.said().info is Info.PSC_RESP
    assert bool(guest.said().fields["error"]) == bool(answer)


def test_a_page_state_that_is_none_is_refused() -> None:
    guest = Guest()
    assert guest.message(message(Info.PSC_REQ, gfn=0x200, operation=7)) == Answer(REGS)
    assert guest.said().fields["error"]


# --- GHCB pages ---------------------------------------------------------------------------------


def test_a_ghcb_must_be_registered_and_shared() -> None:
    guest = Guest()
    ended(guest.event(Event.HV_FEATURES))
    guest.register()
    assert guest.event(Event.HV_FEATURES) == Answer(REGS)
    page = guest.memory.pages.pop(GHCB)
    ended(guest.message(message(Info.GHCB_GPA, gfn=GHCB >> 12)))
    guest.memory.pages[GHCB] = page
    guest.event(Event.IOIO, 0x3F8 << 16 | 1 << 4 | 1, rax=0)  # IN
    del guest.memory.pages[GHCB]  # converted while the VMM was at work
    ended(guest.exits.complete(0, b"\1", REGS))


@pytest.mark.parametrize("event", [one for one in Event if one not in _EVENTS])
def test_an_event_that_is_not_simulated_is_refused(guest: Guest, event: Event) -> None:
    fields = {"rax": 0, "rbx": 0, "rcx": 0, "rdx": 0, "sw_scratch": SCRATCH}
    assert guest.event(event, **fields) == Answer(REGS)
    guest.refused(Malformed.INVALID_EVENT)


def test_what_is_missing_is_refused(guest: Guest) -> None:
    for event in (Event.CPUID, Event.MSR, Event.VMMCALL, Event.MMIO_READ, Event.PSC):
        assert guest.event(event) == Answer(REGS)
        guest.refused(Malformed.MISSING_INPUT)


@pytest.mark.parametrize(("size", "bits"), [(1, 0x10), (2, 0x20), (4, 0x40)])
def test_ioio(guest: Guest, size: int, bits: int) -> None:
    out = exit_of(guest.event(Event.IOIO, 0x3F8 << 16 | bits, rax=0x1122_3344))
    data = bytes((0x44, 0x33, 0x22, 0x11))[:size]
    assert out == exits.IoExit(0x3F8, size, True, data)
    assert guest.ghcb.get("sw_exit_info_1") == 0
    read = exit_of(guest.event(Event.IOIO, 0x60 << 16 | bits | 1, rax=0))
    assert read == exits.IoExit(0x60, size, False)
    assert guest.exits.complete(0, b"\x5a" * size, REGS) == Answer(REGS)
    assert guest.ghcb.get("rax") == int.from_bytes(b"\x5a" * size, "little")


@pytest.mark.parametrize("info", [0x3F8 << 16 | 0x10 | 1 << 2, 0x3F8 << 16])
def test_io_that_is_not_simulated_is_refused(guest: Guest, info: int) -> None:
    verdict = guest.event(Event.IOIO, info, rax=1, sw_scratch=SCRATCH)
    assert verdict == Answer(REGS)
    assert guest.ghcb.get("sw_exit_info_1") == Response.MALFORMED_INPUT


def test_cpuid_and_msrs(guest: Guest) -> None:
    assert guest.event(Event.CPUID, rax=0x8000_0000, rcx=0) == Answer(REGS)
    assert guest.ghcb.get("rax") == 0x8000_001F
    assert guest.event(Event.MSR, 0, rcx=0x10) == Answer(REGS)
    assert (guest.ghcb.get("rax"), guest.ghcb.get("rdx")) == (0x5566_7788, 0x1122_3344)
    assert guest.event(Event.MSR, 1, rcx=0x10, rax=9, rdx=1) == Answer(REGS)
    assert guest.running.vcpus[0].cpu.msrs[0x10] == 1 << 32 | 9
    for write, index in ((0, 0x12), (1, 0x11), (1, 0x12)):
        before = dict(guest.running.vcpus[0].cpu.msrs)
        assert guest.event(Event.MSR, write, rcx=index, rax=5, rdx=5) == Answer(REGS)
        assert guest.ghcb.get("sw_exit_info_1") == Response.ISSUE_EXCEPTION
        assert guest.ghcb.get("sw_exit_info_2") & 0xFF == 13
        assert guest.running.vcpus[0].cpu.msrs == before


def test_a_hypercall(guest: Guest) -> None:
    left = exit_of(guest.event(Event.VMMCALL, rax=12, rbx=1, rcx=2, rdx=3, cpl=0))
    assert isinstance(left, exits.HypercallExit)
    assert (left.nr, left.args) == (12, (1, 2, 3, 0))
    assert guest.exits.complete(0, -22, REGS) == Answer(REGS)
    assert guest.ghcb.get("rax") == (1 << 64) - 22


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio(guest: Guest, size: int) -> None:
    read = exit_of(guest.event(Event.MMIO_READ, 0xFEE0_0000, size, sw_scratch=SCRATCH))
    assert read == exits.MmioExit(0xFEE0_0000, size, False)
    assert guest.exits.complete(0, b"\x71" * size, REGS) == Answer(REGS)
    assert bytes(guest.memory.pages[GHCB][0x800 : 0x800 + size]) == b"\x71" * size
    write = exit_of(guest.event(Event.MMIO_WRITE, 0xFEE0_0000, size, sw_scratch=SCRATCH))
    assert write == exits.MmioExit(0xFEE0_0000, size, True, b"\x71" * size)


@pytest.mark.parametrize(
    ("gpa", "size", "scratch", "reason"),
    [
        (0xFEE0_0000, 3, SCRATCH, Malformed.INVALID_INPUT),
        (0xFEE0_0000, 0, SCRATCH, Malformed.INVALID_INPUT),
        (0xFEE0_0000, 1 << 40, SCRATCH, Malformed.INVALID_INPUT),
        (1 << 39, 4, SCRATCH, Malformed.INVALID_INPUT),
        (0xFEE0_0000, 4, GHCB, Malformed.INVALID_SCRATCH_AREA),
        (0xFEE0_0000, 8, GHCB + 0xFEC, Malformed.INVALID_SCRATCH_AREA),
        (0xFEE0_0000, 8, REQUEST, Malformed.INVALID_SCRATCH_AREA),
        (0xFEE0_0000, 8, 0, Malformed.INVALID_SCRATCH_AREA),
    ],
)
def test_mmio_that_cannot_be_is_refused(
    guest: Guest, gpa: int, size: int, scratch: int, reason: Malformed
) -> None:
    for event in (Event.MMIO_READ, Event.MMIO_WRITE):
        assert guest.event(event, gpa, size, sw_scratch=scratch) == Answer(REGS)
        guest.refused(reason)


def test_a_guest_request_goes_through_the_firmware(guest: Guest) -> None:
    guest.memory.write(REQUEST, b"request")
    assert guest.event(Event.GUEST_REQUEST, REQUEST, RESPONSE) == Answer(REGS)
    assert guest.asked == [b"request".ljust(4096, b"\0")]
    assert bytes(guest.memory.pages[RESPONSE]) == b"answer".ljust(4096, b"\0")
    assert guest.ghcb.get("sw_exit_info_1") == guest.ghcb.get("sw_exit_info_2") == 0


@pytest.mark.parametrize(
    ("request_page", "response_page"),
    [(REQUEST, REQUEST), (REQUEST + 8, RESPONSE), (REQUEST, RESPONSE + 1), (PRIVATE, RESPONSE)],
)
def test_a_guest_request_that_cannot_be_asks_nobody(
    guest: Guest, request_page: int, response_page: int
) -> None:
    assert guest.event(Event.GUEST_REQUEST, request_page, response_page) == Answer(REGS)
    guest.refused(Malformed.INVALID_INPUT)
    assert guest.asked == []


def test_an_answer_that_has_no_place_is_not_asked_for(guest: Guest) -> None:
    """The message counter moves with every request: one whose answer is lost ends the VMPCK."""
    assert guest.event(Event.GUEST_REQUEST, REQUEST, PRIVATE) == Answer(REGS)
    guest.refused(Malformed.INVALID_INPUT)
    assert guest.asked == []


def test_a_list_of_page_states_is_worked_off(guest: Guest) -> None:
    entries = [PscEntry(0x200 + n, PscOp.SHARED) for n in range(4)]
    entries += [PscEntry(0x400, PscOp.PRIVATE), PscEntry(0x600, PscOp.PRIVATE, 1)]
    guest.memory.pages[GHCB][0x800 : 0x800 + len(pack(entries))] = pack(entries)
    verdict = guest.event(Event.PSC, sw_scratch=SCRATCH)
    asked = []
    while isinstance(verdict, Leave):
        assert isinstance(verdict.exit, exits.HypercallExit)
        asked.append(verdict.exit.args[:2])
        verdict = guest.exits.complete(0, 0, REGS)
    assert asked == [(0x20_0000, 4), (0x40_0000, 1), (0x60_0000, 512)]
    assert verdict == Answer(REGS)
    assert guest.ghcb.get("sw_exit_info_2") == 0


def test_a_list_stops_where_the_vmm_refuses(guest: Guest) -> None:
    entries = [PscEntry(0x200, PscOp.SHARED), PscEntry(0x400, PscOp.PRIVATE)]
    guest.memory.pages[GHCB][0x800 : 0x800 + len(pack(entries))] = pack(entries)
    assert isinstance(guest.event(Event.PSC, sw_scratch=SCRATCH), Leave)
    assert guest.exits.complete(0, -22, REGS) == Answer(REGS)
    assert guest.ghcb.get("sw_exit_info_2") != 0
    assert guest.memory.pages[GHCB][0x800] == 0  # cur_entry: the first was not done


@pytest.mark.parametrize("scratch", [0, GHCB, GHCB + 0xFF0, GHCB + 0x1000, REQUEST, 1 << 63])
def test_a_list_outside_the_buffer_is_refused(guest: Guest, scratch: int) -> None:
    assert guest.event(Event.PSC, sw_scratch=scratch) == Answer(REGS)
    guest.refused(Malformed.INVALID_SCRATCH_AREA)


def test_a_request_to_end_is_heard(guest: Guest) -> None:
    ended(guest.event(Event.TERM_REQUEST))
