# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m kvmsim``."""

from kvmsim.cli import main

if __name__ == "__main__":
    main()
