# SPDX-License-Identifier: GPL-2.0-or-later
"""Exit codes: part of the interface, the same for every command."""

from __future__ import annotations

import enum
from typing import Final

from privfs.leaving import BY_SIGNAL


class Exit(enum.IntEnum):
    """What a command ends with."""

    OK = 0
    FAILED = 1
    USAGE = 2
    MOUNTPOINT = 3
    FUSE = 4
    NO_MOUNT = 5
    REQUIREMENT = 6
    RUN_FAILED = 125
    RUN_CANNOT_EXECUTE = 126
    RUN_NOT_FOUND = 127
    SIGNAL = BY_SIGNAL


MEANING: Final = {
    Exit.OK: "done",
    Exit.FAILED: "the operation failed; the message says why",
    Exit.USAGE: "wrong usage: unknown command, option or value",
    Exit.MOUNTPOINT: "the mount point cannot be used: missing, no directory, occupied, no right",
    Exit.FUSE: "FUSE cannot be used here; `privfs doctor` says what is missing",
    Exit.NO_MOUNT: "there is no privfs mount there, or it does not answer",
    Exit.REQUIREMENT: "`privfs doctor`: a requirement is missing",
    Exit.RUN_FAILED: "`privfs run`: privfs itself failed, the command was not run",
    Exit.RUN_CANNOT_EXECUTE: "`privfs run`: the command was found but cannot be executed",
    Exit.RUN_NOT_FOUND: "`privfs run`: the command was not found",
    Exit.SIGNAL: "128 + n: ended by signal n (`privfs run`: the command was)",
}


def table() -> str:
    """Return the codes as a Markdown table."""
    rows = [f"| {int(code)}{'+n' if code is Exit.SIGNAL else ''} | {text} |"
            for code, text in MEANING.items()]  # fmt: skip
    return "\n".join(["| code | meaning |", "|---|---|", *rows])
