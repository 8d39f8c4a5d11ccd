# SPDX-License-Identifier: GPL-2.0-or-later
"""matrix.c, a program that shares nothing with the suite, gives the same answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from privfs.testing.conformance import ROWS, Mode

SOURCE = Path(__file__).with_name("matrix.c")
BY_NAME = {row.name: row for row in ROWS}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc)")
    program = tmp_path_factory.mktemp("matrix") / "matrix"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, "-o", program, SOURCE], check=True, timeout=60)
    return program


def answers(*command: str | os.PathLike[str]) -> dict[str, str]:
    """Return row → outcome as the suite writes it."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False,
        stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(line.split("\t") for line in done.stdout.splitlines())
    assert len(found) > 170
    assert sorted(set(found) - set(BY_NAME)) == []
    return {name: "maps" if said == "77777" else said for name, said in found.items()}


def differing(found: dict[str, str], wanted: dict[str, str | None]) -> dict[str, str]:
    return {
        name: f"{said}, the suite says {wanted[name]}"
        for name, said in found.items()
        if wanted[name] not in (said, None)
    }


def test_on_a_memfd(matrix: Path) -> None:
    found = answers(matrix, "memfd")
    assert differing(found, {name: BY_NAME[name].want.get("memfd") for name in found}) == {}


@pytest.mark.kvm
@pytest.mark.parametrize("flags", [0, 1, 3])
def test_on_the_kernel_s_guest_memfd(matrix: Path, flags: int) -> None:
    from privfs.testing.conformance import GuestMemfd

    maker = GuestMemfd(flags)
    missing = maker.why_not()
    maker.close()
    if missing:
        pytest.skip(missing)
    found = answers(matrix, "gmem", str(flags))
    assert differing(found, {name: BY_NAME[name].want.get(f"gm{flags}") for name in found}) == {}


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.parametrize("who", ["guest_memfd", "resizable"])
def test_on_a_mount(matrix: Path, who: str) -> None:
    found = answers(
        sys.executable, "-P", "-m", "privfs", "run", "-o", f"personality={who},size=1G",
        "--", "sh", "-c", 'exec "$0" dir "$PRIVFS"', matrix,
    )  # fmt: skip
    wanted = {name: BY_NAME[name].answer(who, Mode.PASSTHROUGH) for name in found}
    assert differing(found, wanted) == {}
