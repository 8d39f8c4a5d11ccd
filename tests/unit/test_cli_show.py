# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import json
from typing import Any

import pytest

from privfs import control
from privfs.backing.store import Promise
from privfs.cli import show, tables
from privfs.cli.main import call


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (4096, "4K"),
        (1536, "1.5K"),
        (64 << 20, "64M"),
        (12_637_028_352, "11.8G"),
        (99 * 1024 + 512, "99.5K"),
        (100 * 1024 + 512, "100K"),
        (16 << 40, "16T"),
        (4096 << 40, "4096T"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert tables.size(count) == text


def test_sizes_in_sentences() -> None:
    assert tables.gib(12_637_028_352) == "11.8 GiB"
    assert tables.gib(12) == "12 B"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0 µs"), (87.3, "87 µs"), (1300, "1.3 ms"), (2e6, "2.00 s")]
)
def test_durations(value: float, text: str) -> None:
    assert tables.microseconds(value) == text


def test_columns_are_aligned() -> None:
    assert tables.columns(["A", "NUMBER"], [["long", "1"], ["x", "22"]], " >") == [
        "A    NUMBER",
        "long      1",
        "x        22",
    ]


def row(start: int, end: int, state: str = "allocated", *users: str) -> dict[str, Any]:
    return {"start": start, "end": end, "state": state, "users": list(users)}


