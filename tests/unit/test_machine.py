# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from privfs.backing import default_size
from privfs.budget import Budget
from privfs.machine import Machine, headroom_bytes
from privfs.personality import Refused

MIB = 1 << 20
PAGES = MIB // 4096  # in a MiB


class Host:
    """A machine of files: 4 GiB, half of them available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 0.0
        self.promised = 0
        (root / "proc/self").mkdir(parents=True)
        self.cgroup("0::/\n")
        self.memory(4096, 2048)

    def memory(self, total: int, available: int) -> None:
        text = f"MemTotal: {total * 1024} kB\nMemFree: 12 kB\nMemAvailable: {available * 1024} kB\n"
        (self.root / "proc/meminfo").write_text(text)

    def cgroup(self, text: str) -> None:
        (self.root / "proc/self/cgroup").write_text(text)

    def limit(self, folder: str, **files: object) -> None:
        place = self.root / "sys/fs/cgroup" / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (place / f"memory.{name}").write_text(f"{text}\n")

    def machine(self) -> Machine:
        return Machine(lambda: self.promised, root=self.root, clock=lambda: self.now)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_this_machine_can_be_read() -> None:
    machine = Machine()
    assert 0 < machine.available_bytes() <= machine.total_bytes()
    assert machine.total_bytes() <= os.sysconf("SC_PHYS_PAGES") * 4096
    assert 0 <= machine.room(0) < machine.total_bytes() // 4096


@pytest.mark.parametrize(
    ("total", "headroom"), [(512, 64), (1024, 64), (4096, 128), (16384, 512), (1 << 20, 512)]
)
def test_headroom(total: int, headroom: int) -> None:
    assert headroom_bytes(total * MIB) == headroom * MIB


def test_without_limits_the_machine_counts(host: Host) -> None:
    host.limit("", max="max", current=1, stat="")
    machine = host.machine()
    assert machine.total_bytes() == 4096 * MIB
    assert machine.available_bytes() == 2048 * MIB
    assert machine.room(0) == (2048 - 128) * PAGES


def test_the_lowest_limit_of_cgroup_v2_counts_less_what_can_be_reclaimed(host: Host) -> None:
    host.cgroup("0::/a/b\n")
    host.limit(
        "a",
        max=1024 * MIB,
        current=700 * MIB,
        stat=f"anon 5\ninactive_file {30 * MIB}\nactive_file {20 * MIB}\nslab_reclaimable 0",
    )
    host.limit("a/b", max=2048 * MIB, current=300 * MIB, stat="anon 5")  # fmt: skip
    machine = host.machine()
    assert machine.total_bytes() == 1024 * MIB
    assert machine.available_bytes() == 374 * MIB


def test_limits_of_cgroup_v1_count(host: Host) -> None:
    host.cgroup("9:cpu:/other\n4:memory:/a\n0::/\n")
    stat = f"inactive_file 7\ntotal_inactive_file {10 * MIB}\ntotal_active_file 0"
    host.limit("memory/a", limit_in_bytes=512 * MIB, usage_in_bytes=100 * MIB, stat=stat)
    host.limit("memory", limit_in_bytes=9223372036854771712, usage_in_bytes=1, stat=stat)
    machine = host.machine()
    assert machine.total_bytes() == 512 * MIB
    assert machine.available_bytes() == 422 * MIB


def test_a_path_outside_the_cgroup_namespace_leads_nowhere(host: Host) -> None:
    host.limit("../../elsewhere", max=1, current=0, stat="")
    host.cgroup("0::/../../../elsewhere\n")
    assert host.machine().available_bytes() == 2048 * MIB


def test_a_cgroup_that_vanishes_limits_no_more(host: Host) -> None:
    host.cgroup("0::/a\n")
    host.limit("a", max=MIB, current=0, stat="")
    machine = host.machine()
    assert machine.available_bytes() == MIB
    (host.root / "sys/fs/cgroup/a/memory.current").unlink()
    assert machine.available_bytes() == 2048 * MIB


def test_what_is_promised_between_two_readings_is_taken_off(host: Host) -> None:
    machine = host.machine()
    assert machine.room(1000 * PAGES) == 1920 * PAGES
    host.memory(4096, 4096)
    assert machine.room(1) == 920 * PAGES  # the reading is still fresh
    host.now += 1
    host.promised = 500 * PAGES  # of the thousand: not allocated yet
    assert machine.room(1) == (4096 - 128 - 500) * PAGES


def test_what_is_refused_is_not_taken_off_and_was_read_afresh(host: Host) -> None:
    machine = host.machine()
    assert machine.room(10_000 * PAGES) == 1920 * PAGES
    assert machine.room(1920 * PAGES) == 1920 * PAGES
    assert machine.room(1) == 1920 * PAGES  # nothing left: looked again
    host.memory(4096, 100)
    host.now += 1
    assert machine.room(1) == 0


def test_the_default_budget_is_half_of_what_there_is(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Machine.__init__.__kwdefaults__, "root", host.root)
    assert default_size() == 2048 * MIB
    host.cgroup("0::/a\n")
    host.limit("a", max=MIB + 5000, current=0, stat="")
    assert default_size() == 512 * 1024


def test_a_budget_asks_the_machine_before_it_changes() -> None:
    asked: list[int] = []

    def room(pages: int) -> int:
        asked.append(pages)
        return 5

    budget = Budget(100, 10, room)
    with pytest.raises(
        Refused, match="6 pages wanted, the machine can spare 5 of the 90"
    ) as caught:
        budget.reserve(6)
    assert (caught.value.errno, budget.used) == (errno.ENOSPC, 10)
    budget.reserve(5)
    budget.reserve(0)  # needs nothing: asks nobody
    with pytest.raises(Refused, match="-o size="):
        budget.reserve(1000)
    assert (budget.used, asked) == (15, [6, 5])
