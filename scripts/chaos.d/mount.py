# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs`` under chaos: ``mount.py MUTANT CLOCK ARGUMENTS``.

Each SIGUSR2 moves the time of day, as this process sees it, by the seconds that file CLOCK holds.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from mutants import MUTANTS

from privfs.cli.main import main


def let_time_jump(clock: Path) -> None:
    """Put a clock that can be moved in the place of the real one."""
    seconds, nanoseconds = time.time, time.time_ns
    moved = 0

    def move(number: int, frame: object) -> None:
        nonlocal moved
        moved += int(clock.read_text())

    time.time = lambda: seconds() + moved
    time.time_ns = lambda: nanoseconds() + moved * 10**9
    signal.signal(signal.SIGUSR2, move)


if __name__ == "__main__":
    mutant, clock = sys.argv.pop(1), sys.argv.pop(1)
    let_time_jump(Path(clock))
    MUTANTS[mutant].mount()
    sys.exit(main())
