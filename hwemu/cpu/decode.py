# SPDX-License-Identifier: GPL-2.0-or-later
"""The few instructions whose length or name the engine must know: no general decoder.

Encodings: AMD APM vol. 3, Intel SDM vol. 2 (VMCALL) and the TDX module specification (TDCALL).
"""

from __future__ import annotations

from dataclasses import dataclass

_LEGACY = frozenset((0xF0, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65, 0x66, 0x67))
_ANY = None

# (mandatory prefix, bytes behind 0f 01) -> mnemonic; the first match counts
_GROUP_7: tuple[tuple[int | None, int, str], ...] = (
    (0xF2, 0xD9, "vmgexit"),
    (0xF3, 0xD9, "vmgexit"),
    (_ANY, 0xD9, "vmmcall"),
    (0x66, 0xCC, "tdcall"),
    (0x66, 0xCF, "seamcall"),
    (0xF2, 0xFF, "pvalidate"),
    (0xF3, 0xFF, "psmash"),
    (0xF3, 0xFE, "rmpadjust"),
    (0xF2, 0xFE, "rmpupdate"),
    (_ANY, 0xC1, "vmcall"),
)
# opcode -> (mnemonic, bytes of an immediate)
_PORT = {
    **dict.fromkeys((0xE4, 0xE5), ("in", 1)),
    **dict.fromkeys((0xEC, 0xED), ("in", 0)),
    **dict.fromkeys((0x6C, 0x6D), ("ins", 0)),
    **dict.fromkeys((0xE6, 0xE7), ("out", 1)),
    **dict.fromkeys((0xEE, 0xEF), ("out", 0)),
    **dict.fromkeys((0x6E, 0x6F), ("outs", 0)),
}
_TWO_BYTE = {0x05: "syscall", 0x30: "wrmsr", 0x32: "rdmsr", 0xA2: "cpuid"}

RING0_ONLY = frozenset(("tdcall", "seamcall", "pvalidate", "psmash", "rmpadjust", "rmpupdate"))


@dataclass(frozen=True, slots=True)
class Instruction:
    """A recognised instruction and its length in bytes.

    ``repeated``, of port I/O: it has a REP prefix; ``other_address``: and one for address size.
    """

    name: str
    length: int
    repeated: bool = False
    other_address: bool = False


def recognise(code: bytes) -> Instruction | None:
    """Name and length of the instruction at the start of ``code``, None if it is not one of ours.

    Knows HLT, CPUID, SYSCALL, RDMSR, WRMSR, port I/O and the calls to a host or a security module.
    """
    at = 0
    prefixes = set()
    while at < len(code) and code[at] in _LEGACY:
        prefixes.add(code[at])
        at += 1
    if at < len(code) and 0x40 <= code[at] <= 0x4F:
        at += 1
    rest = code[at : at + 3]
    if rest[:1] == b"\xf4":
        return Instruction("hlt", at + 1)
    if rest and rest[0] in _PORT:
        name, immediate = _PORT[rest[0]]
        repeated = name.endswith("s") and not prefixes.isdisjoint((0xF2, 0xF3))
        return Instruction(name, at + 1 + immediate, repeated, 0x67 in prefixes)
    if rest[:1] != b"\x0f" or len(rest) < 2:
        return None
    if rest[1] in _TWO_BYTE:
        return Instruction(_TWO_BYTE[rest[1]], at + 2)
    if rest[1] == 0x01 and len(rest) == 3:
        for prefix, opcode, mnemonic in _GROUP_7:
            if rest[2] == opcode and (prefix is _ANY or prefix in prefixes):
                return Instruction(mnemonic, at + 3)
    return None