@pytest.fixture
def mount(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Answers of a mount: question (and page for maps) → answer."""
    answers: dict[str, Any] = {}

    def ask(path: object, question: str, **arguments: Any) -> Any:
        key = f"{question} {arguments['start']}" if "start" in arguments else question
        if isinstance(answers[key], OSError):
            raise answers[key]
        return answers[key]

    monkeypatch.setattr(control, "ask", ask)
    monkeypatch.setattr(control, "ask_file", ask)
    return answers


def test_a_long_map_is_asked_for_in_parts_and_joined(mount: dict[str, Any]) -> None:
    size = 16384
    mount["map 0"] = {"size": size, "rows": [row(0, 4096, "hole"), row(4096, 8192)], "next": 2}
    mount["map 2"] = {"size": size, "rows": [row(8192, 12288)], "next": 3}
    mount["map 3"] = {"size": size, "rows": [row(12288, 16384, "mapped", "a", "b")], "next": None}
    found = show.whole_map("f")
    assert [(r["start"], r["end"], r["state"]) for r in found["rows"]] == [
        (0, 4096, "hole"),
        (4096, 12288, "allocated"),
        (12288, 16384, "mapped"),
    ]
    assert found["totals"] == {"hole": 4096, "allocated": 12288, "mapped": 4096}
    lines = show.map_lines(found, in_bytes=True)
    assert lines[3] == "0x0000000000003000-0x0000000000003fff 4096 mapped    a, b"
    assert lines[-3:] == [
        "Allocated:       12288",
        "Mapped by users:  4096",
        "Holes:            4096",
    ]


def test_an_empty_file_has_an_empty_map(mount: dict[str, Any]) -> None:
    mount["map 0"] = {"size": 0, "rows": [], "next": None}
    assert show.map_lines(show.whole_map("f"), in_bytes=False)[:2] == [
        "RANGE SIZE STATE USERS",
        "",
    ]


STAT = {
    "inode": 7, "personality": "resizable", "size": 1 << 20, "allocated": 8192, "mapped": 4096,
    "held": 8192,
    "backing": {
        "store": "hugetlb", "page_size": 2 << 20, "promises": {"reclaim": True, "audit": True},
    },
    "extents": 1, "users": ["vm(1)"],
    "mapped_by": [{"user": "vm(1)", "mapped": 4096}], "exclusive": None,
    "seals": ["GROW"], "purpose": ["USER_INACCESSIBLE"],
    "operations": [{"step": "wait", "start": 0, "end": 4096}],
}  # fmt: skip
STATUS = {
    "mountpoint": "/m", "pid": 5, "personality": "resizable", "mode": "direct_io",
    "backing": {
        "store": "secretmem", "page_size": 2 << 20, "promises": {"reclaim": False, "audit": False},
    },
    "passthrough_errno": errno.EPERM,
    "memory": {"total": 1 << 20, "used": 4096, "free": 1 << 19, "available": 1 << 18},
    "files": 1, "extents": 1, "kills": 2, "failures": 0,
    "invalidations": {
        "total": 3, "p50_us": 50.0, "p90_us": 100.0, "p99_us": 2500.0, "max_us": 9000.0,
    },
    "strays": [{"inode": 7, "pages": 2, "runs": [[0, 8192]], "users": ["a(1)", "b(2)"]}],
    "incidents": [{"time": number, "what": f"thing {number}"} for number in range(9)],
    "sessions": [
        {"user": "vm", "pid": 9, "state": "ready", "fence": "uffd", "files": [7],
         "exclusive": [], "granted": 4096, "unacknowledged": 1,
         "outstanding": [{"seq": 4, "inode": 7, "seconds": 0.25, "start": 0, "end": 4096}]}
    ],
}  # fmt: skip


def test_stat_shows_what_is_under_way(
    mount: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    mount["stat"] = STAT
    assert call(["stat", "f"]) == 0
    said = capsys.readouterr().out
    assert "Held:        8K in 1 extents" in said
    assert "Backing:     hugetlb, pages of 2M\nSize:" in said
    assert "Seals:       GROW" in said
    assert "Operations:  wait 0x0-0xfff" in said
    assert "Users:       vm(1) 4K\nShared:      not in this file; of a kvmsim: kvmsim stat" in said
    assert call(["stat", "--json", "f"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"file": "f"} | STAT]


def test_status_shows_users_and_why_there_is_no_passthrough(
    mount: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    mount["status"] = STATUS
    assert call(["status", "/m"]) == 0
    said = capsys.readouterr().out
    assert "direct_io (passthrough: Operation not permitted)" in said
    backing = said.partition("Backing:")[2].partition("Refusal:")[0].split("\n")
    assert backing[0].strip() == "secretmem, pages of 2M"
    assert backing[1].startswith("Beware:        memory that was given up is free when the last ")
    assert backing[1].endswith("; " + Promise.AUDIT.value)
    budget = "Memory:        1M budget, 4K used, 512K free; the machine can give 256K of it\n"
    assert budget in said
    assert "3, p50 50 µs, p99 2.5 ms, at most 9.0 ms; 2 users killed, 0 failed\n" in said
    stray = "2 freed pages of inode 7, given to nobody; held by a(1), b(2)"
    assert f"Touched:       {stray}\n" in said
    lines = said.splitlines()
    users = lines.index("USER PID STATE FENCE FILES GRANTED UNACKED")
    assert lines[users : users + 5] == [
        "USER PID STATE FENCE FILES GRANTED UNACKED",
        "vm     9 ready uffd      1      4K       1",
        "",
        "WAITED FOR INODE RANGE     SEQ    SINCE",
        "vm             7 0x0-0xfff   4 250.0 ms",
    ]
    assert [line.split(maxsplit=2)[2] for line in lines[-5:]] == [f"thing {n}" for n in range(4, 9)]


def test_who_has_a_file_exclusively_is_shown_beside_it(
    mount: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    mount["stat"] = STAT | {"exclusive": "vm(1)"}
    assert call(["stat", "f"]) == 0
    assert "Users:       vm(1) 4K exclusive\n" in capsys.readouterr().out
    mount["stat"] = STAT | {"exclusive": "td(2)", "users": [], "mapped_by": []}
    assert call(["stat", "f"]) == 0
    assert "Users:       td(2) exclusive, not registered\n" in capsys.readouterr().out
    (session,) = STATUS["sessions"]
    mount["status"] = STATUS | {"sessions": [session | {"files": [7, 8], "exclusive": [8]}]}
    assert call(["status", "/m"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "vm     9 ready uffd  2 (1 exclusive)      4K       1" in lines


def test_status_of_a_mount_that_is_older_than_we_are(
    mount: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    told = {name: value for name, value in STATUS.items() if name != "invalidations"}
    mount["status"] = told
    assert call(["status", "/m"]) == 0
    said = capsys.readouterr().out
    assert "served by another version of privfs, which does not tell 'invalidations'" in said


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (control.ControlError(errno.ENOTCONN, "f: not here"), 5, "f: not here"),
        (control.ControlError(errno.ECONNRESET, "f: ended"), 5, "f: ended"),
        (control.ControlError(errno.ETIMEDOUT, "f: hung"), 5, "f: hung"),
        (control.ControlError(errno.ENOENT, "inode 3 is no file"), 1, "f: inode 3 is no file"),
        (OSError(errno.ENOTCONN, "no", "f"), 5, "privfs umount"),
        (OSError(errno.ENOENT, "No such file", "f"), 1, "f: No such file"),
        (OSError(errno.EACCES, "Permission denied", "f"), 1, "f: Permission denied"),
    ],
)
def test_refusals_are_explained(
    mount: dict[str, Any], capsys: pytest.CaptureFixture[str],
    error: OSError, code: int, words: str,
) -> None:  # fmt: skip
    mount["stat"] = error
    assert call(["stat", "f"]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("privfs: ")
    assert words in said.err
    assert said.err.count("f: ") == 1
