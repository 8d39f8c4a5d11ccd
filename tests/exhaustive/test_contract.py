# SPDX-License-Identifier: GPL-2.0-or-later
"""Every interleaving of small worlds keeps the contract; without any one rule it does not."""

from __future__ import annotations

import enum
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from contract_mutations import MUTATIONS, Mutation
from contract_symmetry import Symmetric, build
from contract_values import SEEN, Setup
from contract_world import Contract, State, fair
from contract_worlds import INLINE, SLOW, WORLDS, P

from kvmsim import fault
from privfs import memfile
from privfs.notifier import effects, owner, ownerstate, session, user
from privfs.testing import Report, Rows, confirm, explore

pytestmark = pytest.mark.exhaustive

ROOT = Path(__file__).parents[2]

TABLES = {
    "states of a session": (session, "TRANSITIONS"),
    "records to the owner": (owner, "_HANDLERS"),
    "calls by record": (owner, "_MODES"),
    "reasons of invalidations": (ownerstate, "_REASONS"),
    "steps of operations": (memfile, "STEPS"),
    "answers to a user": (user, "_ANSWERS"),
    "steps of a fault": (fault, "_FROM"),
    "ends of a fault's step": (fault, "_AFTER"),
    "errors of a page": (fault, "_PAGE_ERRORS"),
    "who refuses a fault": (fault, "_REFUSE"),
}

#: Rows that no world can use, and why they stay.
UNUSED: dict[tuple[str, object], str] = {
    ("errors of a page", fault.EHWPOISON): "no owner here has memory that fails; tests/unit has",
}

#: The words of the parts: each must be said in some world.
VOCABULARY: dict[object, str] = {
    **dict.fromkeys(get_args(user.Happening), ""),
    **dict.fromkeys(get_args(effects.Effect), ""),
    **dict.fromkeys(get_args(fault.Effect), ""),
    **dict.fromkeys(effects.Rung, ""),
    **dict.fromkeys(fault.RetryReason, ""),
    user.Closed: "said by the daemon's shell as it leaves, not by the owner",
    fault.NeedShared: "looked up within Vm.begin_fault, never seen outside",
    fault.RetryReason.INVALIDATED: "Vm.page_arrived looks again by itself",
    effects.Stray: "what an audit finds; no world here touches freed memory",
}


@pytest.fixture(scope="module", autouse=True)
def tables() -> Iterator[dict[str, Rows[object, object]]]:
    """The transition tables of the code under test, watched."""
    with pytest.MonkeyPatch.context() as patch:
        watched = {name: Rows(getattr(module, at)) for name, (module, at) in TABLES.items()}
        for name, (module, at) in TABLES.items():
            patch.setattr(module, at, watched[name])
        explored.cache_clear()
        yield watched


def check(world: Contract, name: str) -> Report:
    report = explore(world, goal=world.quiet, fair=fair)
    print(f"{name}: {report}")
    return report


def program(report: Report, imports: str, build: str) -> str:
    """Return a counterexample as a program; it runs where pytest finds its modules."""
    return report.program(
        f"from contract_world import fair\n{imports}\n\nworld = {build}",
        "world", "world.quiet", "fair",
    )  # fmt: skip


def closed(report: Report, worlds: str, name: str) -> None:
    """Fail with the program that replays what was found."""
    imports = f"from contract_symmetry import build\nfrom contract_worlds import {worlds}"
    assert report.problem is None, program(report, imports, f"build({worlds}[{name!r}])")
    assert report.complete
    assert report.goals > 0


@functools.cache
def explored(name: str) -> Report:
    return check(build(WORLDS[name]), name)


@pytest.mark.parametrize("name", WORLDS)
def test_every_interleaving_keeps_the_contract(name: str) -> None:
    closed(explored(name), "WORLDS", name)


@pytest.mark.parametrize("name", INLINE)
def test_steps_that_end_at_once_keep_the_contract(name: str) -> None:
    report = check(Contract(replace(WORLDS[name], inline=True)), f"inline: {name}")
    assert report.problem is None, report.script()
    assert report.complete


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SLOW)
def test_every_interleaving_of_larger_worlds_keeps_the_contract(name: str) -> None:
    closed(check(build(SLOW[name]), name), "SLOW", name)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.rule)
