# SPDX-License-Identifier: GPL-2.0-or-later
"""The little of ELF that loading a statically linked x86-64 kernel needs (System V gABI, ch. 5)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM: Final = struct.Struct("<IIQQQQQQ")
_IDENT: Final = b"\x7fELF\x02\x01\x01"  # 64-bit, little-endian, version 1
_ET_EXEC: Final = 2
_EM_X86_64: Final = 62
_PT_LOAD: Final = 1


class ImageError(ValueError):
    """A guest image that cannot be loaded; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """``data`` goes to guest-physical ``gpa``; bytes up to ``size`` behind it are zero."""

    gpa: int
    data: bytes
    size: int

    @property
    def end(self) -> int:
        """First byte behind the segment."""
        return self.gpa + self.size


@dataclass(frozen=True, slots=True)
class Image:
    """An executable: where it starts and what it puts into memory."""

    entry: int
    segments: tuple[Segment, ...]


def parse_elf(image: bytes) -> Image:
    """Read an ET_EXEC file for x86-64; ImageError if it is anything else or is cut short."""
    if len(image) < _HEADER.size or not image.startswith(_IDENT):
        raise ImageError("guest image: not a 64-bit little-endian ELF file")
    header = _HEADER.unpack_from(image)
    kind, machine, entry, table, entry_size, count = (header[i] for i in (1, 2, 4, 5, 9, 10))
    if kind != _ET_EXEC or machine != _EM_X86_64:
        raise ImageError(
            f"guest image: ELF type {kind}, machine {machine}; need a static x86-64 executable "
            f"({_ET_EXEC}, {_EM_X86_64})"
        )
    if count and entry_size != _PROGRAM.size:
        raise ImageError(f"guest image: program headers of {entry_size} bytes, not {_PROGRAM.size}")
    if table + count * _PROGRAM.size > len(image):
        raise ImageError("guest image: cut short inside its program headers")
    segments = []
    for index in range(count):
        kind, _, offset, _, gpa, filesz, memsz, _ = _PROGRAM.unpack_from(
            image, table + index * _PROGRAM.size
        )
        if kind != _PT_LOAD:
            continue
        if filesz > memsz or offset + filesz > len(image):
            raise ImageError(f"guest image: segment {index} is cut short or larger than its memory")
        segments.append(Segment(gpa, image[offset : offset + filesz], memsz))
    if not any(s.gpa <= entry < s.end for s in segments):
        raise ImageError(f"guest image: the entry {entry:#x} lies in no loaded segment")
    return Image(entry, tuple(segments))
