# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/chaos: it finds nothing, it finds every mutant, and it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from actors import ROOT
from mounts import mount_points

CHAOS = ROOT / "scripts" / "chaos"
#: How long beginning, a last calm and the end may take on a busy machine.
MARGIN = 200
#: Found in seconds; the others only have to be found in a minute.
QUICK = ("free-first", "no-flush", "liar")
SLOW = (
    "first-ack", "eof-is-ack", "skip-hung", "no-ladder", "exit-only", "wall-clock", "no-park",
    "no-free", "needless-eio", "copy-first", "lose-budget", "keep-fds", "no-drain", "early-ack",
    "no-ring",
)  # fmt: skip

#: Seeds under which a rare deed comes early.
SEEDS = {"wall-clock": 46}

Chaos = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def chaos(tmp_path: Path) -> Iterator[Chaos]:
    """Return a function that starts chaos; afterwards nothing of it may be left."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [CHAOS, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, env=os.environ | {"TMPDIR": str(tmp_path)},
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        with process:
            if process.poll() is None:
                process.terminate()
    assert not [place for place in mount_points() if place.startswith(str(tmp_path))]
    assert not list(tmp_path.iterdir())


def end(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    said, _ = process.communicate(timeout=seconds + MARGIN)
    print(said)
    return process.returncode, said


def plan(seed: int) -> str:
    done = subprocess.run(
        [CHAOS, "--plan", "300", "--seed", str(seed)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout


def test_a_seed_decides_the_deeds() -> None:
    deeds = {line.split()[1] for line in plan(1).splitlines()}
    assert plan(1) == plan(1)
    assert plan(1) != plan(2)
    assert deeds >= {"enter", "kill", "hang", "drop", "stop", "cont", "cut_down", "remount", "calm"}
    assert deeds >= {"freeze", "clock", "squeeze", "compact"}


def test_usage() -> None:
    done = subprocess.run(
        [CHAOS, "--mutant", "no-such"], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 2


def test_the_mutants_are_all_tested() -> None:
    done = subprocess.run([CHAOS, "--mutants"], capture_output=True, text=True, timeout=60)
    names = {line.split()[0] for line in done.stdout.splitlines()}
    assert names == {"none", *QUICK, *SLOW}


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.timeout(60 + MARGIN)
def test_a_minute(chaos: Chaos) -> None:
    code, said = end(chaos("--seed", "1", "--seconds", "60"), 60)
    assert code == 0
    assert "scripts/chaos --seed 1 --seconds 60" in said
    done = re.search(
        r"^chaos: (\d+) steps in \d+ s, (\d+) punches, (\d+) moves, nothing found$",
        said, re.MULTILINE,
    )  # fmt: skip
    assert done
    assert int(done[1]) > 10
    assert int(done[2]) > 100
    assert int(done[3]) > 0


@pytest.mark.slow
@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.timeout(60 + MARGIN)
@pytest.mark.parametrize("seed", range(2, 6))
def test_other_minutes(chaos: Chaos, seed: int) -> None:
    code, _ = end(chaos("--seed", str(seed), "--seconds", "60", "--torrents", "1", "--quiet"), 60)
    assert code == 0


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.timeout(60 + MARGIN)
@pytest.mark.parametrize(
    "mutant", [*QUICK, *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW)]
)
def test_a_mutant_is_found(chaos: Chaos, mutant: str) -> None:
    seed = SEEDS.get(mutant, 7)
    run = ("--seed", str(seed), "--seconds", "60", "--mutant", mutant)
    code, said = end(chaos("--quiet", *run), 60)
    assert code == 1
    assert re.search(rf"^chaos: FOUND at step \d+, seed {seed}: Breach: ", said, re.MULTILINE)
    assert f"scripts/chaos {' '.join(run)}" in said.splitlines()[-1]


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.timeout(60 + MARGIN)
def test_interrupted(chaos: Chaos) -> None:
    process = chaos("--seed", "1", "--seconds", "600")
    assert process.stdout is not None
    for line in process.stdout:
        if re.search("step (?!1 )", line):
            break
    process.send_signal(signal.SIGINT)
    code, said = end(process, 0)
    assert code == 130
    assert "interrupted at step" in said
