# SPDX-License-Identifier: GPL-2.0-or-later
"""A picture of indexed colours as PNG (ISO/IEC 15948), and letters of five dots to write in it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
HEIGHT: Final = 5  #: of a letter, in dots

#: Rows from the top, one word each; every letter as wide as it must be.
_GLYPHS: Final = {
    "A": "### #.# ### #.# #.#", "B": "##. #.# ##. #.# ##.", "C": "### #.. #.. #.. ###",
    "D": "##. #.# #.# #.# ##.", "E": "### #.. ##. #.. ###", "F": "### #.. ##. #.. #..",
    "G": "#### #... #.## #..# ####", "H": "#.# #.# ### #.# #.#", "I": "# # # # #",
    "J": "..# ..# ..# #.# ###", "K": "#.# #.# ##. #.# #.#", "L": "#.. #.. #.. #.. ###",
    "M": "#...# ##.## #.#.# #...# #...#", "N": "#..# ##.# #.## #..# #..#",
    "O": "### #.# #.# #.# ###", "P": "### #.# ### #.. #..", "Q": "#### #..# #..# #.## ####",
    "R": "##. #.# ##. #.# #.#", "S": "### #.. ### ..# ###", "T": "### .#. .#. .#. .#.",
    "U": "#.# #.# #.# #.# ###", "V": "#.# #.# #.# #.# .#.", "W": "#...# #...# #.#.# ##.## #...#",
    "X": "#.# #.# .#. #.# #.#", "Y": "#.# #.# .#. .#. .#.", "Z": "### ..# .#. #.. ###",
    "0": "### #.# #.# #.# ###", "1": ".# ## .# .# .#", "2": "### ..# ### #.. ###",
    "3": "### ..# ### ..# ###", "4": "#.# #.# ### ..# ..#", "5": "### #.. ### ..# ###",
    "6": "### #.. ### #.# ###", "7": "### ..# ..# ..# ..#", "8": "### #.# ### #.# ###",
    "9": "### #.# ### ..# ###", " ": "... ... ... ... ...", "-": "... ... ### ... ...",
    ".": ". . . . #", ",": ".. .. .. .# #.", ":": ". # . # .", "/": "..# ..# .#. #.. #..",
    "(": ".# #. #. #. .#", ")": "#. .# .# .# #.", "'": "# # . . .", "!": "# # # . #",
    "_": "... ... ... ... ###", "+": "... .#. ### .#. ...", "=": "... ### ... ### ...",
}  # fmt: skip
_UNKNOWN: Final = "### #.# #.# #.# ###"


def text(words: str, scale: int = 1) -> npt.NDArray[np.bool_]:
    """Return the dots of a line, (5 × scale, width); small letters are written as capitals."""
    rows: list[list[bool]] = [[] for _ in range(HEIGHT)]
    for letter in words.upper():
        for row, dots in zip(rows, _GLYPHS.get(letter, _UNKNOWN).split(), strict=True):
            row += [dot == "#" for dot in dots] + [False]
    found = np.array(rows, np.bool_)
    return np.repeat(np.repeat(found, scale, axis=0), scale, axis=1)


def write(picture: Pixels, x: int, y: int, words: str, colour: int, scale: int = 1) -> None:
    """Write a line into a picture with its upper left corner at (x, y); what is outside is cut."""
    dots = text(words, scale)
    part = picture[y : y + dots.shape[0], x : x + dots.shape[1]]
    part[dots[: part.shape[0], : part.shape[1]]] = colour


def png(picture: Pixels, palette: Sequence[tuple[int, int, int]]) -> bytes:
    """Return (height, width) numbers of colours of ``palette`` as a PNG file."""
    height, width = picture.shape
    if not height or not width or not 0 < len(palette) <= 256 or int(picture.max()) >= len(palette):
        raise ValueError(f"PNG of {width} by {height} pixels with {len(palette)} colours")
    lines = np.zeros((height, width + 1), np.uint8)  # each begins with its filter: none
    lines[:, 1:] = picture
    return b"".join((
        b"\x89PNG\r\n\x1a\n",
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        _chunk(b"PLTE", b"".join(bytes(colour) for colour in palette)),
        _chunk(b"IDAT", zlib.compress(lines.tobytes(), 6)),
        _chunk(b"IEND", b""),
    ))  # fmt: skip


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
