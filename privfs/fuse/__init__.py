# SPDX-License-Identifier: GPL-2.0-or-later
"""The mount: ``lowlevel`` completes pyfuse3, ``operations`` translates, ``mount`` lives and dies.

Nothing in here decides what a file answers; that is :mod:`privfs.memfile` and
:mod:`privfs.namespace`.
"""
