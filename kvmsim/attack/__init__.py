# SPDX-License-Identifier: GPL-2.0-or-later
"""The attack lab: what a host may try against a guest, tried, and where it ends.

The attacker is the host: its programs, its VMM, its kernel. It may call whatever hardware would let
it call (SEAMCALLs, RMPUPDATE, transitions of pKVM, second-stage entries, attributes), nothing else.
"""
