# SPDX-License-Identifier: GPL-2.0-or-later
"""matrix.c, a program that shares nothing with the suite, gives the same answers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from privfs.testing.conformance import ROWS, Mode, apart

SOURCE = Path(__file__).with_name("matrix.c")
KERNEL = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
BY_NAME = {row.name: row for row in ROWS}


@pytest.fixture(scope="module")
def matrix() -> Iterator[Path]:
    """The program, in a directory that ordinary users can reach too."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc)")
    with tempfile.TemporaryDirectory(prefix="privfs-matrix.") as place:
        os.chmod(place, 0o755)
        program = Path(place) / "matrix"
        flags = ["-O1", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([compiler, *flags, "-o", program, SOURCE], check=True, timeout=60)
        yield program


def answers(*command: str | os.PathLike[str]) -> dict[str, str]:
    """Return row → outcome as the suite writes it."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False,
        stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(line.split("\t") for line in done.stdout.splitlines())
    assert len(found) > 220
    assert sorted(set(found) - set(BY_NAME)) == []
    return {name: "maps" if said == "77777" else said for name, said in found.items()}


def differing(found: dict[str, str], wanted: dict[str, str | None]) -> dict[str, str]:
    return {
        name: f"{said}, the suite says {wanted[name]}"
        for name, said in found.items()
        if wanted[name] not in (said, None) and BY_NAME[name].since <= KERNEL
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


def serving(who: str, matrix: Path) -> list[str]:
    return [
        sys.executable, "-P", "-m", "privfs", "run", "-o", f"personality={who},size=1G",
        "--", "sh", "-c", 'exec "$0" dir "$PRIVFS"', str(matrix),
    ]  # fmt: skip


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.parametrize("who", ["guest_memfd", "resizable"])
def test_on_a_mount(matrix: Path, who: str) -> None:
    found = answers(*serving(who, matrix))
    wanted = {name: BY_NAME[name].answer(who, Mode.PASSTHROUGH) for name in found}
    assert differing(found, wanted) == {}


@pytest.mark.fuse
@pytest.mark.parametrize("who", ["guest_memfd", "v7"])
def test_on_a_mount_of_a_user(matrix: Path, who: str) -> None:
    with tempfile.TemporaryDirectory(prefix="privfs-matrix.") as place:
        try:
            command = apart.as_a_user(serving(who, matrix), Path(place))
        except apart.Unable as missing:
            pytest.skip(str(missing))
        found = answers(*command)
    wanted = {name: BY_NAME[name].answer(who, Mode.DIRECT_IO) for name in found}
    assert differing(found, wanted) == {}
