# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs`` under chaos: ``mount.py MUTANT ARGUMENTS``."""

from __future__ import annotations

import sys

from mutants import MUTANTS

from privfs.cli.main import main

if __name__ == "__main__":
    MUTANTS[sys.argv.pop(1)].mount()
    sys.exit(main())
