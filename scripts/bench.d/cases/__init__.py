# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that can be measured, in the order of the report."""

from __future__ import annotations

from cases import (
    calls,
    convert,
    crowd,
    encrypt,
    exec,
    fence,
    hung,
    instructions,
    invalidation,
    large,
    touch,
)

CASES = (
    *calls.CASES,
    *invalidation.CASES,
    *crowd.CASES,
    *hung.CASES,
    *large.CASES,
    *touch.CASES,
    *convert.CASES,
    *encrypt.CASES,
    *exec.CASES,
    *fence.CASES,
    *instructions.CASES,
)
