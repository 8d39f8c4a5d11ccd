# SPDX-License-Identifier: GPL-2.0-or-later
"""What a person types: one module a command, ``main`` puts them together.

Commands import the rest of privfs only when they run: ``privfs doctor`` must work where nothing
else does.
"""