def test_each_rule_is_needed(mutation: Mutation) -> None:
    intact = mutation.build_intact()
    report = explore(intact, goal=intact.quiet, fair=fair)
    assert report.problem is None, report.script()
    mutant = mutation.build()
    report = check(mutant, f"without {mutation.rule!r}")
    assert report.problem is not None, f"nothing is found without {mutation.rule!r}"
    assert mutation.finds in report.problem, report.script()
    assert report.trace is not None
    again = mutation.build()
    confirm(again, report.trace, report.problem, goal=again.quiet, fair=fair)


@pytest.mark.parametrize("users", [2, 3])
def test_users_that_are_not_told_apart_lose_nothing(users: int) -> None:
    """The states up to an exchange of users are those that the symmetric world has."""
    setup = Setup(users=users, calls=(P,), populated=(0,), alike=True, direct=True, prompt=True)
    world = build(setup)
    assert isinstance(world, Symmetric)
    seen: set[State] = {world.start()}
    todo = list(seen)
    while todo:
        for _, after in world.successors(todo.pop()):
            if after not in seen:
                seen.add(after)
                todo.append(after)
    orbits = {world.key(state) for state in seen}
    report = explore(build(setup), goal=world.quiet, fair=fair)
    assert report.states == len(orbits) < len(seen) / (users - 0.5)
    assert explore(Contract(setup)).states == len(seen)


def test_a_mutant_is_found_among_users_that_are_not_told_apart() -> None:
    mutation = next(m for m in MUTATIONS if m.rule == "install rule")
    setup = replace(mutation.setup, users=2, alike=True)
    report = explore(Symmetric(setup, mutation.cores))
    assert report.problem is not None
    assert mutation.finds in report.problem
    assert report.trace is not None
    confirm(Contract(setup, mutation.cores), report.trace, report.problem)


def without(rule: str) -> str:
    """Return the program that replays what is found without a rule."""
    mutation = next(m for m in MUTATIONS if m.rule == rule)
    mutant = mutation.build()
    report = explore(mutant, goal=mutant.quiet, fair=fair)
    return program(report, "from contract_mutations import BY_RULE", f"BY_RULE[{rule!r}].build()")


def run(source: str, tmp_path: Path) -> tuple[int, str]:
    path = tmp_path / "counterexample.py"
    path.write_text(source)
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=60, check=False,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'exhaustive'}"},
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("rule", ["install rule", "the reader never waits"])
def test_a_counterexample_prints_as_a_program_that_replays_it(rule: str, tmp_path: Path) -> None:
    source = without(rule)
    print(source)
    assert run(source, tmp_path) == (0, "")
    code, said = run(source.replace(f"BY_RULE[{rule!r}].build()",
                                    f"BY_RULE[{rule!r}].build_intact()"), tmp_path)  # fmt: skip
    assert code == 1, "the program must fail where the rule is in force"
    assert "Error" in said


@pytest.mark.parametrize("table", TABLES)
def test_every_row_of_every_table_is_used(
    table: str, tables: dict[str, Rows[object, object]]
) -> None:
    for name in WORLDS:
        explored(name)
    excused = {key for name, key in UNUSED if name == table}
    rows = tables[table]
    assert rows.used & excused == set(), "a row is excused that is used"
    unused = sorted(map(_word, rows.unused - excused))
    assert not unused, f"{table}: no world uses {', '.join(unused)}"


def test_every_word_is_said() -> None:
    for name in WORLDS:
        explored(name)
    unsaid = {_word(word) for word, reason in VOCABULARY.items() if not reason} - {
        _word(word) for word in SEEN
    }
    assert not unsaid, f"no world says {', '.join(sorted(unsaid))}"
    assert not [word for word, reason in VOCABULARY.items() if reason and word in SEEN]


def _word(word: object) -> str:
    if isinstance(word, tuple):
        return " ".join(map(_word, word))
    if isinstance(word, enum.Enum):
        return f"{type(word).__name__}.{word.name}"
    return word.__qualname__ if isinstance(word, type) else str(word)
