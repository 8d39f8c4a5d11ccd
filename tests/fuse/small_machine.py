# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs`` on a machine whose memory a test decides: ``small_machine.py ROOT ARGUMENTS``.

ROOT holds ``proc/meminfo`` and whatever else of /proc and /sys a test lays down.
"""

from __future__ import annotations

import sys
from pathlib import Path

from privfs.cli.main import main
from privfs.machine import Machine

if __name__ == "__main__":
    defaults = Machine.__init__.__kwdefaults__
    assert "root" in defaults
    defaults["root"] = Path(sys.argv.pop(1))
    sys.exit(main())
