# SPDX-License-Identifier: GPL-2.0-or-later
"""The step in which a guest's report is checked, by a program that trusts nothing of this host."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import subprocess
from collections.abc import Sequence
from typing import Final

from kvmsim.cli.demos.kinds import Evidence, Shown
from kvmsim.cli.demos.stage import Differs, Stage
from kvmsim.cli.demos.talk import Talk
from kvmsim.console import ConsoleVm

_REPORTED: Final = re.compile(r"^report 0x[0-9a-f]+: ([0-9a-f]+)$")
_SECONDS: Final = 60


def attest(stage: Stage, shown: Shown, talk: Talk, vm: ConsoleVm, verifier: Sequence[str]) -> None:
    """The step; ``verifier`` is the command line of that program, which reads the console."""
    stage.title("The guest proves what it was started with")
    evidence = shown.evidence
    if evidence is None:
        stage.say(shown.none)
        stage.typed("report", "> ")
        answer = talk.ask("report")[-1]
        stage.shown(answer)
        stage.claim("kind=none bytes=0" in answer, "the guest has none either", answer)
        return
    stage.say("A verifier sends 64 random bytes; the report must have them, so it is fresh.")
    nonce = secrets.token_bytes(64)
    stage.typed(f"report {nonce.hex()}", "> ")
    lines = talk.ask(f"report {nonce.hex()}")
    stage.shown("\n".join(lines))
    rows = [row[1] for line in lines if (row := _REPORTED.match(line))]
    found = bytes.fromhex("".join(rows))
    stage.claim(len(found) == evidence.size, f"a report of {evidence.size} bytes", len(found))
    stage.claim(found[evidence.data :][:64] == nonce, "with the verifier's bytes in it")
    measured = found[evidence.measurement :][:48].hex()
    assert vm.guard is not None
    with vm.running.lock:
        said = vm.guard.describe()[evidence.key]
    stage.claim(measured == said, f"it names {evidence.name} as the hardware has it", measured)
    _recompute(stage, evidence, measured, "\n".join(lines), verifier)


def _recompute(
    stage: Stage, evidence: Evidence, measured: str, report: str, verifier: Sequence[str]
) -> None:
    stage.say("A program that knows the manuals' rules, and nothing of this host, computes from "
              "the kernel's file what it has to be:")  # fmt: skip
    stage.typed(shlex.join(["scripts/measure", *verifier[3:]]))
    done = subprocess.run(
        [*verifier, "--json"], input=report, capture_output=True, text=True, timeout=_SECONDS,
        check=False,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise Differs(f"{verifier[2]}: {done.stderr.strip()}")
    answer = json.loads(done.stdout)
    stage.shown(f"{evidence.name} of {answer['pages']} pages:\n{answer['measurement']}")
    same = answer["same"] and answer["measurement"] == measured
    stage.claim(same, "the report says the same", answer)
