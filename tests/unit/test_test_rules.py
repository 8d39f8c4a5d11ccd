# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules of tests/conftest.py, held against runs of a made-up test file."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LOUD = "import logging\ndef test_it():\n    logging.getLogger('x').warning('page %d lost', 3)\n"


def outcome(tmp_path: Path, source: str, before: str = "") -> tuple[int, str]:
    """Run pytest on a source under our conftest, with ``before`` done to it; code and output."""
    (tmp_path / "conftest.py").write_text(f"from tests.conftest import *\n{before}")
    (tmp_path / "test_made_up.py").write_text(source)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_made_up.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_an_unexpected_warning_in_the_log_fails(tmp_path: Path) -> None:
    code, said = outcome(tmp_path, LOUD)
    assert code == 1, said
    assert "unexpected log messages:\nE         x: page 3 lost" in said


@pytest.mark.parametrize(("pattern", "expected"), [("page .* lost", 0), ("page .* found", 1)])
def test_an_expected_warning_does_not(tmp_path: Path, pattern: str, expected: int) -> None:
    marked = LOUD.replace("def ", f"import pytest\n@pytest.mark.logs({pattern!r})\ndef ")
    code, said = outcome(tmp_path, marked)
    assert code == expected, said


def test_what_is_not_closed_fails(tmp_path: Path) -> None:
    code, said = outcome(tmp_path, "def test_it():\n    open('/dev/null')\n")
    assert code == 1, said
    assert "ResourceWarning" in said


MOUNTS = "import pytest\n@pytest.mark.fuse\ndef test_it(): pass\ndef test_other(): pass\n"


@pytest.mark.parametrize(
    ("why_not", "exists", "expected"),
    [("refused", True, 1), ("refused", False, 0), ("", True, 0)],
)
def test_a_run_that_skips_all_mounts_fails_where_there_is_fuse(
    tmp_path: Path, why_not: str, exists: bool, expected: int
) -> None:
    before = (
        "import tests.conftest as rules\n"
        f"rules.why_not = lambda marker: {why_not!r}\n"
        f"rules.os.path.exists = lambda path, was=rules.os.path.exists: "
        f"{exists} if path == '/dev/fuse' else was(path)\n"
    )
    code, said = outcome(tmp_path, MOUNTS, before)
    assert code == expected, said
    assert ("every test that mounts was skipped" in said) == bool(expected)


def test_no_two_rooms_of_fixtures_have_one_of_the_same_name() -> None:
    """Plugins are for the whole run: which of two came last would count for every test."""
    names: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*fixtures.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(
                "fixture" in ast.unparse(mark) for mark in node.decorator_list
            ):
                names.setdefault(node.name, []).append(path.name)
    assert len(names) > 10
    assert {name: where for name, where in names.items() if len(where) > 1} == {}
