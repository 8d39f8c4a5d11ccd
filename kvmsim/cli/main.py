# SPDX-License-Identifier: GPL-2.0-or-later
"""The program ``kvmsim``: commands, and one line for whatever goes wrong."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Final, NoReturn

import click

from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.failure import Failure, usage
from kvmsim.cli.lazy import LazyGroup
from kvmsim.cli.verbosity import Verbosity
from privfs.leaving import unwind_on

_COMMANDS: Final = {
    "attack": "kvmsim.cli.attack:attack",
    "boot": "kvmsim.cli.boot:boot",
    "demo": "kvmsim.cli.demo:demo",
    "exec": "kvmsim.cli.execute:execute",
    "map": "kvmsim.cli.map:show_map",
    "run": "kvmsim.cli.run:run",
    "stat": "kvmsim.cli.stat:stat",
}
_PACKAGES: Final = {"kvmsim": "privfs", "unicorn": "unicorn", "numpy": "numpy"}


def versions() -> dict[str, str]:
    """Return the versions that a report of a problem should name."""
    from importlib import metadata  # takes a tenth of a second

    found = {}
    for name, package in _PACKAGES.items():
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found | {"python": platform.python_version(), "kernel": platform.release()}


def _print_versions(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        for name, version in versions().items():
            click.echo(f"{name} {version}")
        ctx.exit()


@click.group(
    cls=LazyGroup, sources=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_versions,
    help="Show the versions that a report of a problem should name.",
)  # fmt: skip
def cli() -> None:
    """Virtual machines on guest-private memory, emulated."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit."""
    _open_standard_streams()
    unwind_on(signal.SIGTERM, signal.SIGHUP)  # so that VMs end and nothing is left behind
    sys.exit(call(list(sys.argv[1:] if arguments is None else arguments)))


def _open_standard_streams() -> None:
    """Let nothing of ours get the number of a standard stream that was closed."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which is fd


def call(arguments: list[str]) -> int:
    """Run one command; print what goes wrong as one line, return the exit code."""
    settings = Verbosity()
    try:
        if not arguments:
            click.echo(cli.get_help(click.Context(cli, info_name="kvmsim")), err=True)
            return Exit.USAGE
        status = cli.main(arguments, prog_name="kvmsim", obj=settings, standalone_mode=False)
        return status if isinstance(status, int) else Exit.OK
    except BaseException as error:
        code, text = _explain(error)
        if text:
            with contextlib.suppress(OSError):
                click.echo(f"kvmsim: {text}", err=True)
        if settings.debug:
            traceback.print_exception(error)
        return code


def _explain(error: BaseException) -> tuple[int, str]:
    match error:
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
            return Exit.INTERNAL, f"{os.fsdecode(name)}: {text}; see: privfs status"
    kind = type(error).__name__
    return Exit.INTERNAL, f"internal error: {kind}: {error}; run again with --debug and report it"
