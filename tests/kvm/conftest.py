# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures: worlds of both kinds, the simulator's on one mount for a whole module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kvm.world import KINDS, Worlds, real, simulated
from mounts import cleared, start


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mount that answers as guest_memfd does; at its end nothing may be left in it."""
    place = tmp_path_factory.mktemp("kvm")
    (place / "mount").mkdir()
    mounted = start(place / "mount", ("personality=guest_memfd",), place / "log")
    try:
        yield mounted.path
        mounted.audit()
        assert mounted.privfs("map", mounted.path).stdout.count("mapped") == 0
        mounted.end()
    finally:
        cleared(mounted)
    assert mounted.log() == ""


@pytest.fixture(params=KINDS)
def worlds(request: Any) -> Worlds:
    """Makes worlds of one kind, then of the other."""
    if request.param == "real":
        return real
    directory = request.getfixturevalue("directory")
    return lambda: simulated(directory)


@pytest.fixture
def kernel_has_flags_3() -> None:
    """Skip where the kernel's KVM lacks what the experiments need."""
    with real():
        pass
