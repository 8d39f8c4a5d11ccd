# SPDX-License-Identifier: GPL-2.0-or-later
"""The program ``privfs``: commands, and one line for whatever goes wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Final, NoReturn

import click

from privfs.cli.compact import compact
from privfs.cli.doctor import doctor
from privfs.cli.events import events
from privfs.cli.exitcodes import Exit
from privfs.cli.failure import Failure, usage
from privfs.cli.mount import helper, is_helper_call, mount, umount
from privfs.cli.run import run
from privfs.cli.seal import seal
from privfs.cli.show import map_, stat, status
from privfs.cli.verbosity import Verbosity
from privfs.doctor import versions

#: Set by the shell when it wants completions (click).
_COMPLETION: Final = "_PRIVFS_COMPLETE"


def _print_versions(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        for name, version in versions().items():
            click.echo(f"{name} {version}")
        ctx.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_versions,
    help="Show the versions that a report of a problem should name.",
)  # fmt: skip
def cli() -> None:
    """Guest-private memory that you can mount."""


for _command in (mount, run, umount, map_, stat, status, events, seal, compact, doctor):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit."""
    sys.exit(call(list(sys.argv[1:] if arguments is None else arguments)))


def call(arguments: list[str]) -> int:
    """Run one command; print what goes wrong as one line, return the exit code."""
    settings = Verbosity()
    command: click.Command = cli
    if is_helper_call(arguments, list(cli.commands)):
        command = helper
    try:
        if not arguments and _COMPLETION not in os.environ:
            click.echo(cli.get_help(click.Context(cli, info_name="privfs")), err=True)
            return Exit.USAGE
        status = command.main(
            arguments,
            prog_name="privfs",
            complete_var=_COMPLETION,
            obj=settings,
            standalone_mode=False,
        )
        return status if isinstance(status, int) else Exit.OK
    except BaseException as error:
        code, text = _explain(error)
        if arguments[:1] == [run.name] and not isinstance(error, SystemExit):
            code = max(code, Exit.RUN_FAILED)  # smaller ones are the command's, as with env(1)
        if text:
            with contextlib.suppress(OSError):
                click.echo(f"privfs: {text}", err=True)
        if settings.debug:
            traceback.print_exception(error)
        return code
    finally:
        settings.close()


def _explain(error: BaseException) -> tuple[int, str]:
    match error:
        case BaseExceptionGroup(exceptions=[only]):
            return _explain(only)
        case Failure(code=code):
            return code, str(error)
        case click.UsageError():
            return Exit.USAGE, str(usage(error))
        case click.ClickException():
            return Exit.USAGE, error.format_message()
        case SystemExit(code=int(code)):
            return code, ""
        case click.Abort() | KeyboardInterrupt():
            return Exit.SIGNAL + signal.SIGINT, ""
        case OSError(filename=str() | bytes() as name, strerror=str(text)):
            return Exit.FAILED, f"{os.fsdecode(name)}: {text}"
        case OSError():
            return Exit.FAILED, error.strerror or str(error)
    kind = type(error).__name__
    return Exit.FAILED, f"internal error: {kind}: {error}; run again with --debug and report it"
