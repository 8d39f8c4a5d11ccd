# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmsim demo``: all that it claims holds for every kind of guest, and it leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from kvmsim_program import KVMSIM, MIB, kvmsim
from mounts import Mounted, mount_points

from kvmsim.cli.demos.kinds import SHOWN
from kvmsim.cli.demos.stage import Differs, Json, Stage, Text
from kvmsim.cli.exitcodes import Exit

pytest_plugins = ["guest_fixtures", "program_fixtures"]
pytestmark = pytest.mark.fuse

SECONDS = 280  # it takes 15 s; a machine that is busy with other tests is slow
STEPS = 7


@pytest.fixture(scope="module")
def kernel_file(image: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernel") / "kernel.elf"
    path.write_bytes(image)
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where demonstrations work; nothing may be left there, and no process."""
    place = tmp_path_factory.mktemp("work")
    yield place
    mounts = [mounted for mounted in mount_points() if mounted.startswith(os.fspath(place))]
    for mounted in mounts:
        subprocess.run(["umount", "-l", mounted], capture_output=True, check=False)
    assert mounts == []
    assert os.listdir(place) == []
    assert [p for p in psutil.process_iter(["cmdline"])
            if any(os.fspath(place) in word for word in p.info["cmdline"] or ())] == []  # fmt: skip


@pytest.fixture(scope="module")
def environment(kernel_file: Path, work: Path) -> dict[str, str]:
    return dict(os.environ) | {"KVMSIM_KERNEL": os.fspath(kernel_file), "TMPDIR": os.fspath(work),
                               "XDG_RUNTIME_DIR": os.fspath(kernel_file.parent)}  # fmt: skip


def shown(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KVMSIM, "demo", *arguments], capture_output=True, text=True, timeout=SECONDS,
        check=False, stdin=subprocess.DEVNULL, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def events(environment: dict[str, str]) -> list[dict[str, Any]]:
    """What ``kvmsim demo all`` tells."""
    done = shown(environment, "all", "--json")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(SECONDS + 10)
@pytest.mark.parametrize("name", SHOWN)
def test_everything_that_is_claimed_holds(name: str, events: list[dict[str, Any]]) -> None:
    mine = [event for event in events if event["demo"] == name]
    assert [e["event"] for e in (mine[0], mine[-1])] == ["begin", "end"]
    assert sum(e["event"] == "step" for e in mine) == STEPS
    claims = [e for e in mine if e["event"] == "claim"]
    assert all(e["holds"] for e in claims)
    assert mine[-1]["held"]
    assert mine[-1]["claims"] == len(claims) >= 24
    said = {e["text"] for e in claims}
    measured = SHOWN[name].evidence is not None
    assert ("the report says the same" in said) == measured
    assert ("it takes a new page, knowing of the loss" in said) == bool(SHOWN[name].refused)
    assert f"it meets: {SHOWN[name].seen.value}" in said
    assert any(text.startswith("left over: ") for text in said)


def test_what_the_hardware_is_asked(events: list[dict[str, Any]]) -> None:
    flows = {
        name: [e["counts"] for e in events if e["event"] == "calls" and e["demo"] == name]
        for name in SHOWN
    }
    launch = flows["tdx"][0]
    assert list(launch)[:2] == ["TDH.MNG.CREATE", "TDH.MNG.KEY.CONFIG"]
    assert list(launch)[-1] == "TDH.MR.FINALIZE"
    assert launch["TDH.MR.EXTEND"] == 16 * launch["TDH.MEM.PAGE.ADD"]
    taken = ["TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "TDH.MEM.PAGE.DEMOTE", "TDH.MEM.PAGE.REMOVE"]
    assert [list(counts) for counts in flows["tdx"]].count(taken) == 2
    assert list(flows["tdx"][-1])[-1] == "TDH.PHYMEM.PAGE.RECLAIM"
    launch = flows["snp"][0]
    assert list(launch)[:2] == ["SNP_GCTX_CREATE", "SNP_LAUNCH_START"]
    assert list(launch)[-1] == "SNP_LAUNCH_FINISH"
    assert "SNP_DECOMMISSION" in flows["snp"][-1]
    assert "guest_relinquish" in {name for counts in flows["pkvm"] for name in counts}
    assert flows["sw"] == []


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 10)
def test_eager_acceptance_for_a_person(environment: dict[str, str]) -> None:
    done = shown(environment, "snp", "--eager")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-2000:]
    assert "\033" not in done.stdout, "colours are for terminals"
    assert "2. Memory becomes the guest's at boot" in done.stdout
    assert "✓ all of it is accepted already" in done.stdout
    assert "$ scripts/measure --kind snp --memory 32M --vcpus 2 --eager --report -" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110
    assert "snp: all " in done.stdout.splitlines()[-2]


@pytest.mark.usefixtures("kernel")
def test_memory_of_one_s_own(mounted: Mounted) -> None:
    path = mounted.path / "ram"
    done = kvmsim("demo", "sw", "--memory", path, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert path.stat().st_size == 32 * MIB
    assert mounted.stat("ram")["users"] == []
    os.truncate(path, 16 * MIB)
    done = kvmsim("demo", "sw", "--memory", path)
    assert done.returncode == Exit.FAILED
    assert "less than offset 0 and size 33554432 need; make it longer" in done.stderr
    done = kvmsim("demo", "sw", "--memory", "/dev/null")
    assert done.returncode == Exit.FAILED
    assert "is no regular file" in done.stderr


_FORGED = """
    import json, sys
    print(json.dumps({"pages": 1, "measurement": "00" * 48, "same": False}))
    sys.exit(1)
"""


@pytest.mark.timeout(SECONDS + 10)
def test_another_measurement_fails_the_demonstration(
    environment: dict[str, str], mounted: Mounted, tmp_path: Path
) -> None:
    (tmp_path / "measure").write_text(textwrap.dedent(_FORGED))
    code = (
        "import pathlib, sys, kvmsim.cli.demo as demo\n"
        "from kvmsim.cli.main import main\n"
        "demo._MEASURE = pathlib.Path(sys.argv.pop())\n"
        "main(sys.argv[1:])\n"
    )
    ram = os.fspath(mounted.path / "ram")
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "tdx", "--memory", ram, tmp_path / "measure"],
        capture_output=True, text=True, timeout=SECONDS, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == Exit.FAILED
    assert "✗ the report says the same" in done.stdout
    assert "claims hold" not in done.stdout
    assert done.stderr.startswith("kvmsim: tdx: the report says the same: {")
    assert mounted.stat("ram")["users"] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demonstration_leaves_nothing(
    number: signal.Signals, environment: dict[str, str], work: Path
) -> None:
    with subprocess.Popen(
        [*KVMSIM, "demo", "tdx"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("> touch"):
                process.send_signal(number)
                break
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    assert "internal error" not in errors
    assert os.listdir(work) == []


def test_a_claim_that_does_not_hold() -> None:
    said: list[str] = []
    stage: Stage = Text(said.append)
    stage.begin("x", "y")
    stage.claim(True, "good")
    with pytest.raises(Differs, match=r"^bad: 7$"):
        stage.claim(False, "bad", 7)
    assert said == ["x: y", "  ✓ good", "  ✗ bad"]
    lines: list[bytes] = []
    stage = Json(lines.append)
    stage.begin("x", "y")
    with pytest.raises(Differs):
        stage.claim(False, "bad", 7)
    stage.end("x", 0.5, "bad: 7")
    told = [json.loads(line) for line in lines]
    assert told[1] == {"event": "claim", "demo": "x", "holds": False, "text": "bad",
                       "otherwise": "7"}  # fmt: skip
    assert told[2]["held"] is False


def test_a_quiet_one_says_nothing() -> None:
    said: list[str] = []
    stage = Text(said.append, quiet=True)
    stage.begin("x", "y")
    stage.title("t")
    stage.say("s")
    stage.typed("t")
    stage.shown("u")
    stage.calls({"A": 2})
    stage.claim(True, "good")
    stage.end("x", 1.0, "")
    assert said == []
