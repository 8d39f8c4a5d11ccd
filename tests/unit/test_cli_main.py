# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import logging
from pathlib import Path

import pytest

from privfs.cli import exitcodes, main, show
from privfs.cli.exitcodes import MEANING, Exit
from privfs.cli.main import call, cli
from privfs.cli.mount import is_helper_call
from privfs.cli.verbosity import Verbosity

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def test_every_code_has_a_meaning_and_the_docs_show_them() -> None:
    assert list(MEANING) == list(Exit)
    assert exitcodes.table() in DOCS.read_text()


def test_every_command_and_option_is_documented() -> None:
    text = DOCS.read_text()
    for name, command in cli.commands.items():
        assert f"privfs {name}" in text
        for parameter in command.params:
            if not getattr(parameter, "hidden", False):
                for option in parameter.opts:
                    assert not option.startswith("--") or option in text, (name, option)


def test_help_is_printed_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert call([]) == Exit.USAGE
    assert "Usage: privfs" in capsys.readouterr().err
    assert call(["--help"]) == Exit.OK
    assert "Usage: privfs" in capsys.readouterr().out


def test_the_shell_gets_completions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_PRIVFS_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "privfs st")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert call([]) == Exit.OK
    assert capsys.readouterr().out.split() == ["plain,stat", "plain,status"]


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"]) == Exit.OK
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["privfs", "python", "pyfuse3", "libfuse", "trio", "unicorn", "kernel"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["mout", "/m"], 2, "mout"),
        (["map"], 2, "privfs map --help"),
        (["--bogus"], 2, "--bogus"),
        (["run", "-o"], 125, "--help"),
        (["umount", "/"], 5, "no privfs is mounted there; see: privfs status"),
        *(
            (
                [command, "/"],
                5,
                "privfs: / does not lie in a privfs mount: no .privfs/control above"
                " it; privfs status shows the mounts, privfs mount DIR makes one",
            )
            for command in ("map", "stat", "seal", "status", "events", "compact")
        ),
        (["status", "/none"], 5, "privfs: /none does not exist; privfs status shows the mounts"),
        *(
            (
                [command, "/none"],
                1,
                "privfs: /none: No such file or directory; name a file in one "
                "of the mounts that privfs status shows",
            )
            for command in ("map", "stat", "seal", "compact")
        ),
        (["compact", "--range", "x", "f"], 2, "left out. See: privfs compact --help"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert call(arguments) == code
    said = capsys.readouterr().err
    assert said.startswith("privfs: ")
    assert said.count("\n") == 1
    assert words in said


def test_a_mistake_of_ours_is_one_line_and_a_traceback_only_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(show, "whole_map", broken)
    assert call(["map", "f"]) == Exit.FAILED
    said = capsys.readouterr().err
    assert said.startswith("privfs: internal error: ZeroDivisionError: a mistake")
    assert said.count("\n") == 1
    assert call(["map", "--debug", "f"]) == Exit.FAILED
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "whole_map", interrupted)
    assert call(["map", "f"]) == 130
    assert capsys.readouterr().err.strip() == ""


def test_a_call_leaves_no_log_handler() -> None:
    before = logging.getLogger().handlers[:]
    call(["umount", "/"])
    assert logging.getLogger().handlers == before


def test_the_program_exits_with_the_code() -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["umount", "/"])
    assert caught.value.code == 5


@pytest.mark.parametrize(
    ("arguments", "helper"),
    [
        (["memory", "/m", "-o", "rw,dev,suid"], True),
        (["memory", "/m", "-orw"], True),
        (["memory", "/m"], False),
        (["mount", "/m", "-o", "size=1G"], False),
        (["mout", "/m"], False),
        (["--daemon", "/m", "-o", "rw"], False),
    ],
)
def test_the_call_of_mount_fuse3_is_told_from_a_mistyped_command(
    arguments: list[str], helper: bool
) -> None:
    assert is_helper_call(arguments, list(cli.commands)) is helper


@pytest.mark.logs("accept returned EMFILE")
@pytest.mark.parametrize("debug", [False, True])
def test_a_full_table_of_descriptors_is_a_line_in_the_log_and_no_traceback(
    tmp_path: Path, debug: bool
) -> None:
    """As trio tells of it, ten times a second, each time with a traceback."""
    verbosity, log = Verbosity(debug=debug), tmp_path / "log"
    before = logging.getLogger().level
    verbosity.log_to(str(log))
    try:
        trio = logging.getLogger("trio.serve_listeners")
        trio.handle(
            logging.LogRecord(
                trio.name, logging.ERROR, "", 0, "accept returned %s", ("EMFILE",),
                (OSError, OSError(24, "Too many open files"), None),
            )
        )  # fmt: skip
    finally:
        verbosity.close()
        logging.getLogger().setLevel(before)
    assert ("Too many open files" in log.read_text()) is debug
    assert "accept returned EMFILE" in log.read_text()
    assert not trio.filters
