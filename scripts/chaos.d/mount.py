# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs`` under chaos: ``mount.py MUTANT ARGUMENTS``; watches for touches of freed memory."""

from __future__ import annotations

import sys

import watchful
from mutants import MUTANTS

from privfs.cli.main import main
from privfs.service import Service

if __name__ == "__main__":
    MUTANTS[sys.argv.pop(1)].mount()
    Service._perform = watchful.perform  # type: ignore[method-assign]
    sys.exit(main())
