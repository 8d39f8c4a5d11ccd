# SPDX-License-Identifier: GPL-2.0-or-later
"""VMGEXIT: what an SNP guest asks of its hypervisor, by MSR or by GHCB page.

SEV-ES GHCB standardization (56421); sev_handle_vmgexit() and sev_handle_vmgexit_msr_protocol() of
arch/x86/kvm/svm/sev.c (v6.18). What is refused is told to the guest; only a guest whose request
cannot even be answered is ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from hwemu.cpu import cpuid
from hwemu.cpu.api import Regs
from hwemu.snp import ghcbmsr
from hwemu.snp.ghcb import Event, Ghcb, GhcbRefused, Ioio, Malformed, Response
from hwemu.snp.ghcbmsr import Feature, Info
from hwemu.snp.psc import MAX_ENTRIES, Finished, MapGpaRange, PscList, PscOp
from kvmsim import exits, rangelist
from kvmsim.confidential.guestview import GuestView, NotShared
from kvmsim.guard import Answer, Leave, Verdict
from kvmsim.running import RunningVm
from kvmsim.uapi import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVM_SYSTEM_EVENT_SEV_TERM,
    KVMSIM_MAP_GPA_RANGES_MAX,
    PAGE_SHIFT,
    PAGE_SIZE,
)

MSR_GHCB: Final = 0xC001_0130
MSR_SEV_STATUS: Final = 0xC001_0131
SEV_STATUS: Final = 0b111
"""SEV, SEV-ES and SEV-SNP are active (APM vol. 2, 15.34.10)."""
PROTOCOL_MIN, PROTOCOL_MAX = 1, 2
FEATURES: Final = Feature.SNP

_MASK32: Final = 0xFFFF_FFFF
_RSI: Final = 0x330  # of the GHCB page; KVM reads it for VMMCALL whether it is valid or not
_GP: Final = 13 | 3 << 8 | 1 << 31  # EVENTINJ of #GP(0) (APM vol. 2, 15.20)
_PSC_LIST: Final = 8 + 8 * MAX_ENTRIES
_MAP_2M: Final = 1  # KVM_MAP_GPA_RANGE_PAGE_SZ_2M

#: Asks the AMD-SP: (request page) → (response page, its status).
GuestRequest = Callable[[bytes], tuple[bytes, int]]


@dataclass(slots=True)
class _Vcpu:
    """What VMGEXIT keeps of one vCPU."""

    msr: int = 0
    registered: int | None = None  #: gpa of its GHCB
    ghcb: Ghcb | None = None  #: the request under way
    event: Event | None = None
    psc: PscList | None = None
    asked: Info | None = None


@dataclass(slots=True)
class VmgExits:
    """The requests of one guest. ``c_bit`` is the position of the C-bit in a gpa."""

    running: RunningVm
    c_bit: int
    guest_request: GuestRequest
    _vcpus: dict[int, _Vcpu] = field(default_factory=dict)
    _view: GuestView = field(init=False)

    def __post_init__(self) -> None:
        self._view = GuestView(self.running)

    # --- the MSR --------------------------------------------------------------------------------

    def read_msr(self, vcpu: int) -> int:
        """RDMSR of the GHCB MSR."""
        return self._of(vcpu).msr

    def write_msr(self, vcpu: int, value: int) -> None:
        """WRMSR of it: nothing happens before VMGEXIT."""
        self._of(vcpu).msr = value

    def _of(self, vcpu: int) -> _Vcpu:
        return self._vcpus.setdefault(vcpu, _Vcpu())

    # --- a request ------------------------------------------------------------------------------

    def begin(self, vcpu: int, regs: Regs) -> Verdict:
        """VMGEXIT with the MSR as it is."""
        state = self._of(vcpu)
        try:
            message = ghcbmsr.decode(state.msr)
        except ValueError:
            return self._end(state.msr)
        if message.info is not Info.GHCB_GPA:
            handler = _MESSAGES.get(message.info)
            if handler is None:
                return self._end(state.msr)
            return handler(self, vcpu, message.fields, regs)
        return self._page(vcpu, state, message.fields["gfn"] << PAGE_SHIFT, regs)

    def complete(self, vcpu: int, data: bytes | int | None, regs: Regs) -> Verdict:
        """The VMM has answered."""
        state = self._of(vcpu)
        number = int.from_bytes(data, "little") if isinstance(data, bytes) else data or 0
        if state.asked is Info.PSC_REQ:
            state.asked = None
            error = ghcbmsr.PSC_RESP_ERROR if number else 0
            return self._respond(vcpu, regs, Info.PSC_RESP, error=error)
        ghcb = state.ghcb
        assert ghcb is not None
        assert state.registered is not None
        if state.psc is not None:
            asked = state.psc.under_way
            if asked == 1 and not self.running.batches:
                done = 0 if number else 1
            else:  # of a list: how many, or an errno
                done = number if number <= asked else 0
            return self._psc(vcpu, state, regs, state.psc.complete(done))
        if state.event is Event.MMIO_READ:
            size = ghcb.get("sw_exit_info_2")
            area = ghcb.scratch(state.registered, size)
            area[:] = number.to_bytes(size, "little")
        elif state.event in (Event.IOIO, Event.VMMCALL):
            ghcb.set("rax", number & (1 << 64) - 1)
        return self._answer(state, regs)

    def _respond(self, vcpu: int, regs: Regs, info: Info, **fields: int) -> Verdict:
        self._of(vcpu).msr = ghcbmsr.message(info, **fields)
        return Answer(regs)

    def _end(self, word: int) -> Leave:
        """A request that has no answer: KVM_SYSTEM_EVENT_SEV_TERM."""
        return Leave(exits.SystemEventExit(KVM_SYSTEM_EVENT_SEV_TERM, (word,)))

    # --- messages of the MSR protocol ------------------------------------------------------------

    def _sev_info(self, vcpu: int, fields: Mapping[str, int], regs: Regs) -> Verdict:
        return self._respond(
            vcpu, regs, Info.SEV_INFO_RESP, cbit=self.c_bit, min=PROTOCOL_MIN, max=PROTOCOL_MAX
        )

    def _msr_cpuid(self, vcpu: int, fields: Mapping[str, int], regs: Regs) -> Verdict:
        register = fields["register"]
        value = self.cpuid(vcpu, fields["function"], 0)[register]
        return self._respond(vcpu, regs, Info.CPUID_RESP, register=register, value=value)

    def _preferred(self, vcpu: int, fields: Mapping[str, int], regs: Regs) -> Verdict:
        return self._respond(vcpu, regs, Info.PREF_GPA_RESP, gfn=ghcbmsr.NO_GFN)

    def _register(self, vcpu: int, fields: Mapping[str, int], regs: Regs) -> Verdict:
        self._of(vcpu).registered = fields["gfn"] << PAGE_SHIFT
        return self._respond(vcpu, regs, Info.REG_GPA_RESP, gfn=fields["gfn"])

    def _msr_psc(self, vcpu: int, fields: Mapping[str, int], regs: Regs) -> Verdict:
        if fields["operation"] not in (PscOp.PRIVATE, PscOp.SHARED):
            return self._respond(vcpu, regs, Info.PSC_RESP, error=ghcbmsr.PSC_RESP_ERROR)
        self._of(vcpu).asked = Info.PSC_REQ
        private = fields["operation"] == PscOp.PRIVATE
        return self._map(MapGpaRange(fields["gfn"] << PAGE_SHIFT, 1, private, 0))

    def _features(self, vcpu: int, fields: Mapping[str, int], regs: Regs) -> Verdict:
        return self._respond(vcpu, regs, Info.HV_FT_RESP, features=int(FEATURES))

    def _terminate(self, vcpu: int, fields: Mapping[str, int], regs: Regs) -> Verdict:
        return self._end(self._of(vcpu).msr)

    def cpuid(self, vcpu: int, leaf: int, subleaf: int) -> cpuid.Leaf:
        """What CPUID says in an SNP guest; 0x8000001F tells of the C-bit (APM vol. 3, E.4.17)."""
        if leaf == 0x8000_001F:
            return 1 << 1 | 1 << 3 | 1 << 4, self.c_bit | 1 << 6, 0, 0
        if leaf == 0x8000_0000:
            return (0x8000_001F, *cpuid.fixed(cpuid.DEFAULT, vcpu)(leaf, subleaf)[1:])
        return cpuid.fixed(cpuid.DEFAULT, vcpu)(leaf, subleaf)

    # --- GHCB pages ------------------------------------------------------------------------------

    def _page(self, vcpu: int, state: _Vcpu, gpa: int, regs: Regs) -> Verdict:
        if state.registered != gpa:  # 56421, 2.3.2: an SNP guest registers it first
            return self._end(state.msr)
        try:
            state.ghcb = ghcb = Ghcb(bytearray(self._view.read(gpa, PAGE_SIZE)))
        except NotShared:
            return self._end(state.msr)
        try:
            state.event = ghcb.event()
            handler = _EVENTS.get(state.event)
            if handler is None:
                raise GhcbRefused(Malformed.INVALID_EVENT, f"{state.event.name} is not simulated")
            return handler(self, vcpu, state, regs)
        except GhcbRefused as refused:
            ghcb.refuse(refused)
            return self._write_back(state, regs)

    def _answer(self, state: _Vcpu, regs: Regs, info_2: int = 0) -> Verdict:
        assert state.ghcb is not None
        state.ghcb.answer(Response.NO_ACTION, info_2)
        return self._write_back(state, regs)

    def _write_back(self, state: _Vcpu, regs: Regs) -> Verdict:
        ghcb, gpa = state.ghcb, state.registered
        assert ghcb is not None
        assert gpa is not None
        state.ghcb = state.event = state.psc = None
        try:
            self._view.write(gpa, bytes(ghcb.page))
        except NotShared:  # it was converted under us
            return self._end(state.msr)
        return Answer(regs)

    def _leaves(self, state: _Vcpu, exit_: exits.Exit, regs: Regs) -> Verdict:
        """An exit without an answer: the guest has its own already."""
        verdict = self._answer(state, regs)
        return Leave(exit_, regs) if isinstance(verdict, Answer) else verdict

    def _ioio(self, vcpu: int, state: _Vcpu, regs: Regs) -> Verdict:
        assert state.ghcb is not None
        ioio = Ioio.decode(state.ghcb.get("sw_exit_info_1"))
        if ioio.string or ioio.size not in (1, 2, 4):
            raise GhcbRefused(Malformed.INVALID_INPUT, f"{ioio} is not simulated")
        if ioio.reads:
            return Leave(exits.IoExit(ioio.port, ioio.size, False))
        value = state.ghcb.get("rax") & (1 << 8 * ioio.size) - 1
        data = value.to_bytes(ioio.size, "little")
        return self._leaves(state, exits.IoExit(ioio.port, ioio.size, True, data), regs)

    def _cpuid(self, vcpu: int, state: _Vcpu, regs: Regs) -> Verdict:
        ghcb = state.ghcb
        assert ghcb is not None
        answer = self.cpuid(vcpu, ghcb.get("rax") & _MASK32, ghcb.get("rcx") & _MASK32)
        for name, value in zip(("rax", "rbx", "rcx", "rdx"), answer, strict=True):
            ghcb.set(name, value)
        return self._answer(state, regs)

    def _msr(self, vcpu: int, state: _Vcpu, regs: Regs) -> Verdict:
        ghcb, cpu = state.ghcb, self.running.vcpus[vcpu].cpu
        assert ghcb is not None
        index = ghcb.get("rcx") & _MASK32
        if ghcb.get("sw_exit_info_1"):
            value: int | None = (ghcb.get("rdx") & _MASK32) << 32 | ghcb.get("rax") & _MASK32
            assert value is not None
            value = 0 if cpu.set_msr(index, value) else None
        else:
            value = cpu.get_msr(index)
        if value is None:
            ghcb.answer(Response.ISSUE_EXCEPTION, _GP)
            return self._write_back(state, regs)
        if not ghcb.get("sw_exit_info_1"):
            ghcb.set("rax", value & _MASK32)
            ghcb.set("rdx", value >> 32)
        return self._answer(state, regs)

    def _vmmcall(self, vcpu: int, state: _Vcpu, regs: Regs) -> Verdict:
        ghcb = state.ghcb
        assert ghcb is not None
        rsi = int.from_bytes(ghcb.page[_RSI : _RSI + 8], "little")
        args = (ghcb.get("rbx"), ghcb.get("rcx"), ghcb.get("rdx"), rsi)
        return Leave(exits.HypercallExit(ghcb.get("rax"), args))

    def _mmio(self, vcpu: int, state: _Vcpu, regs: Regs) -> Verdict:
        ghcb = state.ghcb
        assert ghcb is not None
        assert state.registered is not None
        gpa, size = ghcb.get("sw_exit_info_1"), ghcb.get("sw_exit_info_2")
        if size not in (1, 2, 4, 8) or gpa >> self.c_bit:
            raise GhcbRefused(Malformed.INVALID_INPUT, f"MMIO of {size} bytes at {gpa:#x}")
        area = ghcb.scratch(state.registered, size)
        if state.event is Event.MMIO_READ:
            return Leave(exits.MmioExit(gpa, size, False))
        return self._leaves(state, exits.MmioExit(gpa, size, True, bytes(area)), regs)

    def _hv_features(self, vcpu: int, state: _Vcpu, regs: Regs) -> Verdict:
        return self._answer(state, regs, int(FEATURES))

    def _guest_request(self, vcpu: int, state: _Vcpu, regs: Regs) -> Verdict:
        """snp_handle_guest_req(): two shared pages, one after the other through the AMD-SP."""
        ghcb = state.ghcb
        assert ghcb is not None
        request, response = ghcb.get("sw_exit_info_1"), ghcb.get("sw_exit_info_2")
        if request % PAGE_SIZE or response % PAGE_SIZE or request == response:
            raise GhcbRefused(Malformed.INVALID_INPUT, f"pages {request:#x} and {response:#x}")
        try:
            self._view.read(response, PAGE_SIZE)  # else a message is counted that nobody gets
            answer, status = self.guest_request(self._view.read(request, PAGE_SIZE))
            self._view.write(response, answer.ljust(PAGE_SIZE, b"\0"))
        except NotShared as error:
            raise GhcbRefused(Malformed.INVALID_INPUT, str(error)) from None
        return self._answer(state, regs, status)

    def _ended(self, vcpu: int, state: _Vcpu, regs: Regs) -> Verdict:
        return self._end(state.msr)

    # --- page state changes ----------------------------------------------------------------------

    def _begin_psc(self, vcpu: int, state: _Vcpu, regs: Regs) -> Verdict:
        ghcb = state.ghcb
        assert ghcb is not None
        assert state.registered is not None
        left = state.registered + 0x800 + 0x7F0 - ghcb.get("sw_scratch")
        state.psc = PscList(ghcb.scratch(state.registered, min(left, _PSC_LIST)))
        return self._psc(vcpu, state, regs, None)

    def _psc(self, vcpu: int, state: _Vcpu, regs: Regs, ended: Finished | None) -> Verdict:
        assert state.psc is not None
        found = ended or state.psc.next_range()
        if isinstance(found, Finished):
            return self._answer(state, regs, int(found.error))
        if self.running.batches:
            wanted = [found, *state.psc.further(KVMSIM_MAP_GPA_RANGES_MAX - 1)]
            return Leave(exits.map_gpa_ranges([self._range(each) for each in wanted]))
        return self._map(found)

    def _map(self, wanted: MapGpaRange) -> Leave:
        return Leave(exits.HypercallExit(KVM_HC_MAP_GPA_RANGE, self._range(wanted)))

    def _range(self, wanted: MapGpaRange) -> rangelist.MapGpaRange:
        attributes = KVM_MAP_GPA_RANGE_ENCRYPTED if wanted.private else 0
        attributes |= _MAP_2M if wanted.size else 0
        return rangelist.MapGpaRange(wanted.gpa, wanted.npages, attributes)


_Message = Callable[[VmgExits, int, Mapping[str, int], Regs], Verdict]
_MESSAGES: Final[Mapping[Info, _Message]] = {
    Info.SEV_INFO_REQ: VmgExits._sev_info,
    Info.CPUID_REQ: VmgExits._msr_cpuid,
    Info.PREF_GPA_REQ: VmgExits._preferred,
    Info.REG_GPA_REQ: VmgExits._register,
    Info.PSC_REQ: VmgExits._msr_psc,
    Info.HV_FT_REQ: VmgExits._features,
    Info.TERM_REQ: VmgExits._terminate,
}

_Handler = Callable[[VmgExits, int, _Vcpu, Regs], Verdict]
_EVENTS: Final[Mapping[Event, _Handler]] = {
    Event.IOIO: VmgExits._ioio,
    Event.CPUID: VmgExits._cpuid,
    Event.MSR: VmgExits._msr,
    Event.VMMCALL: VmgExits._vmmcall,
    Event.MMIO_READ: VmgExits._mmio,
    Event.MMIO_WRITE: VmgExits._mmio,
    Event.PSC: VmgExits._begin_psc,
    Event.GUEST_REQUEST: VmgExits._guest_request,
    Event.HV_FEATURES: VmgExits._hv_features,
    Event.TERM_REQUEST: VmgExits._ended,
}
