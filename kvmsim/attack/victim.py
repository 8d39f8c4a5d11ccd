# SPDX-License-Identifier: GPL-2.0-or-later
"""A VMM in a process of its own, to be stopped: ``python -m kvmsim.attack.victim KIND FOLDER``.

Prints the file and the offset of a page that its guest uses, then waits for the end of its input.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvmsim.attack.lab import Lab
from kvmsim.images import read_kernel


def main(kind: str, folder: str) -> None:
    """Boot, tell, wait."""
    with Lab(kind, Path(folder), read_kernel()) as lab:
        lab.guest()
        print(lab.path("victim"), lab.offset, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
