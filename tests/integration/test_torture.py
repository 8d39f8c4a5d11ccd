# SPDX-License-Identifier: GPL-2.0-or-later
"""Punches under running vCPUs: the guest sees no stale byte, the mount no touch of freed memory.

Then the same with one rule of the contract switched off, which must be found out.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torture
from actors import HERE, PATIENCE, ROOT
from mounts import Mounted, cleared

from kvmsim.fence import Kind
from kvmsim.hostmem import HostMemory
from kvmsim.running import RunningVm
from kvmsim.vcpus import Vcpu

pytest_plugins = ["guest_fixtures", "actor_fixtures"]
pytestmark = pytest.mark.fuse

RAM = 16 << 20
FOUND = "freed memory was touched"
WE_ARE_THE_USER = "t_ack=0"  # and must not be killed for what a mutant of ours does
MUTANT_PUNCHES = 1000


class NoFlush(RunningVm):
    """A vCPU enters guest code with whatever its TLB holds."""

    def _flush(self, vcpu: Vcpu) -> None:
        return


class NoDrain(RunningVm):
    """Acknowledges while a vCPU is still in guest code."""

    def drain(self, epoch: int) -> None:
        return


Suspect = Callable[..., Mounted]


@pytest.fixture
def suspect(tmp_path: Path) -> Iterator[Suspect]:
    """Return a function that mounts with PROGRAM, whose log may say anything."""
    made: list[Mounted] = []

    def make(*program: str | Path) -> Mounted:
        path = tmp_path / "suspect"
        path.mkdir()
        log_path = tmp_path / "suspect.log"
        ready, theirs = os.pipe()
        with open(log_path, "wb") as log, open(ready, "rb") as stream:
            process = subprocess.Popen(
                [sys.executable, *program, "mount", f"--ready-fd={theirs}", "-osize=1G",
                 f"-o{WE_ARE_THE_USER}", "--", path],
                pass_fds=[theirs], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            os.close(theirs)
            made.append(mounted := Mounted(path, process, log_path))
            assert select.select([stream], [], [], PATIENCE)[0], mounted.log()
            mounted.facts = json.loads(stream.readline())
        return mounted

    yield make
    for mounted in made:
        try:
            mounted.end()
        finally:
            left = cleared(mounted)
        assert not left


def run(
    mounted: Mounted,
    host: HostMemory,
    image: bytes,
    seed: int,
    punches: int,
    *,
    running: type[RunningVm] = RunningVm,
    bad: Callable[[], bool] | None = None,
) -> torture.Result:
    """Boot a guest, punch its stamped pages, audit at the end; the file stays."""
    path = mounted.path / "ram"
    path.touch()
    os.truncate(path, RAM)
    guest = torture.boot(host, image, path, running=running)
    try:
        tortured = torture.Torture(guest, path, seed)
        tortured.start()
        tortured.punch(punches, bad)
        return tortured.leave() if bad is not None and bad() else tortured.stop()
    finally:
        guest.close()


def findings(mounted: Mounted) -> bool:
    """Whether the mount has seen a touch of freed memory."""
    return bool(mounted.ask("audit")["findings"]) or FOUND in mounted.log()


def check(result: torture.Result, punches: int) -> None:
    print(result)
    assert (result.punches, result.bad) == (punches, 0)
    assert result.hot * 2 >= punches, "most punches must hit what a vCPU is reading"
    assert result.decisive > 0, "no read would have shown a stale page"
    assert result.reads > punches


def test_punches_of_a_private_file(
    mount: Callable[..., Mounted], host: HostMemory, image: bytes
) -> None:
    mounted = mount(WE_ARE_THE_USER)
    audits: list[dict[str, Any]] = []

    def bad() -> bool:
        if mounted.ask("status")["invalidations"]["total"] // 200 > len(audits):
            audits.append(mounted.ask("audit"))
        return False

    check(run(mounted, host, image, 1, 800, bad=bad), 800)
    assert len(audits) > 2
    assert all((audit["findings"], audit["skipped"]) == ([], 0) for audit in audits)
    mounted.audit()
    status = mounted.ask("status")
    assert (status["kills"], status["failures"]) == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [3, 4])
def test_ten_thousand_punches(
    mount: Callable[..., Mounted], host: HostMemory, image: bytes, seed: int
) -> None:
    mounted = mount(WE_ARE_THE_USER)
    check(run(mounted, host, image, seed, 10_000, bad=lambda: findings(mounted)), 10_000)
    mounted.audit()


@pytest.mark.parametrize("seed", [5, 6])
@pytest.mark.parametrize(
    ("program", "running"),
    [
        (("-m", "privfs"), NoFlush),
        (("-m", "privfs"), NoDrain),
        ((HERE / "freefirst.py",), RunningVm),
    ],
    ids=["no flush", "no drain", "free first"],
)
def test_a_rule_switched_off_is_found_out(
    suspect: Suspect,
    unfenced: HostMemory,
    image: bytes,
    program: tuple[str | Path, ...],
    running: type[RunningVm],
    seed: int,
) -> None:
    mounted = suspect(*program)

    def bad() -> bool:
        return findings(mounted)

    result = run(mounted, unfenced, image, seed, MUTANT_PUNCHES, running=running, bad=bad)
    print(result)
    assert result.bad or findings(mounted)


@pytest.mark.parametrize("mutant", [NoFlush, NoDrain])
def test_the_fence_finds_it_out_before_any_harm_is_done(
    mount: Callable[..., Mounted], host: HostMemory, image: bytes, mutant: type[RunningVm]
) -> None:
    """What the mount cannot see then: no stale touch brings a page back."""
    if host.fence.kind is not Kind.UFFD:
        pytest.skip("no userfaultfd: see privfs doctor")
    told: list[str] = []

    class Watched(mutant):  # type: ignore[valid-type,misc]
        def trespassed(self, why: str) -> None:
            told.append(why)
            super().trespassed(why)

    mounted = mount(WE_ARE_THE_USER)
    result = run(mounted, host, image, 7, MUTANT_PUNCHES, running=Watched, bad=lambda: bool(told))
    print(result)
    assert told
    assert "touched ungranted" in told[0]
    mounted.audit()
