# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket of a kvmsim process: who finds it, who may ask, what is left behind."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from kvmsim import control
from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.main import call
from kvmsim.cli.stat import stat_lines
from kvmsim.memoryuse import Allocated
from privfs.notifier.lane import connect

PAGE = 4096


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory with a name that is too long for sockets."""
    place = tmp_path / ("x" * 100)
    place.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.fspath(place))
    return place


def report(name: str = "a", **changes: Any) -> dict[str, Any]:
    held = {"private": 5 * PAGE, "shared": 2 * PAGE, "both": PAGE, "stale": PAGE}
    return {
        "vm": name, "pid": 42, "state": "running", "kind": "shared-bit", "hardware": None,
        "fence": "uffd", "discard": "none",
        "vcpus": [{"vcpu": 0, "state": "halted", "faults": 3}],
        "attributes": {"private": 32 << 20, "shared": 2 << 20, "unbacked": 0},
        "allocated": held,
        "slots": [
            {"slot": 1, "gpa": 2 << 20, "size": 32 << 20, "file": "/m/ram", "offset": 0,
             "attributes": {"private": 32 << 20, "shared": 0, "unbacked": 0}, "allocated": held},
        ],
        "counters": {
            "vm": {"faults": 3, "retries": 0, "exits": 1, "installed_pages": 9,
                   "invalidations": 2, "zapped_leaves": 4},
            "runner": {"slices": 1, "flushes": 1, "pages_asked": 2, "shootdowns": 1},
            "vmm": {"conversions_explicit": 8, "conversions_implicit": 1,
                    "conversions_refused": 0, "discarded_bytes": PAGE},
        },
        "error": "",
    } | changes  # fmt: skip


def raw(path: Path, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        connect(sock, os.fspath(path))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as stream:
            return stream.readline()


def test_a_process_answers_until_its_end(runtime: Path) -> None:
    threads = threading.active_count()
    with control.answering() as made:
        assert control.everything() == ([], [])
        made.add("a", report)
        made.add("b", lambda: report("b"))
        assert [vm["vm"] for vm in control.everything()[0]] == ["a", "b"]
        made.remove("a")
        assert [vm["vm"] for vm in control.everything()[0]] == ["b"]
        assert stat.S_IMODE((runtime / "kvmsim").stat().st_mode) == 0o700
    assert list((runtime / "kvmsim").iterdir()) == []
    assert control.everything() == ([], [])
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    "data", [b"\n", b"stat\n", b"[]\n", b'{"ask": "map"}\n', b"[" * 4000 + b"\n", b"\xff\n"]
)
def test_nonsense_is_refused_and_the_next_is_answered(data: bytes) -> None:
    with control.answering() as made:
        assert isinstance(made, control.Control)
        assert json.loads(raw(made.path, data))["errno"] == errno.EINVAL
        assert raw(made.path, b"x" * 5000) == b""
        assert raw(made.path, b'{"ask": "st') == b""
        assert json.loads(raw(made.path, b'{"ask": "stat"}\n')) == {"ok": []}


def test_a_vm_that_cannot_be_told_of(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("broken")

    with control.answering() as made:
        made.add("a", broken)
        found, (silent,) = control.everything()
        assert (found, silent.errno) == ([], errno.EIO)
        assert silent.strerror == f"pid {os.getpid()}: internal error: broken"
    assert [r.message for r in caplog.records] == ["kvmsim stat: a VM cannot be told of"]
    caplog.clear()


def test_only_its_user_and_root_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    us = os.geteuid()
    assert control.admitted(us)
    assert control.admitted(0)
    assert not control.admitted(us + 1)
    with control.answering() as made:
        assert isinstance(made, control.Control)
        monkeypatch.setattr(control, "admitted", lambda uid: uid != us)
        assert json.loads(raw(made.path, b"\n")) == {
            "errno": errno.EPERM, "error": f"this kvmsim is not of uid {us}",
        }  # fmt: skip


@pytest.mark.parametrize("change", ["open", "file", "link"])
def test_a_directory_that_others_could_have_made_is_not_used(
    runtime: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = runtime / "kvmsim"
    if change == "open":
        place.mkdir()
        place.chmod(0o755)
    elif change == "file":
        place.touch(mode=0o600)
    else:
        (runtime / "other").mkdir(mode=0o700)
        place.symlink_to(runtime / "other")
    with control.answering() as made:
        assert isinstance(made, control.NoControl)
        made.add("a", report)
        made.remove("a")
    assert "kvmsim stat will not find this process" in caplog.text
    caplog.clear()
    assert change == "file" or list(place.iterdir()) == []
    with pytest.raises(control.ControlError):
        control.processes()


def test_what_a_killed_process_left_is_removed(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = runtime / "kvmsim"
    place.mkdir(mode=0o700)
    nobody = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    left = [place / f"{pid}.socket" for pid in (nobody, os.getpid())]
    for path in left:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            with monkeypatch.context() as there:
                there.chdir(place)
                sock.bind(path.name)
    (place / "notes.txt").touch()
    assert [process.pid for process in control.processes()] == [os.getpid(), nobody]
    with control.answering() as made:
        made.add("a", report)
        assert [vm["vm"] for vm in control.everything()[0]] == ["a"]
        assert not left[0].exists()
    assert [path.name for path in place.iterdir()] == ["notes.txt"]


def test_a_second_one_of_the_process_does_not_take_its_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with control.answering() as made:
        made.add("a", report)
        with control.answering() as second:
            assert isinstance(second, control.NoControl)
        assert [vm["vm"] for vm in control.everything()[0]] == ["a"]
    assert "Address already in use" in caplog.text
    caplog.clear()


# --- what people see ---------------------------------------------------------------------------


def test_sides_of_a_report_are_what_is_counted() -> None:
    assert set(report()["allocated"]) == set(Allocated.__dataclass_fields__)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with control.answering() as made:
        made.add("a", report)
        assert call(["stat"]) == Exit.OK
        shown = capsys.readouterr().out.splitlines()
        assert shown == stat_lines(report(), in_bytes=False)
        assert "Held:        20K private, 8K shared, 4K on both, 4K stale" in shown
        assert shown[-2].split() == ["SLOT", "GPA", "SIZE", "PRIVATE", "SHARED", "BOTH", "STALE",
                                     "FILE"]  # fmt: skip
        assert shown[-1].split()[2:] == ["32M", "20K", "8K", "4K", "4K", "/m/ram+0x0"]
        assert call(["stat", "--bytes", "42"]) == Exit.OK
        assert "20480 private, 8192 shared, 4096 on both" in capsys.readouterr().out
        assert call(["stat", "--json", "a"]) == Exit.OK
        assert json.loads(capsys.readouterr().out) == [report()]


def test_what_its_hardware_says_of_a_vm() -> None:
    said = {"technology": "TDX 1.5", "mrtd": "0a1b", "rtmr": ["00", "00", "07"],
            "pamt_pages": {"TDCX": 11, "REG": 512}, "frames": {}}  # fmt: skip
    shown = stat_lines(report(kind="tdx", hardware=said), in_bytes=False)
    assert shown[1:6] == [
        "Kind:        tdx (TDX 1.5)",
        "mrtd:        0a1b",
        "rtmr:        2 × 00, 07",
        "pamt_pages:  TDCX 11, REG 512",
        "frames:      none",
    ]


def test_an_owner_that_does_not_answer_is_said() -> None:
    shown = stat_lines(report(allocated=None, error="no owner"), in_bytes=False)
    assert "Held:        ? private, ? shared, ? on both, ? stale" in shown
    assert "Unknown:     no owner" in shown


def test_no_vm(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["stat"]) == Exit.OK
    assert "no VM is up" in capsys.readouterr().out
    assert call(["stat", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out) == []
    assert call(["stat", "b"]) == Exit.FAILED
    assert capsys.readouterr().err.startswith("kvmsim: no VM b; none of yours is up, boot one")
    with control.answering() as made:
        made.add("a", report)
        assert call(["stat", "b"]) == Exit.FAILED
    assert capsys.readouterr().err == "kvmsim: no VM b; name one of yours: a(42)\n"


def test_who_does_not_answer_is_named_after_those_who_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = [control.ControlError(errno.ETIMEDOUT, "pid 9: timed out")]
    monkeypatch.setattr(control, "everything", lambda: ([report()], silent))
    assert call(["stat", "a"]) == Exit.OK
    assert capsys.readouterr().err == ""
    assert call(["stat"]) == Exit.FAILED
    said = capsys.readouterr()
    assert said.out.startswith("VM:          a (pid 42), running\n")
    assert said.err == "kvmsim: pid 9: timed out\n"
    assert call(["stat", "b"]) == Exit.FAILED
    assert capsys.readouterr().err.endswith("name one of yours: a(42); pid 9: timed out\n")
