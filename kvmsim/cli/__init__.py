# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of ``kvmsim``."""

from kvmsim.cli.main import main

__all__ = ["main"]
