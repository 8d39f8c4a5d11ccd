# SPDX-License-Identifier: GPL-2.0-or-later
"""Targets of the selftests: the kernel's KVM, the simulator's, private files and memfds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mounts import Mounted, for_many
from selftests import sealing
from selftests.machine import Machine, real, simulated
from selftests.sealing import Target


def _mount(factory: pytest.TempPathFactory, personality: str) -> Iterator[Mounted]:
    with for_many(factory.mktemp("selftests"), f"personality={personality}") as made:
        yield made


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A mount that answers as guest_memfd does; at its end no file may be left."""
    yield from _mount(tmp_path_factory, "guest_memfd")


@pytest.fixture(scope="module")
def resizable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A mount whose files can be sealed."""
    yield from _mount(tmp_path_factory, "resizable")


@pytest.fixture(scope="module")
def v7(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A mount whose files are sealed from birth."""
    yield from _mount(tmp_path_factory, "v7")


@pytest.fixture(
    params=[
        "memfd",
        pytest.param("resizable", marks=pytest.mark.fuse),
        pytest.param("v7", marks=pytest.mark.fuse),
    ]
)
def target(request: Any) -> Target:
    """What can be sealed, one kind after the other."""
    private = request.param != "memfd"
    directory = request.getfixturevalue(request.param).path if private else None
    return sealing.target(request.param, directory)


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
