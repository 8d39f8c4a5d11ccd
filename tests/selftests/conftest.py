# SPDX-License-Identifier: GPL-2.0-or-later
"""Targets of the selftests: the kernel's KVM, the simulator's, private files and memfds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mounts import Mounted, cleared, start
from selftests.machine import Machine, real, simulated


@pytest.fixture(scope="module")
def mounted(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A mount of the personality that the module names, guest_memfd if it names none."""
    personality = getattr(request, "param", "guest_memfd")
    place = tmp_path_factory.mktemp("selftests")
    (place / "mount").mkdir()
    made = start(place / "mount", (f"personality={personality}",), place / "log")
    try:
        yield made
        made.audit()
        assert made.ask("status")["files"] == 0, "files are left"
        made.end()
    finally:
        cleared(made)
    assert made.log() == ""


@pytest.fixture(
    params=[
        pytest.param("simulated", marks=pytest.mark.fuse),
        pytest.param("real", marks=pytest.mark.kvm),
    ]
)
def machine(request: Any) -> Iterator[Machine]:
    """One KVM after the other."""
    if request.param == "real":
        with real() as made:
            yield made
    else:
        directory: Path = request.getfixturevalue("mounted").path
        with simulated(directory) as made:
            yield made
