# SPDX-License-Identifier: GPL-2.0-or-later
"""How to start this program once more."""

from __future__ import annotations

import sys


def program() -> list[str]:
    """Return the beginning of a command line that runs ``privfs``.

    The current directory is on the path of what we start only if it is on ours, by ``python -m``.
    """
    by_module = sys.argv[0].endswith("__main__.py")
    return [sys.executable, *([] if by_module else ["-P"]), "-m", "privfs"]
