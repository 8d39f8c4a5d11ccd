# SPDX-License-Identifier: GPL-2.0-or-later
"""The GHCB page: what a guest tells its hypervisor at a non-automatic exit, and which answers.

Layout: SEV-ES GHCB standardization (56421), ``struct ghcb`` in ``arch/x86/include/asm/svm.h``.  A
bitmap says which fields of the save area count, a bit for eight bytes; the others are not read.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from hwemu.snp.rmpentry import PAGE_SIZE

#: Offset of each field of 8 bytes that has a bit in the bitmap; CPL is one byte.
FIELDS: Final = {
    "cpl": 0x0CB,
    "xss": 0x140,
    "dr7": 0x160,
    "rax": 0x1F8,
    "rcx": 0x308,
    "rdx": 0x310,
    "rbx": 0x318,
    "sw_exit_code": 0x390,
    "sw_exit_info_1": 0x398,
    "sw_exit_info_2": 0x3A0,
    "sw_scratch": 0x3A8,
    "xcr0": 0x3E8,
}
VALID_BITMAP: Final = 0x3F0
SHARED_BUFFER: Final = 0x800
SHARED_BUFFER_SIZE: Final = 0x7F0
PROTOCOL_VERSION: Final = 0xFFA
USAGE: Final = 0xFFC


class Event(enum.IntEnum):
    """SW_EXITCODE: NAE events, those of the SVM exit and those of the protocol."""

    READ_DR7 = 0x27
    WRITE_DR7 = 0x47
    RDTSC = 0x6E
    RDPMC = 0x6F
    CPUID = 0x72
    INVD = 0x76
    IOIO = 0x7B
    MSR = 0x7C
    VMMCALL = 0x81
    RDTSCP = 0x87
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    MMIO_READ = 0x8000_0001
    MMIO_WRITE = 0x8000_0002
    NMI_COMPLETE = 0x8000_0003
    AP_RESET_HOLD = 0x8000_0004
    AP_JUMP_TABLE = 0x8000_0005
    PSC = 0x8000_0010
    GUEST_REQUEST = 0x8000_0011
    EXT_GUEST_REQUEST = 0x8000_0012
    AP_CREATE = 0x8000_0013
    HV_FEATURES = 0x8000_FFFD
    TERM_REQUEST = 0x8000_FFFE
    UNSUPPORTED = 0x8000_FFFF


_ALWAYS: Final = ("sw_exit_code", "sw_exit_info_1", "sw_exit_info_2")
#: What must be valid besides, before KVM looks (``sev_es_validate_vmgexit``).
NEEDS: Final[dict[Event, tuple[str, ...]]] = {
    Event.READ_DR7: (),
    Event.WRITE_DR7: ("rax",),
    Event.RDTSC: (),
    Event.RDPMC: ("rcx",),
    Event.CPUID: ("rax", "rcx"),
    Event.INVD: (),
    Event.IOIO: (),
    Event.MSR: ("rcx",),
    Event.VMMCALL: ("rax", "cpl"),
    Event.RDTSCP: (),
    Event.WBINVD: (),
    Event.MONITOR: ("rax", "rcx", "rdx"),
    Event.MWAIT: ("rax", "rcx"),
    Event.MMIO_READ: ("sw_scratch",),
    Event.MMIO_WRITE: ("sw_scratch",),
    Event.NMI_COMPLETE: (),
    Event.AP_RESET_HOLD: (),
    Event.AP_JUMP_TABLE: (),
    Event.PSC: ("sw_scratch",),
    Event.GUEST_REQUEST: (),
    Event.EXT_GUEST_REQUEST: ("rax", "rbx"),
    Event.AP_CREATE: (),
    Event.HV_FEATURES: (),
    Event.TERM_REQUEST: (),
    Event.UNSUPPORTED: (),
}
#: Events of SNP guests only.
SNP_ONLY: Final = frozenset(
    {Event.PSC, Event.GUEST_REQUEST, Event.EXT_GUEST_REQUEST, Event.AP_CREATE}
)


class Malformed(enum.IntEnum):
    """SW_EXITINFO2 with SW_EXITINFO1 2: what was wrong with a request (``GHCB_ERR_*``)."""

    NOT_REGISTERED = 1
    INVALID_USAGE = 2
    INVALID_SCRATCH_AREA = 3
    MISSING_INPUT = 4
    INVALID_INPUT = 5
    INVALID_EVENT = 6


class Response(enum.IntEnum):
    """SW_EXITINFO1, bits 31:0, of an answer (``GHCB_HV_RESP_*``)."""

    NO_ACTION = 0
    ISSUE_EXCEPTION = 1
    MALFORMED_INPUT = 2


class GhcbRefused(Exception):
    """A request that is answered with MALFORMED_INPUT."""

    def __init__(self, reason: Malformed, what: str) -> None:
        self.reason = reason
        super().__init__(f"GHCB {reason.name}: {what}")


class Ghcb:
    """A view of the 4096 bytes of a GHCB page; what is set is marked valid."""

    def __init__(self, page: bytearray | memoryview | None = None) -> None:
        self.page = page if page is not None else bytearray(PAGE_SIZE)
        if len(self.page) != PAGE_SIZE:
            raise ValueError(f"GHCB of {len(self.page)} bytes: a page has {PAGE_SIZE}")

    @staticmethod
    def _size(name: str) -> int:
        return 1 if name == "cpl" else 8

    def valid(self, name: str) -> bool:
        """Whether a field counts."""
        bit = FIELDS[name] >> 3
        return bool(self.page[VALID_BITMAP + (bit >> 3)] >> (bit & 7) & 1)

    def get(self, name: str) -> int:
        """Return a field, valid or not."""
        at = FIELDS[name]
        return int.from_bytes(self.page[at : at + self._size(name)], "little")

    def set(self, name: str, value: int) -> None:
        """Set a field and mark it valid; OverflowError if it does not fit."""
        at, size = FIELDS[name], self._size(name)
        self.page[at : at + size] = value.to_bytes(size, "little")
        bit = at >> 3
        self.page[VALID_BITMAP + (bit >> 3)] |= 1 << (bit & 7)

    def invalidate(self) -> None:
        """Mark nothing valid, as a guest does before it fills the page again."""
        self.page[VALID_BITMAP : VALID_BITMAP + 16] = bytes(16)
        self.page[FIELDS["sw_exit_code"] : FIELDS["sw_exit_code"] + 8] = bytes(8)

    @property
    def version(self) -> int:
        """The protocol version that the guest speaks."""
        return int(struct.unpack_from("<H", self.page, PROTOCOL_VERSION)[0])

    @version.setter
    def version(self, number: int) -> None:
        struct.pack_into("<H", self.page, PROTOCOL_VERSION, number)

    @property
    def usage(self) -> int:
        """What the page is used for; 0 is the protocol of this module."""
        return int(struct.unpack_from("<I", self.page, USAGE)[0])

    @usage.setter
    def usage(self, number: int) -> None:
        struct.pack_into("<I", self.page, USAGE, number)

    def event(self, *, snp: bool = True) -> Event:
        """Return what the guest asks for, once that is well-formed; else GhcbRefused."""
        if self.usage:
            raise GhcbRefused(Malformed.INVALID_USAGE, f"usage {self.usage:#x}")
        missing = [name for name in _ALWAYS if not self.valid(name)]
        code = self.get("sw_exit_code")
        if not missing:
            try:
                event = Event(code)
            except ValueError:
                raise GhcbRefused(Malformed.INVALID_EVENT, f"exit code {code:#x}") from None
            if event in SNP_ONLY and not snp:
                raise GhcbRefused(Malformed.INVALID_EVENT, f"{event.name} of a guest without SNP")
            missing = [name for name in self._needs(event) if not self.valid(name)]
        if missing:
            raise GhcbRefused(
                Malformed.MISSING_INPUT, f"exit code {code:#x} without {', '.join(missing)}"
            )
        return event

    def _needs(self, event: Event) -> tuple[str, ...]:
        info = self.get("sw_exit_info_1")
        if event is Event.IOIO:
            ioio = Ioio.decode(info)
            if ioio.string:
                return ("sw_scratch",)
            return () if ioio.reads else ("rax",)
        if event is Event.MSR and info:
            return ("rcx", "rax", "rdx")
        if event is Event.CPUID and self.get("rax") == 0xD and self.valid("rax"):
            return ("rax", "rcx", "xcr0")
        if event is Event.AP_CREATE and info & 0xFFFF != ApRequest.DESTROY:
            return ("rax",)
        return NEEDS[event]

    def refuse(self, refused: GhcbRefused) -> None:
        """Answer a malformed request."""
        self.answer(Response.MALFORMED_INPUT, refused.reason)

    def answer(self, info_1: int = Response.NO_ACTION, info_2: int = 0) -> None:
        """Answer a request with SW_EXITINFO1 and SW_EXITINFO2."""
        self.set("sw_exit_info_1", info_1)
        self.set("sw_exit_info_2", info_2)

    def scratch(self, gpa: int, length: int) -> memoryview:
        """Return ``length`` bytes of the shared buffer that SW_SCRATCH names.

        ``gpa`` is the page's.  Since version 2 the scratch area lies in the GHCB; GhcbRefused if
        this one does not.
        """
        start = self.get("sw_scratch") - gpa
        inside = start >= SHARED_BUFFER and start + length <= SHARED_BUFFER + SHARED_BUFFER_SIZE
        if not inside or length <= 0:
            raise GhcbRefused(
                Malformed.INVALID_SCRATCH_AREA,
                f"{length} bytes at {self.get('sw_scratch'):#x}: not in the shared buffer of "
                f"{gpa:#x}",
            )
        return memoryview(self.page)[start : start + length]


class ApRequest(enum.IntEnum):
    """SW_EXITINFO1, bits 31:0, of AP_CREATE; bits 63:32 are the APIC id."""

    CREATE_ON_INIT = 0
    CREATE = 1
    DESTROY = 2


@dataclass(frozen=True, slots=True)
class ApCreate:
    """An AP_CREATE event: VMSA gpa in bytes, VMPL in bits 19:16 of SW_EXITINFO1."""

    request: ApRequest
    apic_id: int
    vmpl: int
    vmsa: int

    @classmethod
    def decode(cls, info_1: int, info_2: int) -> ApCreate:
        """Read the event; GhcbRefused for a request or a VMSA address that KVM refuses.

        A VMSA that begins a page of 2 MiB is refused for the erratum that ``sev_snp_ap_creation``
        names.
        """
        code = info_1 & 0xFFFF
        if code not in ApRequest._value2member_map_:
            raise GhcbRefused(Malformed.INVALID_INPUT, f"AP_CREATE request {code}")
        request = ApRequest(code)
        if request is not ApRequest.DESTROY and (info_2 % PAGE_SIZE or info_2 % (2 << 20) == 0):
            raise GhcbRefused(Malformed.INVALID_INPUT, f"AP_CREATE with a VMSA at {info_2:#x}")
        return cls(request, info_1 >> 32, info_1 >> 16 & 0xF, info_2)


@dataclass(frozen=True, slots=True)
class Ioio:
    """SW_EXITINFO1 of IOIO, as EXITINFO1 of the SVM exit (APM vol. 2, 15.10.2)."""

    port: int
    size: int
    reads: bool
    string: bool
    repeat: bool

    @classmethod
    def decode(cls, info: int) -> Ioio:
        """Read the word; ``size`` in bytes."""
        return cls(
            info >> 16 & 0xFFFF, info >> 4 & 7, bool(info & 1), bool(info & 4), bool(info & 8)
        )

    def encode(self) -> int:
        """Return the word."""
        return (
            self.port << 16 | self.size << 4 | self.repeat << 3 | self.string << 2 | int(self.reads)
        )
