# SPDX-License-Identifier: GPL-2.0-or-later
"""Every attack on every kind of VM ends as the table of attacks says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from kvmsim_program import KVMSIM, kvmsim

from kvmsim.attack import report
from kvmsim.attack.catalog import ATTACKS
from kvmsim.attack.expected import TABLE, Row
from kvmsim.attack.outcome import KINDS, Verdict, succeeds
from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.main import call

pytest_plugins = ["guest_fixtures", "program_fixtures"]

#: What succeeds against a confidential guest on hardware too.
OPEN = {("tampered-image", "pkvm")}
#: Without the rule that keeps a confidential VM's file its own, neither here nor at the owner.
SHARING = (
    "from kvmsim.bindings import Bindings; Bindings.take = lambda *_, **more: None;"
    "from privfs.notifier.lane import Lane; plain = Lane.register;"
    "Lane.register = lambda self, fd, purpose, exclusive: plain(self, fd, purpose);"
    "from kvmsim.cli.main import main; main(['attack', 'run', 'bind-other', '--kind', 'pkvm'])"
)
CELLS = [(kind, name) for kind in KINDS for name in ATTACKS]


@pytest.mark.fuse
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
def test_attacks_end_as_the_table_says(kind: str, kernel: object) -> None:
    command = [*KVMSIM, "attack", "run", "all", "--kind", kind, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["attack"], one["kind"]) for one in found] == [(name, kind) for name in ATTACKS]
    assert {one["attack"]: one["error"] for one in found if one["error"]} == {}
    assert {one["attack"]: one["outcome"] for one in found} == {
        name: rows[kind].outcome.plain() for name, rows in TABLE.items()
    }
    assert done.returncode == Exit.OK, done.stderr


def test_the_table_has_every_attack_on_every_kind() -> None:
    assert list(TABLE) == list(ATTACKS)
    assert all(tuple(rows) == KINDS for rows in TABLE.values())


def test_each_cell_says_why_and_where_that_is_written() -> None:
    for name, rows in TABLE.items():
        for kind, row in rows.items():
            assert row.why, (name, kind)
            assert row.source or row.outcome.verdict is Verdict.NONE, (name, kind)


def test_nothing_succeeds_that_hardware_would_refuse() -> None:
    succeeding = {
        (name, kind)
        for kind, name in CELLS
        if kind in ("tdx", "snp", "pkvm") and TABLE[name][kind].outcome.verdict is Verdict.SUCCEEDS
    }
    assert succeeding == OPEN


def test_an_outcome_that_is_not_the_expected_one_fails(
    monkeypatch: pytest.MonkeyPatch, kernel: object, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["attack", "run", "read-frame", "replay", "--kind", "sev"]
    monkeypatch.setattr("kvmsim.cli.attack.prepare_process", lambda: None)
    assert call(command) == Exit.OK
    wrong = Row(succeeds("the guest's bytes"), "", "")
    monkeypatch.setattr(report, "expected", lambda name, kind: wrong)
    assert call(command) == Exit.FAILED
    assert "2 of 2 attacks did not end as expected" in capsys.readouterr().err


@pytest.mark.fuse
def test_a_rule_that_is_missing_is_found(kernel: object) -> None:
    command = [sys.executable, "-c", SHARING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == Exit.FAILED, done.stderr
    assert "succeeds: the guest's bytes (expected: refused by KVM: EINVAL)" in done.stdout


def test_the_list_has_every_attack() -> None:
    done = kvmsim("attack", "list")
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == list(ATTACKS)
    listed = json.loads(kvmsim("attack", "list", "--json").stdout)
    assert [one["attack"] for one in listed["attacks"]] == list(ATTACKS)
    assert listed["kinds"] == list(KINDS)


@pytest.mark.parametrize("arguments", [["nonsense"], ["alias", "--kind", "vax"], []])
def test_what_does_not_exist_is_wrong_usage(arguments: list[str]) -> None:
    done = kvmsim("attack", "run", *arguments)
    assert done.returncode == Exit.USAGE
    assert done.stderr.startswith("kvmsim: ")
