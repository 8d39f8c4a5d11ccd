# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtual machine control block and the small host ("L1") area around it.

AMD APM vol. 2: layout in appendix B, exit codes in appendix C, permission maps in 15.10–15.11.
Unicorn delivers #VMEXIT as interrupt number ``VMEXIT + exit code`` while the CPU stays in guest
state, so the block is read by VMRUN only and written back by nobody but the fault address.
"""

from __future__ import annotations

from hwemu.cpu.api import Regs, Segment, Sregs

PAGE_SIZE = 4096
VMEXIT = 0x100

# exit codes (appendix C)
EXIT_EXCEPTION = 0x40
EXIT_HLT = 0x78
EXIT_CPUID = 0x72
EXIT_INVLPGA = 0x7A
EXIT_IOIO = 0x7B
EXIT_MSR = 0x7C
EXIT_SHUTDOWN = 0x7F
EXIT_VMRUN = 0x80
EXIT_VMMCALL = 0x81
EXIT_SKINIT = 0x86
EXIT_NPF = 0x400

# exit_info_1 of a nested page fault (15.25.6)
NPF_PRESENT = 1 << 0
NPF_WRITE = 1 << 1
NPF_FETCH = 1 << 4

# control area
_INTERCEPT_EXCEPTIONS = 0x08
_INTERCEPT = 0x0C
_IOPM_BASE = 0x40
_MSRPM_BASE = 0x48
_ASID = 0x58
EXIT_INFO_2 = 0x80
_NESTED_CONTROL = 0x90
_NESTED_CR3 = 0xB0

# save area
_ES, _CS, _SS, _DS, _FS, _GS = (0x400 + 16 * index for index in range(6))
_GDTR, _LDTR, _IDTR, _TR = (0x460 + 16 * index for index in range(4))
_EFER, _CR4, _CR3, _CR0 = 0x4D0, 0x548, 0x550, 0x558
_DR7, _DR6, _RFLAGS, _RIP = 0x560, 0x568, 0x570, 0x578
_RSP, _RAX = 0x5D8, 0x5F8
_STAR = 0x600
_LSTAR, _CSTAR, _SFMASK, _KERNEL_GS_BASE = 0x608, 0x610, 0x618, 0x620
_SYSENTER_CS, _SYSENTER_ESP, _SYSENTER_EIP, _CR2 = 0x628, 0x630, 0x638, 0x640

EFER_SVME = 1 << 12
DR6_RESET, DR7_RESET = 0xFFFF0FF0, 0x400

_INTERCEPTS = (
    *(EXIT_CPUID, EXIT_HLT, EXIT_INVLPGA, EXIT_IOIO, EXIT_MSR, EXIT_SHUTDOWN),
    *range(EXIT_VMRUN, EXIT_SKINIT + 1),
)
INTERCEPT_WORD = sum(1 << (code - 0x60) for code in _INTERCEPTS)

# the host area, offsets from its base
STUB = 0x0000
VMCB = 0x1000
HOST_SAVE = 0x2000
IO_MAP = 0x3000  # three pages
MSR_MAP = 0x6000  # two pages
PRIVATE_TABLES = 0x8000  # up to eight pages for the device walk
AREA_SIZE = 0x10000

STUB_CODE = bytes.fromhex("0f01da 0f01d8 f4")  # vmload rax; vmrun rax; hlt


class HostArea:
    """The L1 area in ``buffer`` (AREA_SIZE bytes, zeroed), which the engine maps at ``hpa``."""

    def __init__(self, buffer: memoryview, hpa: int) -> None:
        self.hpa = hpa
        self._bytes = buffer
        self.words = buffer.cast("Q")
        self._bytes[STUB : STUB + len(STUB_CODE)] = STUB_CODE
        self._bytes[IO_MAP : IO_MAP + 3 * PAGE_SIZE] = b"\xff" * (3 * PAGE_SIZE)
        self._bytes[MSR_MAP : MSR_MAP + 2 * PAGE_SIZE] = b"\xff" * (2 * PAGE_SIZE)
        self._fault_word = (VMCB + EXIT_INFO_2) >> 3

    @property
    def vmcb_hpa(self) -> int:
        """What VMRUN takes in RAX."""
        return self.hpa + VMCB

    @property
    def exit_info_2(self) -> int:
        """Faulting guest-physical address, page-fault address or next RIP of the last exit."""
        return int(self.words[self._fault_word])

    def _put(self, offset: int, value: int, size: int = 8) -> None:
        at = VMCB + offset
        self._bytes[at : at + size] = value.to_bytes(size, "little")

    def _put_segment(self, offset: int, segment: Segment) -> None:
        self._put(offset, segment.selector, 2)
        self._put(offset + 2, segment.attributes, 2)
        self._put(offset + 4, segment.limit, 4)
        self._put(offset + 8, segment.base)

    def fill(self, regs: Regs, sregs: Sregs, syscall: dict[str, int], nested_cr3: int) -> None:
        """Write everything VMRUN and VMLOAD read, for entering the guest in this state.

        ``syscall`` holds star, lstar, cstar, fmask, kernelgsbase (values of those MSRs).
        """
        self._put(_INTERCEPT_EXCEPTIONS, 0xFFFF_FFFF, 4)
        self._put(_INTERCEPT, INTERCEPT_WORD)
        self._put(_IOPM_BASE, self.hpa + IO_MAP)
        self._put(_MSRPM_BASE, self.hpa + MSR_MAP)
        self._put(_ASID, 1, 4)
        self._put(_NESTED_CONTROL, 1)
        self._put(_NESTED_CR3, nested_cr3)
        segments = (
            (_ES, sregs.es),
            (_CS, sregs.cs),
            (_SS, sregs.ss),
            (_DS, sregs.ds),
            (_FS, sregs.fs),
            (_GS, sregs.gs),
            (_LDTR, sregs.ldt),
            (_TR, sregs.tr),
        )
        for offset, segment in segments:
            self._put_segment(offset, segment)
        for offset, table in ((_GDTR, sregs.gdt), (_IDTR, sregs.idt)):
            self._put_segment(offset, Segment(0, table.base, table.limit))
        words = (
            # the guest runs with SVME or VMMCALL would be undefined; RDMSR hides the bit
            (_EFER, sregs.efer | EFER_SVME),
            (_CR4, sregs.cr4),
            (_CR3, sregs.cr3),
            (_CR0, sregs.cr0),
            (_CR2, sregs.cr2),
            (_DR6, DR6_RESET),
            (_DR7, DR7_RESET),
            (_RFLAGS, regs.rflags),
            (_RIP, regs.rip),
            (_RSP, regs.rsp),
            (_RAX, regs.rax),
            (_STAR, syscall["star"]),
            (_LSTAR, syscall["lstar"]),
            (_CSTAR, syscall["cstar"]),
            (_SFMASK, syscall["fmask"]),
            (_KERNEL_GS_BASE, syscall["kernelgsbase"]),
        )
        for offset, value in words:
            self._put(offset, value)
