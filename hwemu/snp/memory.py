# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the contents are: all that the AMD-SP does with them, page by page.

The model keeps no contents; it reads a page to measure it and forgets it.  Frames are numbers of
4 KiB pages, contents are 4096 bytes.
"""

from __future__ import annotations

from typing import Protocol


class Memory(Protocol):
    """The physical memory of the host."""

    def read(self, pfn: int) -> bytes:
        """Return the 4096 bytes of a frame."""
        ...

    def write(self, pfn: int, contents: bytes) -> None:
        """Replace the 4096 bytes of a frame."""
        ...

    def zero(self, pfn: int) -> None:
        """Clear a frame."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy one frame over another."""
        ...
