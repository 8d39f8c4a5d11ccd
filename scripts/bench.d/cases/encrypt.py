# SPDX-License-Identifier: GPL-2.0-or-later
"""What encryption costs a TD that takes memory into use, each place of it beside none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

from model import Bench, Case, Measure, Placement, Sample, Unit
from servers import privfs_mount
from spawn import measure, probe

_PAGE = 4096
_KERNEL = 8 << 20  #: bytes that the guest has for itself
_ROWS = {
    "encrypt_view": "ciphertext is computed when the host looks",
    "encrypt_backing": "ciphertext lies in the file, plaintext in shadow pages",
}
_serial = count(1)


def _round(
    row: str, mode: str, bench: Bench, placement: Placement, mount: Path
) -> dict[str, Sample]:
    file = mount / f"ram{next(_serial)}"
    size = bench.counts.pages * _PAGE + _KERNEL
    with file.open("xb") as stream:
        os.truncate(stream.fileno(), size)
        os.posix_fallocate(stream.fileno(), 0, size)
    try:
        found = measure(probe("encrypt", file, bench.counts.pages, mode), placement.caller)
    finally:
        file.unlink()
    return {row: Sample(found["pages_per_second"])}


@contextlib.contextmanager
def _side(row: str, mode: str, bench: Bench, placement: Placement) -> Iterator[Measure]:
    with privfs_mount(bench, placement) as mount:
        yield partial(_round, row, mode, bench, placement, mount)


CASES = tuple(
    Case(
        row, Unit.PAGES, {row: what},
        partial(_side, row, row.removeprefix("encrypt_")), partial(_side, row, "none"),
        "no encryption", ("same",),
    )
    for row, what in _ROWS.items()
)  # fmt: skip
