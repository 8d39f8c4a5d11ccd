# SPDX-License-Identifier: GPL-2.0-or-later
"""Exit codes of ``kvmsim``: part of the interface, the same for every command.

A guest may end with any status, so kvmsim's own codes about a VM lie where env(1), timeout(1) and
``privfs run`` have theirs, below the guest kernel's 127 for a panic.
"""

from __future__ import annotations

import enum
from typing import Final

from kvmsim.console import End, Ending
from privfs.leaving import BY_SIGNAL


class Exit(enum.IntEnum):
    """What a command ends with."""

    OK = 0
    FAILED = 1
    USAGE = 2
    MEMORY = 120
    IMAGE = 121
    OWNER_LOST = 122
    CRASHED = 123
    TIMEOUT = 124
    INTERNAL = 125
    SIGNAL = BY_SIGNAL


MEANING: Final = {
    Exit.OK: "done; `boot`: the guest ended with status 0, or its input ended and it had no work",
    Exit.FAILED: "`run`: something in the script did not hold; `demo`: a claim did not hold; "
    "`attack`: an attack did not end as expected; `stat`: no such VM, or it does not answer",
    Exit.USAGE: "wrong usage: unknown command, option, value, or statement in a script",
    Exit.MEMORY: "the memory cannot be used: no file, no privfs mount there, its owner refuses, or "
    "`prealloc=on` and there is not enough",
    Exit.IMAGE: "no guest kernel, or one that cannot be loaded; the same for a payload",
    Exit.OWNER_LOST: "machine check: the privfs process that owns the guest's memory is gone",
    Exit.CRASHED: "the guest cannot go on: triple fault, memory that is not there, unknown exit",
    Exit.TIMEOUT: "`boot --timeout`: the time is over",
    Exit.INTERNAL: "kvmsim itself failed",
    Exit.SIGNAL: "128 + n: ended by signal n",
}

_OF: Final = {
    End.IDLE: Exit.OK,
    End.CRASHED: Exit.CRASHED,
    End.OWNER_LOST: Exit.OWNER_LOST,
    End.STOPPED: Exit.FAILED,
    End.FAILED: Exit.INTERNAL,
}


def exit_code(ending: Ending) -> int:
    """Return the exit code for the end of a VM: the guest's status if it had a say."""
    return ending.status if ending.end is End.GUEST else _OF[ending.end]


def table() -> str:
    """Return the codes as a Markdown table."""
    rows = [f"| {int(code)}{'+n' if code is Exit.SIGNAL else ''} | {text} |"
            for code, text in MEANING.items()]  # fmt: skip
    rows.insert(3, "| other | `boot`: the status that the guest ended with; 127 after its panic |")
    return "\n".join(["| code | meaning |", "|---|---|", *rows])
