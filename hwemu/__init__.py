# SPDX-License-Identifier: GPL-2.0-or-later
"""The hardware: second-stage tables, TLBs and vCPUs that run real x86-64 code.

Start with ``stage2``, then ``tlb`` and ``arena``, then ``cpu``.
"""
