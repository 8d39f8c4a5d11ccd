# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmsim attack``: what a host may try against its guests, tried."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Final

import click

from kvmsim.attack.catalog import ATTACKS, Attack
from kvmsim.attack.outcome import KINDS
from kvmsim.attack.report import Tried, tried
from kvmsim.cli import tables
from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.failure import Failure, explained
from kvmsim.cli.verbosity import Verbosity, verbose_options
from kvmsim.emulator import prepare_process
from kvmsim.exec.memory import NoMount
from kvmsim.images import read_kernel

_ALL: Final = "all"


@click.group(short_help="Attack guests as their host.", no_args_is_help=False)
def attack() -> None:
    """Try what a host may try against a guest, and say where it stopped.

    The attacker is the host: its programs, its VMM, its kernel. docs/attacks.md has the table of
    attacks and kinds, and what each ends in.
    """


@attack.command("list", short_help="List the attacks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def show(as_json: bool) -> None:
    """List the attacks by name."""
    if as_json:
        rows = [{"attack": one.name, "group": one.group, "what": one.what}
                for one in ATTACKS.values()]  # fmt: skip
        click.echo(json.dumps({"kinds": KINDS, "attacks": rows}, indent=2))
        return
    listed = [[one.name, one.group, one.what] for one in ATTACKS.values()]
    click.echo("\n".join(tables.columns(["ATTACK", "BY", "WHAT"], listed)))


@attack.command(short_help="Try attacks.")
@click.argument("names", metavar="NAME…|all", nargs=-1, required=True)
@click.option(
    "--kind", "kinds", type=click.Choice(KINDS), multiple=True,
    help="Kind of VM to attack; may be repeated (all).",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each attack.")
@click.option("--kernel", metavar="ELF", type=click.Path(), help="Guest kernel.")
@verbose_options
def run(
    names: tuple[str, ...],
    kinds: tuple[str, ...],
    as_json: bool,
    kernel: str | None,
    verbosity: Verbosity,
) -> int:
    """Try attacks, each against every kind of VM, on mounts of their own.

    Exits with 0 if all end as docs/attacks.md says, with 1 if one does not or cannot be tried.
    """
    verbosity.log_to_stderr()
    attacks = _named(names)
    with explained():
        image = read_kernel(kernel)
    prepare_process()
    failed = count = 0
    try:
        for one in tried(attacks, kinds or KINDS, image):
            count += 1
            failed += not one.as_expected
            click.echo(json.dumps(one.plain()) if as_json else _line(one))
            sys.stdout.flush()
    except NoMount as error:
        raise Failure(Exit.MEMORY, str(error)) from error
    if failed:
        raise Failure(Exit.FAILED, f"{failed} of {count} attacks did not end as expected")
    if not as_json:
        click.echo(f"{count} attacks, all as expected")
    return Exit.OK


def _named(names: Sequence[str]) -> list[Attack]:
    if _ALL in names:
        return list(ATTACKS.values())
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        raise click.UsageError(
            f"no attack {', '.join(unknown)}; kvmsim attack list shows them",
            click.get_current_context(),
        )
    return [ATTACKS[name] for name in dict.fromkeys(names)]


def _line(one: Tried) -> str:
    line = f"{one.kind:<13}{one.name:<15} {one.outcome or one.error}"
    return line if one.as_expected else f"{line} (expected: {one.row.outcome})"
