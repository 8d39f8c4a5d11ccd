# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m privfs``."""

from privfs.cli.main import main

if __name__ == "__main__":
    main()
