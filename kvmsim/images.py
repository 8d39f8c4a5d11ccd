# SPDX-License-Identifier: GPL-2.0-or-later
"""Where guest images are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

#: Environment variable that names a guest kernel.
VARIABLE: Final = "KVMSIM_KERNEL"
_BUILT: Final = "scripts/guests/build/kernel.elf"


class NoImage(Exception):
    """There is no guest image to boot; the text says how to get one."""


def find_kernel(named: str | None = None) -> Path:
    """Return the guest kernel: the named one, ``$KVMSIM_KERNEL``, or that of this checkout."""
    path = named or os.environ.get(VARIABLE)
    if path:
        return Path(path)
    built = Path(__file__).parents[1] / _BUILT
    if not built.is_file():
        raise NoImage(
            f"no guest kernel at {built}: run scripts/setup, or name one with --kernel or "
            f"${VARIABLE}"
        )
    return built


def read_kernel(named: str | None = None) -> bytes:
    """Return the bytes of the guest kernel; raises NoImage."""
    path = find_kernel(named)
    try:
        return path.read_bytes()
    except OSError as error:
        raise NoImage(f"guest kernel {path}: {error.strerror}; build it with scripts/setup") from (
            error
        )


def read_payload(path: str) -> bytes:
    """Read what is to lie in private memory; NoImage says why not."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise NoImage(f"payload {path}: {error.strerror}") from error
