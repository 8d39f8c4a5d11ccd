# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/conformance as a person uses it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from privfs.testing.conformance import Memfd, Start

ROOT = Path(__file__).parents[2]


def conformance(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / "conformance", *arguments],
        capture_output=True, text=True, timeout=100, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_rows_are_listed_with_their_answers() -> None:
    done = conformance("list", "fallocate.keep.unaligned-offset")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("fallocate.keep.unaligned-offset  (16 pages, none allocated;")
    assert "    gm0        EINVAL" in lines
    assert "    v7         0" in lines


def test_a_target_that_answers_as_expected() -> None:
    done = conformance("run", "memfd", "--rows", "fallocate.punch.*")
    assert (done.returncode, done.stderr) == (0, "19 rows, 0 unexpected\n")


def test_a_directory_is_compared_and_left_as_it_was(tmp_path: Path) -> None:
    done = conformance("run", str(tmp_path), "--against", "gm0", "--rows", "read*")
    assert done.returncode == 1
    assert re.search(r"^read +4096 +EXPECTED EINVAL$", done.stdout, re.MULTILINE)
    assert os.listdir(tmp_path) == []


def test_no_terabyte_is_asked_for_unasked(tmp_path: Path) -> None:
    done = conformance("run", str(tmp_path), "--against", "gm0", "--rows", "*.terabyte", "--json")
    assert list(json.loads(done.stdout)["outcomes"]) == ["fallocate.punch.terabyte"]


@pytest.mark.parametrize("target", ["nonsense", "model:nonsense", "guest_memfd:7", "mount:"])
def test_an_unknown_target_is_named(target: str) -> None:
    done = conformance("run", target)
    assert done.returncode == 1
    assert done.stderr == f"{target}: neither a target nor a directory; see --help\n"


def test_the_example_of_the_manual_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/conformance.md: a file of one's own, here a memfd."""
    text = (ROOT / "docs" / "conformance.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    made = "make_a_file(start)"
    assert "fd = ..." in code
    code = code.replace("fd = ...", f"fd = {made}").replace("run(Mine(), ROWS)", "run(Mine(), few)")
    maker = Memfd()

    def make_a_file(start: Start) -> int:
        return maker.make(start).fd

    from privfs.testing.conformance import ROWS

    few = [row for row in ROWS if row.name in ("read", "fsync", "fallocate.keep.page")]
    program = compile(code, "docs/conformance.md", "exec", dont_inherit=True)
    exec(program, {"make_a_file": make_a_file, "few": few, "__name__": __name__})
    assert capsys.readouterr().out == "read: 4096 instead of EINVAL\nfsync: 0 instead of EINVAL\n"
