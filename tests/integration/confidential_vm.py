# SPDX-License-Identifier: GPL-2.0-or-later
"""A processor's answers to a confidential guest, for tests of the guest kernel alone.

As little as the guest can notice: which pages it has accepted, the calls, the exceptions. Written
from the manuals: Intel's GHCI and TDX module ABI, AMD's APM and GHCB specification, the kernel's
Documentation/virt/kvm/arm/hypercalls.rst. The GHCB's own layout is read by hwemu.snp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from guest_vm import PAGE, SHARED_BIT, GuestVm

from hwemu.cpu import api
from hwemu.snp import guestmessage
from hwemu.snp.ghcb import Event, Ghcb, Ioio
from hwemu.snp.ghcbmsr import Info, decode, message
from hwemu.snp.psc import Finished, PscList
from kvmsim import exits
from kvmsim.vmm.bounce import Disk
from kvmsim.vmm.launch import LaunchPage, PageType
from kvmsim.vmm.machine import MachineConfig

PRIVATE_VA = 0xFFFF_8000_0000_0000
U64 = (1 << 64) - 1
VE, VC = 20, 29
PROTECTED = frozenset({"in", "out", "cpuid", "rdmsr", "wrmsr", "vmmcall"})
VMPCK0 = bytes(range(32))
REPORT = bytes(range(256)) * 4

ALREADY_ACCEPTED, SIZE_MISMATCH = 0xB0A << 32, 0xC0000B0B << 32
RESTARTABLE = 0x8000_0004 << 32


class ConfidentialVm(GuestVm):
    """``small_units``: 2 MiB units that the host maps by 4 KiB, so that none is accepted whole."""

    instructions = PROTECTED

    def __init__(self, config: MachineConfig, disk: Disk | None = None) -> None:
        self.usable: set[int] = set()
        self.small_units: set[int] = set()
        self.large_accepts = self.small_accepts = 0
        self.exceptions: list[tuple[int, int]] = []
        self.loaded: list[LaunchPage] = []
        self._after: dict[int, Callable[[bytes | int | None], None]] = {}
        super().__init__(config, disk)
        for cpu in self.cpus:
            cpu.protect(self.instructions)

    def add_page(self, page: LaunchPage) -> None:
        self.loaded.append(page)
        if page.type is not PageType.VMSA:
            super().add_page(page)
            self.usable.add(page.gpa // PAGE)

    def may_use(self, gfn: int) -> bool:
        return gfn in self.usable

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> bool:
        changed = super().set_memory_attributes(gpa, size, private)
        if changed:
            self.usable -= set(range(gpa // PAGE, (gpa + size) // PAGE))
        return changed

    def punch(self, gfn: int, npages: int, *, spare: tuple[int, ...] = ()) -> None:
        super().punch(gfn, npages, spare=spare)
        self.usable -= set(range(gfn, gfn + npages))

    def answer(self, index: int, data: bytes | int | None) -> None:
        after = self._after.pop(index, None)
        if after is None:
            super().answer(index, data)
        else:
            after(data)

    def _is_hole(self, fault: api.Stage2Fault) -> bool:
        return False  # nobody emulates this guest's instructions: it is told instead

    def is_device(self, gpa: int) -> bool:
        """Whether an access is one that the guest must ask its host to do."""
        return self.is_shared_access(gpa) and not self._in_ram((gpa & ~SHARED_BIT) // PAGE)

    def raised(self, index: int, vector: int, code: int) -> None:
        """An exception at the instruction."""
        self.exceptions.append((vector, code))
        self.cpus[index].inject(vector, code if vector == VC else None)

    def set(self, index: int, **registers: int) -> None:
        cpu = self.cpus[index]
        masked = {name: value & U64 for name, value in registers.items()}
        cpu.set_regs(dataclasses.replace(cpu.get_regs(), **masked))

    def accept(self, gfn: int, large: bool) -> str:
        """What a processor says of accepting a page: fine, size, already."""
        pages = range(gfn, gfn + (512 if large else 1))
        if large and gfn // 512 in self.small_units:
            return "size"
        if large and any(page in self.usable for page in pages):
            return "already" if all(page in self.usable for page in pages) else "size"
        if not large and gfn in self.usable:
            return "already"
        self.usable |= set(pages)
        self.large_accepts += large
        self.small_accepts += not large
        return "fine"


@dataclasses.dataclass
class VeInfo:
    reason: int
    qualification: int = 0
    gla: int = 0
    gpa: int = 0
    length: int = 0


class TdxVm(ConfidentialVm):
    """TDX: TDCALL, TDVMCALL, #VE."""

    instructions = PROTECTED | {"hlt", "tdcall"}

    def __init__(self, config: MachineConfig, disk: Disk | None = None) -> None:
        self._ve: dict[int, VeInfo] = {}
        self.fatal = b""
        self.rtmr: list[tuple[int, int]] = []
        self.retry_after = 0
        self._interrupted: set[int] = set()
        super().__init__(config, disk)

    def emulate(self, index: int, exit: api.CpuExit) -> exits.Exit | None:
        regs = self.cpus[index].get_regs()
        match exit:
            case api.InterceptExit(instruction="tdcall"):
                return self._tdcall(index, regs)
            case api.InterceptExit(name, length, port, size, write):
                reason = {"hlt": 12, "cpuid": 10, "rdmsr": 31, "wrmsr": 32, "vmmcall": 18}
                number = reason.get(name, 30)
                what = (size - 1) | (not write) << 3 | port << 16 if number == 30 else 0
                self._raise(index, VeInfo(number, what, length=length))
                return None
            case api.Stage2Fault(gpa) if not self.is_shared_access(gpa):
                gfn = gpa // PAGE
                if self._private[gfn] and gfn not in self.usable:
                    self._raise(index, VeInfo(48, 1, PRIVATE_VA + gpa, gpa))
                    return None
            case api.Stage2Fault(gpa) if self.is_device(gpa):
                self._raise(index, VeInfo(48, gpa=gpa))
                return None
        return super().emulate(index, exit)

    def _raise(self, index: int, info: VeInfo) -> None:
        assert index not in self._ve, "a #VE before the last one was asked about: #DF"
        self._ve[index] = info
        self.raised(index, VE, info.reason)

    def _tdcall(self, index: int, regs: api.Regs) -> exits.Exit | None:
        match regs.rax:
            case 0:
                return self._vmcall(index, regs)
            case 1:
                vcpus = len(self.cpus)
                self.set(index, rax=0, rcx=40, rdx=0, r8=vcpus | vcpus << 32, r9=index)
            case 3:
                ve = self._ve.pop(index)
                self.set(index, rax=0, rcx=ve.reason, rdx=ve.qualification, r8=ve.gla,
                         r9=ve.gpa, r10=ve.length)  # fmt: skip
            case 4:
                assert regs.rcx % 1024 == 0
                assert regs.rdx % 64 == 0
                data = self.read_private(regs.rdx & -PAGE)[regs.rdx % PAGE :][:64]
                self.write_private(regs.rcx, data.ljust(1024, b"\xab"))
                self.set(index, rax=0)
            case 6:
                self.set(index, rax=self._accept(regs.rcx))
            case _:
                raise AssertionError(f"TDCALL leaf {regs.rax}")
        return None

    def _accept(self, rcx: int) -> int:
        gpa, large = rcx & -PAGE, bool(rcx & 7)
        assert not gpa & SHARED_BIT
        assert self._private[gpa // PAGE]
        if large and gpa not in self._interrupted:
            self._interrupted.add(gpa)
            return RESTARTABLE
        self._interrupted.discard(gpa)
        answers = {"fine": 0, "size": SIZE_MISMATCH | 1, "already": ALREADY_ACCEPTED}
        return answers[self.accept(gpa // PAGE, large)]

    def _vmcall(self, index: int, regs: api.Regs) -> exits.Exit | None:
        assert not regs.rcx & 0b10011
        self.set(index, rax=0, r10=0)
        if regs.r10:
            self._then(index, "r10")
            return exits.HypercallExit(regs.r10, (regs.r11, regs.r12, regs.r13, regs.r14))
        match regs.r11:
            case 30:
                self._then(index, "r11")
                data = regs.r15.to_bytes(8, "little")[: regs.r12] if regs.r13 else b""
                return exits.IoExit(regs.r14, regs.r12, bool(regs.r13), data)
            case 12:
                return exits.HltExit()
            case 10:
                self.set(index, r12=regs.r12, r13=1, r14=2, r15=3)
            case 31:
                self.set(index, r11=0x5EED)
            case 48:
                self._then(index, "r11")
                data = regs.r15.to_bytes(8, "little")[: regs.r12] if regs.r13 else b""
                return exits.MmioExit(regs.r14, regs.r12, bool(regs.r13), data)
            case 0x10001:
                self._map_gpa(index, regs.r12, regs.r13)
            case 0x10003:
                words = (regs.r14, regs.r15, regs.rbx, regs.rdi, regs.rsi, regs.r8, regs.r9,
                         regs.rdx)  # fmt: skip
                self.fatal = b"".join(w.to_bytes(8, "little") for w in words).rstrip(b"\0")
                self.stopped = self.machine.guest_fatal(index, self.fatal.decode())
            case _:
                self.set(index, r10=1 << 63)
        return None

    def _then(self, index: int, register: str) -> None:
        def after(data: bytes | int | None) -> None:
            if isinstance(data, bytes):
                data = int.from_bytes(data, "little")
            if data is not None:
                self.set(index, **{register: data})

        self._after[index] = after

    def _map_gpa(self, index: int, start: int, size: int) -> None:
        gpa = start & ~SHARED_BIT
        if self.retry_after and size > self.retry_after:
            result = self.machine.convert(gpa, self.retry_after, private=start == gpa)
            assert result == 0
            self.set(index, r10=1, r11=start + self.retry_after)
            return
        result = self.machine.convert(gpa, size, private=start == gpa)
        self.set(index, r10=0 if result == 0 else 1 << 63)


class SnpVm(ConfidentialVm):
    """SEV-SNP: PVALIDATE, the GHCB, #VC."""

    instructions = PROTECTED | {"pvalidate", "vmgexit"}

    def __init__(self, config: MachineConfig, disk: Disk | None = None) -> None:
        self._msr = [0] * config.vcpus
        self._registered = [0] * config.vcpus
        self.terminated: list[int] = []
        self._info_2 = 0
        super().__init__(config, disk)

    def add_page(self, page: LaunchPage) -> None:
        super().add_page(page)
        if page.type is PageType.SECRETS:
            self.write_private(page.gpa + 0x20, VMPCK0)

    def emulate(self, index: int, exit: api.CpuExit) -> exits.Exit | None:
        regs = self.cpus[index].get_regs()
        match exit:
            case api.InterceptExit("wrmsr" | "rdmsr" as name) if regs.rcx in (
                0xC001_0130,
                0xC001_0131,
            ):
                if name == "wrmsr":
                    self._msr[index] = (regs.rdx & 0xFFFF_FFFF) << 32 | regs.rax & 0xFFFF_FFFF
                else:
                    value = self._msr[index] if regs.rcx == 0xC001_0130 else 7
                    self.set(index, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
                return None
            case api.InterceptExit(instruction="vmgexit"):
                return self._vmgexit(index)
            case api.InterceptExit(instruction="pvalidate"):
                self._pvalidate(index, regs)
                return None
            case api.InterceptExit(name):
                codes = {"cpuid": 0x72, "rdmsr": 0x7C, "wrmsr": 0x7C, "vmmcall": 0x81}
                self.raised(index, VC, codes.get(name, 0x7B))
                return None
            case api.Stage2Fault(gpa) if not self.is_shared_access(gpa):
                gfn = (gpa & ~SHARED_BIT) // PAGE
                if self._private[gfn] and gfn not in self.usable:
                    self.raised(index, VC, 0x404)
                    return None
            case api.Stage2Fault(gpa) if self.is_device(gpa):
                self.raised(index, VC, 0x400)
                return None
        return super().emulate(index, exit)

    def _pvalidate(self, index: int, regs: api.Regs) -> None:
        gpa = regs.rax - PRIVATE_VA
        assert 0 <= gpa < SHARED_BIT, "the guest validates through its private map alone"
        gfn, large = gpa // PAGE, bool(regs.rcx & 1)
        assert self._private[gfn], "not assigned: #NPF"
        carry, status = 0, 0
        if regs.rdx & 1:
            how = self.accept(gfn, large)
            carry, status = int(how == "already"), 6 if how == "size" else 0
        else:
            assert not large
            carry = int(gfn not in self.usable)
            self.usable.discard(gfn)
            self._zap(gfn, 1)
        self.set(index, rax=status, rflags=regs.rflags & ~1 | carry)

    def _vmgexit(self, index: int) -> exits.Exit | None:
        word = self._msr[index]
        if word & 0xFFF:
            self._msr[index] = self._protocol(index, word)
            return None
        assert self._registered[index] == word, "a GHCB that was not registered"
        assert self.machine.is_shared(word, PAGE), "a private GHCB"
        ghcb = Ghcb(bytearray(self.read_shared(word, PAGE)))
        assert ghcb.version == 2
        self._info_2 = 0
        left = self._event(index, word, ghcb)
        if left is None:
            ghcb.answer(0, self._info_2)
            self.write_shared(word, bytes(ghcb.page))
        return left

    def _protocol(self, index: int, word: int) -> int:
        asked = decode(word)
        match asked.info:
            case Info.REG_GPA_REQ:
                self._registered[index] = asked.fields["gfn"] * PAGE
                return message(Info.REG_GPA_RESP, gfn=asked.fields["gfn"])
            case Info.PSC_REQ:
                private = asked.fields["operation"] == 1
                bad = self.machine.convert(asked.fields["gfn"] * PAGE, PAGE, private=private)
                return message(Info.PSC_RESP, error=int(bad != 0))
            case Info.TERM_REQ:
                self.terminated.append(asked.fields["reason"])
                self.stopped = self.machine.guest_fatal(index, "termination request")
                return 0
        raise AssertionError(f"{asked}")

    def _event(self, index: int, gpa: int, ghcb: Ghcb) -> exits.Exit | None:
        event = ghcb.event()
        match event:
            case Event.IOIO:
                io = Ioio.decode(ghcb.get("sw_exit_info_1"))
                self._then(index, gpa, ghcb, "rax" if io.reads else None)
                data = b"" if io.reads else ghcb.get("rax").to_bytes(8, "little")[: io.size]
                return exits.IoExit(io.port, io.size, not io.reads, data)
            case Event.VMMCALL:
                self._then(index, gpa, ghcb, "rax")
                names = ("rbx", "rcx", "rdx")
                return exits.HypercallExit(
                    ghcb.get("rax"), (*(ghcb.get(name) for name in names), 0)
                )
            case Event.CPUID:
                for name, value in zip(("rax", "rbx", "rcx", "rdx"), (2, 39, 0, 0), strict=True):
                    ghcb.set(name, value)
            case Event.MSR:
                if not ghcb.get("sw_exit_info_1"):
                    ghcb.set("rax", 0x5EED)
                    ghcb.set("rdx", 1)
            case Event.MMIO_READ | Event.MMIO_WRITE:
                return self._mmio(index, gpa, ghcb, event is Event.MMIO_WRITE)
            case Event.PSC:
                self._psc(gpa, ghcb)
            case Event.HV_FEATURES:
                self._info_2 = 3
            case Event.GUEST_REQUEST:
                self._request(ghcb)
            case _:
                raise AssertionError(f"event {event!r}")
        return None

    def _mmio(self, index: int, gpa: int, ghcb: Ghcb, write: bool) -> exits.Exit:
        size = ghcb.get("sw_exit_info_2")
        area = ghcb.scratch(gpa, size)
        data = bytes(area) if write else b""

        def after(answered: bytes | int | None) -> None:
            if isinstance(answered, bytes):
                area[:] = answered
            ghcb.answer()
            self.write_shared(gpa, bytes(ghcb.page))

        self._after[index] = after
        return exits.MmioExit(ghcb.get("sw_exit_info_1"), size, write, data)

    def _then(self, index: int, gpa: int, ghcb: Ghcb, register: str | None) -> None:
        def after(data: bytes | int | None) -> None:
            if isinstance(data, bytes):
                data = int.from_bytes(data, "little")
            if data is not None and register:
                ghcb.set(register, data & U64)
            ghcb.answer()
            self.write_shared(gpa, bytes(ghcb.page))

        self._after[index] = after

    def _psc(self, gpa: int, ghcb: Ghcb) -> None:
        work = PscList(ghcb.scratch(gpa, 0x7F0))
        while not isinstance(step := work.next_range(), Finished):
            ok = self.machine.convert(step.gpa, step.npages * PAGE, private=step.private) == 0
            if given_up := work.complete(int(ok)):
                step = given_up
                break
        self._info_2 = step.error

    def _request(self, ghcb: Ghcb) -> None:
        raw = self.read_shared(ghcb.get("sw_exit_info_1"), PAGE)
        asked = guestmessage.unseal(raw, VMPCK0)
        assert asked is not None, "a message with another seal"
        found = guestmessage.report_request(asked)
        assert found is not None
        payload = guestmessage.REPORT_RESPONSE.pack(0, 64 + len(REPORT)) + found[0] + REPORT
        answer = guestmessage.Message(
            guestmessage.MessageType.REPORT_RSP, payload, 0, asked.sequence + 1
        )
        sealed = answer.seal(VMPCK0).ljust(PAGE, b"\0")
        self.write_shared(ghcb.get("sw_exit_info_2"), sealed)


class PkvmVm(GuestVm):
    """pKVM: sharing and unsharing, by which contents stay."""

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> bool:
        for page in range(gpa, gpa + size, PAGE):
            if self._private[page // PAGE] is private:
                continue
            if private:
                self.write_private(page, self.read_shared(page, PAGE))
            else:
                self.write_shared(page, self.read_private(page))
        return super().set_memory_attributes(gpa, size, private)

    def emulate(self, index: int, exit: api.CpuExit) -> exits.Exit | None:
        match exit:
            case api.HypercallExit(0xC600_0002, args, "vmcall"):
                assert args[:3] == (0, 0, 0)
                self.cpus[index].complete(PAGE)
                return None
            case api.HypercallExit(0xC600_0003 | 0xC600_0004 as nr, args, "vmcall"):
                gpa, private = args[0], nr == 0xC600_0004
                assert args[1:3] == (0, 0)
                wrong = not self._in_ram(gpa // PAGE) or self._private[gpa // PAGE] is private
                wrong = wrong or self.machine.convert(gpa, PAGE, private=private) != 0
                self.cpus[index].complete(-3 & U64 if wrong else 0)
                return None
        return super().emulate(index, exit)
