# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests of private memory need: an explorer of small worlds."""

from privfs.testing.explore import Report, World, explore, replay

__all__ = ["Report", "World", "explore", "replay"]
