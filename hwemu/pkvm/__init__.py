# SPDX-License-Identifier: GPL-2.0-or-later
"""pKVM's ownership of pages: who may reach which page, and how that changes."""
