# SPDX-License-Identifier: GPL-2.0-or-later
"""The program ``kvmsim`` without a mount: usage, exit codes, pages of the manual, byte moving."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvmsim.cli.exitcodes import MEANING, Exit, exit_code
from kvmsim.cli.exitcodes import table as codes
from kvmsim.cli.failure import Failure, explained
from kvmsim.cli.main import call
from kvmsim.cli.session import Console
from kvmsim.cli.streams import JsonLines, Outlet
from kvmsim.console import End, Ending, Lines
from kvmsim.images import NoImage, find_kernel, read_kernel
from kvmsim.script import table as grammar
from kvmsim.vmm.elf import ImageError
from privfs.notifier.lane import LinkError

MANUAL = Path(__file__).parents[2] / "docs" / "kvmsim.md"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "Usage: kvmsim"),
        (["bot"], "No such command"),
        (["boot"], "Missing option '--memory'"),
        (["boot", "--memory", "x,slot=1"], "no option slot"),
        (["boot", "--memory", "x", "--vcpus", "0"], "1<=x<=16"),
        (["boot", "--memory", "x", "--vcpus", "17"], "1<=x<=16"),
        (["boot", "--memory", "x", "--timeout", "0"], "x>0"),
        (["boot", "--memory", "x", "--console", "tty"], "write stdio or unix:PATH"),
        (["boot", "--memory", "x", "--console", "unix:"], "write stdio or unix:PATH"),
        (["boot", "--memory", "x", "--discard", "all"], "'none', 'private', 'shared', 'both'"),
        (["run"], "Missing argument 'SCRIPT'"),
        (["run", "/nonexistent.kvs"], "/nonexistent.kvs: No such file or directory"),
        (["run", "/nonexistent.kvs"], "name a script, see: kvmsim run --help"),
        (["run", "x", "--var", "1=2"], "write NAME=VALUE"),
        (["demo"], "Choose from: tdx, snp, pkvm, sw, all. See: kvmsim demo --help"),
        (["attack"], "Missing command. See: kvmsim attack --help"),
        (["attack", "run", "x"], "no attack x; kvmsim attack list shows them. See:"),
        (["exec", "--no-such-flag", "--", "true"], "No such option '--no-such-flag'"),
        (["exec", "--vm-types", "x", "--", "true"], "tdx, snp. See: kvmsim exec --help"),
        (
            ["exec", "--trace", "/none/x", "--", "true"],
            "--trace /none/x: No such file or directory; name a file that can be written",
        ),
    ],
)
def test_wrong_usage(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(arguments) == Exit.USAGE
    said = capsys.readouterr()
    assert why in said.err
    assert said.out == ""
    assert not arguments or said.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["boot", "-h"], ["run", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if arguments == ["boot", "-h"]:
        arguments = ["boot", "--help"]
    assert call(arguments) == Exit.OK
    assert "Usage: kvmsim" in capsys.readouterr().out


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"]) == Exit.OK
    found = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert set(found) == {"kvmsim", "unicorn", "numpy", "python", "kernel"}
    assert "missing" not in found.values()


@pytest.mark.parametrize(
    ("text", "why"),
    [("say a\nnonsense\n", ":2: no statement 'nonsense'"), ("say $X", ":1: no variable X")],
)
def test_a_wrong_script(
    tmp_path: Path, text: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "s.kvs"
    script.write_text(text)
    assert call(["run", str(script)]) == Exit.USAGE
    assert f"{script}{why}" in capsys.readouterr().err


def test_a_script_without_vms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "s.kvs"
    script.write_text("host echo $A b\noutput ^x y b$\nfails false\nsay $A held\n")
    assert call(["run", str(script), "--var", "A=x y"]) == Exit.OK
    said = capsys.readouterr()
    assert said.out == "x y held\n"
    assert said.err == f"kvmsim: {script}: 4 statements held\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("host false", ":1: 'false': expected 0, got 1; it printed nothing"),
        ("host echo no; exit 3", "expected 0, got 3; it printed 'no'"),
        ("fails true", "expected another status than 0, got 0"),
        ("fails no-such-command-anywhere", "was to be refused, but it was not run"),
        ("host echo $NOBODY_SET_THIS", "NOBODY_SET_THIS: "),
        ("host echo abc\noutput ^b", ":2: expected output like /^b/, the command printed 'abc'"),
        ("vm a memory=/nonexistent/ram", ":1: /nonexistent/ram: No such file or directory"),
    ],
)
def test_what_does_not_hold(
    tmp_path: Path, text: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "s.kvs"
    script.write_text(text)
    assert call(["run", str(script)]) == Exit.FAILED
    assert why in capsys.readouterr().err


def test_a_host_command_has_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvmsim.cli.session.HOST_TIMEOUT", 0.2)
    script = tmp_path / "s.kvs"
    script.write_text("host sleep 600")
    assert call(["run", str(script)]) == Exit.FAILED
    assert "did not end within 0.2 s" in capsys.readouterr().err


def test_what_a_host_command_leaves_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "s.kvs"
    script.write_text("host sleep 600 & echo $! > $PID\n")
    assert call(["run", "-q", str(script), "--var", f"PID={tmp_path}/pid"]) == Exit.OK
    try:
        pidfd = os.pidfd_open(int((tmp_path / "pid").read_text()))
    except ProcessLookupError:
        return
    ended = select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)
    assert ended


@pytest.mark.parametrize(
    ("error", "code", "why"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "m/ram"), Exit.MEMORY,
         "m/ram: Permission denied"),
        (LinkError(errno.ECONNREFUSED, "cannot reach the owner"), Exit.MEMORY,
         "cannot reach the owner; is the mount alive? See: privfs status"),
        (LinkError(errno.EBUSY, "the owner refused"), Exit.MEMORY,
         "the owner refused; see: privfs status"),
        (ValueError("too many slots"), Exit.MEMORY, "too many slots"),
        (ImageError("no ELF"), Exit.IMAGE, "guest kernel: no ELF; build it with scripts/setup"),
        (NoImage("none; run scripts/setup"), Exit.IMAGE, "none; run scripts/setup"),
    ],
)  # fmt: skip
def test_why_a_vm_cannot_be_made(error: Exception, code: int, why: str) -> None:
    with pytest.raises(Failure) as caught, explained():
        raise error
    assert (caught.value.code, str(caught.value)) == (code, why)


def test_an_error_that_is_not_about_the_memory_is_not_said_to_be() -> None:
    with pytest.raises(OSError, match="Cannot allocate"), explained():
        raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_closed_standard_streams_are_not_taken_by_others() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m kvmsim boot --memory /nonexistent/ram <&- >&- 2>&-',
         sys.executable], timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == Exit.MEMORY


# --- exit codes and the manual -----------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 2, 120, 127, 255])
def test_the_guest_has_its_say(status: int) -> None:
    assert exit_code(Ending(End.GUEST, status, "")) == status


def test_every_other_end_has_a_code_of_its_own() -> None:
    codes = {end: exit_code(Ending(end, 1, "")) for end in End if end is not End.GUEST}
    assert len(set(codes.values())) == len(codes)
    assert codes[End.IDLE] == Exit.OK
    assert set(MEANING) == set(Exit)


@pytest.mark.parametrize(("name", "table"), [("exit codes", codes()), ("statements", grammar())])
def test_the_manual_has_the_tables_of_the_code(name: str, table: str) -> None:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", MANUAL.read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == table


# --- images ------------------------------------------------------------------------------------


def test_where_a_kernel_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMSIM_KERNEL", "/from/environment")
    assert find_kernel("/named") == Path("/named")
    assert find_kernel() == Path("/from/environment")
    monkeypatch.delenv("KVMSIM_KERNEL")
    monkeypatch.setattr("kvmsim.images.__file__", str(tmp_path / "kvmsim" / "images.py"))
    with pytest.raises(NoImage, match="run scripts/setup"):
        find_kernel()
    built = tmp_path / "scripts/guests/build/kernel.elf"
    built.parent.mkdir(parents=True)
    built.write_bytes(b"elf")
    assert find_kernel() == built
    assert read_kernel() == b"elf"


def test_a_kernel_that_is_not_there() -> None:
    with pytest.raises(NoImage, match="/nonexistent: No such file"):
        read_kernel("/nonexistent")


# --- lines and bytes ---------------------------------------------------------------------------


def test_lines_lose_their_prompt() -> None:
    lines = Lines()
    assert lines.feed(b"boot\r\n> ok a\n> > er") == ["boot", "ok a"]
    assert lines.feed(b"ror\xff\n> ") == ["error\ufffd"]
    assert lines.feed(b"ok > b\n") == ["ok > b"]


def test_json_lines() -> None:
    out: list[bytes] = []
    console = JsonLines(out.append, "vm0")
    console.output(b'a "b"\nhalf')
    console.output(b" line\n")
    assert [json.loads(line) for line in out] == [
        {"event": "console", "vm": "vm0", "line": 'a "b"'},
        {"event": "console", "vm": "vm0", "line": "half line"},
    ]


def test_expected_lines_are_done_with() -> None:
    console = Console()
    console.output(b"one\ntwo\n> three\n")
    assert console.expect(re.compile("two"), 5)
    assert not console.expect(re.compile("one"), 0)
    assert not console.expect(re.compile("three"), 0), "a failed wait has read to the end"
    assert console.last == "three"


def test_who_expects_is_woken_by_a_line_and_by_the_end() -> None:
    console = Console()
    found: list[bool] = []

    def wait() -> None:
        found.append(console.expect(re.compile("yes"), 30))
        found.append(console.expect(re.compile("never"), 30))

    waiter = threading.Thread(target=wait)
    waiter.start()
    console.output(b"no\nyes\n")
    console.end()
    waiter.join(10)
    assert found == [True, False]


def test_a_full_outlet_holds_the_runner_up_until_it_is_read_or_given_up() -> None:
    outlet = Outlet()
    try:
        outlet.put(bytes(1 << 20))
        done: list[int] = []

        def put(number: int) -> None:
            outlet.put(b"x")
            done.append(number)

        first = threading.Thread(target=put, args=(1,))
        first.start()
        first.join(0.1)
        assert done == []
        assert outlet.peek() == bytes(4096)
        outlet.written(4096)
        first.join(10)
        assert done == [1]
        outlet.put(bytes(1 << 20))  # there was room
        second = threading.Thread(target=put, args=(2,))
        second.start()
        outlet.give_up()
        second.join(10)
        assert done == [1, 2]
    finally:
        outlet.close()


def test_an_outlet_rings_and_can_be_answered() -> None:
    outlet = Outlet()
    try:
        outlet.put(b"a")
        outlet.put(b"b")
        assert os.read(outlet.wake, 1) == b"!"
        outlet.answer()
        with pytest.raises(BlockingIOError):
            os.read(outlet.wake, 1)
        outlet.trim(1)
        assert outlet.peek() == b"b"
    finally:
        outlet.close()
