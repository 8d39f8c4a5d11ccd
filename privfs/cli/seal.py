# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs seal``: take rights on a private file away for good."""

from __future__ import annotations

import json

import click

from privfs.cli.show import asked
from privfs.cli.verbosity import Verbosity, verbose_options
from privfs.seals import Seal

_HELP = {
    Seal.SEAL: "No more seals.",
    Seal.SHRINK: "The file cannot become smaller.",
    Seal.GROW: "The file cannot become larger.",
    Seal.WRITE: "No stores by guests; nothing is punched or zeroed.",
    Seal.AUTO_ALLOCATE: "Memory only by fallocate: a guest's access to a hole becomes an exit.",
}


def _options(command: click.decorators.FC) -> click.decorators.FC:
    for seal in reversed(list(_HELP)):
        name = (seal.name or "").lower()
        flag = f"--{name.replace('_', '-')}"
        command = click.option(flag, name, is_flag=True, help=_HELP[seal])(command)
    return command


@click.command("seal", short_help="Take rights on private files away for good.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
@verbose_options
def seal(files: tuple[str, ...], as_json: bool, verbosity: Verbosity, **wanted: bool) -> None:
    """Add seals to each FILE, or show the seals it has when none is named.

    Seals cannot be taken off. They are those of memfds, and F_SEAL_AUTO_ALLOCATE of the v7 series.
    """
    verbosity.log_to(None)
    mask = sum(bit for bit in _HELP if wanted[(bit.name or "").lower()])
    found = {}
    for file in files:
        if mask:
            found[file] = asked(file, "seal", seals=mask)["seals"]
        else:
            found[file] = asked(file, "stat")["seals"]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for file, names in found.items():
            click.echo(f"{file}: {', '.join(names) or 'no seals'}")
