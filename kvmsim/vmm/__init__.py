# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMM's role: guest RAM with two sides, conversions, devices, loading, the exit loop's answers.

Everything here is sans-IO. :class:`kvmsim.vmm.machine.Machine` is the whole of it for a runner.
"""
