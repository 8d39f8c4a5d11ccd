# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that can be measured, in the order of the report."""

from __future__ import annotations

from cases import calls, instructions, invalidation, touch

CASES = (*calls.CASES, *invalidation.CASES, *touch.CASES, *instructions.CASES)
