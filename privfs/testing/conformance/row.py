# SPDX-License-Identifier: GPL-2.0-or-later
"""What a row of the suite is: an operation on a fresh file and what each kind of file answers."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

PAGE: Final = 4096
#: Bytes of a fresh file, unless a row starts from an empty one.
SIZE: Final = 16 * PAGE

#: Kinds of file with an answer of their own, and where the answers come from.
COLUMNS: Final = {
    "gm0": "guest_memfd, flags 0 (Linux 6.18, measured)",
    "gm1": "guest_memfd, flags MMAP (measured)",
    "gm3": "guest_memfd, flags MMAP|INIT_SHARED (measured)",
    "v7": "MFD_INACCESSIBLE of the v7 series on Linux 5.19 (from its source)",
    "shim": "memfd_mkinaccessible of September 2022 (from its source)",
    "resizable": "privfs' own personality",
    "memfd": "an ordinary memfd: the same probes on a file that allows things",
}
#: The personality ``guest_memfd`` is held to flags 0: no host mapping.
REFERENCE: Final = {"guest_memfd": "gm0", "v7": "v7", "shim": "shim", "resizable": "resizable"}

Outcome = str
Probe = Callable[..., "Outcome | int | None"]


class Start(enum.Enum):
    """The state of the file that a row gets."""

    EMPTY = "size 0"
    HOLES = "16 pages, none allocated"
    FILLED = "16 pages, all allocated"


class Mode(enum.Enum):
    """How a mount refuses reads and maps."""

    PASSTHROUGH = "passthrough"  #: a mount by root: the kernel refuses
    DIRECT_IO = "direct_io"  #: a mount by an ordinary user: the daemon refuses


@dataclass(frozen=True, slots=True)
class Differs:
    """A mount answers otherwise than the kernel file that it stands for.

    ``reason`` is a key of :data:`privfs.testing.conformance.reasons.REASONS`.
    """

    reason: str
    answer: Outcome
    modes: tuple[Mode, ...] = tuple(Mode)
    personalities: tuple[str, ...] = tuple(REFERENCE)


@dataclass(frozen=True, slots=True)
class Row:
    """One operation.  ``want`` maps a column to its outcome; no entry: does not apply."""

    name: str
    probe: Probe
    arguments: tuple[Any, ...]
    start: Start
    want: dict[str, Outcome]
    source: str
    fuse: tuple[Differs, ...] = ()
    since: tuple[int, int] = (0, 0)  #: the kernel that answers so; older ones are not asked
    vast: bool = False  #: where it is allowed it takes a terabyte

    def answer(self, personality: str, mode: Mode) -> Outcome | None:
        """Return what a mount must answer, None if the row does not apply to it."""
        ideal = self.want.get(REFERENCE[personality])
        found = self.difference(personality, mode)
        return ideal if found is None else found.answer

    def difference(self, personality: str, mode: Mode) -> Differs | None:
        """Return how a mount differs from its reference here, None where it is alike."""
        if REFERENCE[personality] not in self.want:
            return None
        for differs in self.fuse:
            if mode in differs.modes and personality in differs.personalities:
                same = differs.answer == self.want[REFERENCE[personality]]
                return None if same else differs
        return None


def fuse(
    reason: str,
    both: Outcome = "",
    *,
    passthrough: Outcome = "",
    direct_io: Outcome = "",
    only: tuple[str, ...] = tuple(REFERENCE),
) -> tuple[Differs, ...]:
    """Say what a mount answers in either mode; "" leaves a mode out."""
    given = ((Mode.PASSTHROUGH, passthrough or both), (Mode.DIRECT_IO, direct_io or both))
    return tuple(Differs(reason, answer, (mode,), only) for mode, answer in given if answer)


def row(
    name: str,
    probe: Probe,
    *arguments: Any,
    gm: Outcome | None,
    gm1: Outcome | None = "",
    gm3: Outcome | None = "",
    memfd: Outcome | None,
    v7: Outcome | None = "",
    shim: Outcome | None = "",
    resizable: Outcome | None = "",
    start: Start = Start.FILLED,
    source: str,
    fuse: tuple[Differs, ...] = (),
    since: tuple[int, int] = (0, 0),
    vast: bool = False,
) -> Row:
    """Make a row; "" takes the answer of the neighbour, None says that it does not apply.

    Flags 1 and 3 answer as flags 0; v7 is shmem and so answers as a memfd; the shim has no
    operations but fallocate and so answers as guest_memfd; resizable answers as the shim.
    """
    shim = gm if shim == "" else shim
    given = {
        "gm0": gm,
        "gm1": gm if gm1 == "" else gm1,
        "gm3": gm if gm3 == "" else gm3,
        "memfd": memfd,
        "v7": memfd if v7 == "" else v7,
        "shim": shim,
        "resizable": shim if resizable == "" else resizable,
    }
    want = {column: outcome for column, outcome in given.items() if outcome is not None}
    return Row(name, probe, arguments, start, want, source, fuse, since, vast)
