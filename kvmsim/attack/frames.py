# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks by the host's kernel on one frame: contents, and who may map it."""

from __future__ import annotations

from kvmsim.attack.lab import Lab
from kvmsim.attack.outcome import Outcome


def read_frame(lab: Lab) -> Outcome:
    """Read it by the direct map."""
    return lab.kernel().read(lab.gpa)


def write_frame(lab: Lab) -> Outcome:
    """Write it by the direct map."""
    return lab.kernel().write(lab.gpa)


def replay_frame(lab: Lab) -> Outcome:
    """Put back what it held before."""
    return lab.kernel().replay(lab.gpa)


def dma_frame(lab: Lab) -> Outcome:
    """Let a device write it."""
    return lab.kernel().dma(lab.gpa)


def alias(lab: Lab) -> Outcome:
    """Map it at two gpas."""
    return lab.kernel().alias(lab.gpa, lab.spare_gpa)


def claim(lab: Lab) -> Outcome:
    """Map it into two guests."""
    return lab.kernel().claim(lab.gpa)


def other_side(lab: Lab) -> Outcome:
    """Map it on the shared side."""
    return lab.kernel().other_side(lab.gpa)


def split(lab: Lab) -> Outcome:
    """Take a part of a huge page."""
    return lab.kernel().split(lab.gpa)
