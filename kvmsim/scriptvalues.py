# SPDX-License-Identifier: GPL-2.0-or-later
"""Values that people write, in options of commands and in scripts: sizes, memory, payloads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

DISCARDS: Final = ("none", "private", "shared", "both")
#: Where ciphertext is (:class:`hwemu.encryptedaccess.Encrypt`), or nowhere.
ENCRYPTS: Final = ("view", "backing", "none")
KINDS: Final = ("shared-bit", "sw-protected", "tdx", "snp", "pkvm")
SWITCH: Final = {"on": True, "off": False}

_SUFFIXES: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_OPTION: Final = re.compile(r",([A-Za-z_]\w*)=([^,]*)$")
_MEMORY: Final = "FILE,offset=N,size=N,slots=N,prealloc=on|off"


class ScriptError(ValueError):
    """A script, or a value in it, that cannot be understood; the text says what to write."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A private file, or part of it, as guest RAM; bytes.  ``size`` 0 means to its end."""

    path: str
    offset: int = 0
    size: int = 0
    slots: int = 2
    prealloc: bool = False


@dataclass(frozen=True, slots=True)
class Payload:
    """A file whose bytes are put into private memory at ``gpa`` before the VM runs."""

    path: str
    gpa: int


def parse_size(text: str) -> int:
    """Return bytes from ``4096``, ``0x1000``, ``64M``; raises ScriptError."""
    suffix = text[-1:].upper()
    digits = text[:-1] if suffix in _SUFFIXES and suffix else text
    scale = _SUFFIXES.get(suffix, 1)
    try:
        if not digits[:1].isdigit():
            raise ValueError
        return int(digits, 0) * scale
    except ValueError:
        raise ScriptError(f"{text!r} is no size: write bytes, or a number with K, M, G") from None


def parse_switch(text: str) -> bool:
    """Return what ``on`` or ``off`` says; raises ScriptError."""
    if text not in SWITCH:
        raise ScriptError(f"{text!r} is neither on nor off")
    return SWITCH[text]


def parse_memory(text: str) -> Memory:
    """Return the memory that ``FILE[,offset=N][,size=N][,slots=N][,prealloc=on|off]`` names.

    ScriptError for anything else.
    """
    numbers: dict[str, int] = {}
    prealloc: bool | None = None
    path = text
    while found := _OPTION.search(path):
        name, value = found.groups()
        if name in numbers or (name == "prealloc" and prealloc is not None):
            raise ScriptError(f"{text!r}: {name} is given twice")
        if name in ("offset", "size", "slots"):
            numbers[name] = parse_size(value)
        elif name == "prealloc":
            prealloc = parse_switch(value)
        else:
            raise ScriptError(f"{text!r}: no option {name}; write {_MEMORY}")
        path = path[: found.start()]
    if not path:
        raise ScriptError(f"{text!r} names no file; write {_MEMORY}")
    return Memory(path, **numbers, prealloc=bool(prealloc))


def parse_payload(text: str) -> Payload:
    """Return the payload that ``FILE@GPA`` names; raises ScriptError."""
    path, at, gpa = text.rpartition("@")
    if not path or not at:
        raise ScriptError(f"{text!r}: write FILE@GPA")
    return Payload(path, parse_size(gpa))
