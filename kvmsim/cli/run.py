# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmsim run``: a session with VMs and host commands, from a script."""

from __future__ import annotations

import re
from pathlib import Path

import click

from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.failure import Failure
from kvmsim.cli.hosts import fence_option
from kvmsim.cli.session import play
from kvmsim.cli.verbosity import Verbosity, verbose_options
from kvmsim.script import GRAMMAR, parse
from kvmsim.scriptvalues import ScriptError

_VARIABLE = re.compile(r"([A-Za-z_]\w*)=(.*)", re.ASCII | re.DOTALL)
_FORMS = "Statements, one a line, # begins a comment:\n\n\b\n" + "\n".join(
    f"  {form.form}\n      {form.help}" for form in GRAMMAR.values()
)


@click.command(short_help="Run a session script.", epilog=_FORMS)
@click.argument("script", metavar="SCRIPT", type=click.Path())
@click.option("--var", "pairs", metavar="NAME=VALUE", multiple=True, help="Sets $NAME.")
@fence_option
@click.option("-q", "--quiet", is_flag=True, help="Say only what does not hold.")
@verbose_options
def run(script: str, pairs: tuple[str, ...], fence: str, quiet: bool, verbosity: Verbosity) -> None:
    """Run SCRIPT: boot VMs, type and expect on their consoles, run host commands.

    Ends with 0 only if all that the script claims holds.
    """
    verbosity.log_to_stderr()
    variables = {}
    for pair in pairs:
        found = _VARIABLE.fullmatch(pair)
        if found is None:
            raise Failure(Exit.USAGE, f"--var {pair}: write NAME=VALUE")
        variables[found[1]] = found[2]
    try:
        text = Path(script).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is no text"
        raise Failure(
            Exit.USAGE, f"{script}: {why}; name a script, see: kvmsim run --help"
        ) from error
    try:
        statements = parse(text, variables)
    except ScriptError as error:
        raise Failure(Exit.USAGE, f"{script}:{error}") from error
    play(script, statements, variables, click.echo, fence)
    if not quiet:
        click.echo(f"kvmsim: {script}: {len(statements)} statements held", err=True)
