# SPDX-License-Identifier: GPL-2.0-or-later
"""Users written in C (tests/twin/user.c), built here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from actors import Actor, Cast
from twins import User

TWIN = Path(__file__).parents[1] / "twin"


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program, built here."""
    for tool in ("gcc", "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing: apt install gcc make")
    build = tmp_path_factory.mktemp("twin")
    subprocess.run(["make", "-s", "-C", TWIN, f"BUILD={build}", "CC=gcc"], check=True, timeout=100)
    return build / "user"


@pytest.fixture
def user(actor: Cast, twin: Path) -> User:
    """Return a function that starts a user and waits until it is registered."""

    def start(path: Path, mode: str = "good", label: str = "", slot: int = 1) -> Actor:
        made = actor(twin, path, mode, label or mode, str(slot))
        made.expect(r"^ready \d+ \d+ \d$")
        return made

    return start
