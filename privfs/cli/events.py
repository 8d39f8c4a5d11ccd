# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs events``: what happens on a mount, as it happens."""

from __future__ import annotations

import contextlib
import errno
import json
import time
from typing import Any

import click

from privfs.cli.failure import no_answer
from privfs.cli.verbosity import Verbosity, verbose_options


def event_line(event: dict[str, Any]) -> str:
    """Return an event as a line for people: time, what, then name=value."""
    shown = dict(event)
    stamp = shown.pop("time", None)
    when = time.strftime("%H:%M:%S", time.localtime(stamp)) if stamp is not None else "-" * 8
    if stamp is not None:
        when += f"{stamp % 1:.6f}"[1:]
    what = shown.pop("event")
    if "start" in shown:
        start, end = shown.pop("start"), shown.pop("end")
        shown["range"] = f"{start:#x}-{end - 1:#x}" if end > start else "-"
    if "errno" in shown:
        code = shown.pop("errno")
        shown["result"] = errno.errorcode.get(code, code) if code else "ok"
    if not shown.get("why", "-"):
        del shown["why"]
    return f"{when} {what:<10} " + " ".join(f"{name}={value}" for name, value in shown.items())


@click.command("events", short_help="Show what happens on a mount, as it happens.")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line, for scripts.")
@click.option("--faults", is_flag=True, help="Show every grant of a page too.")
@verbose_options
def events(directory: str, as_json: bool, faults: bool, verbosity: Verbosity) -> None:
    """Show what happens between the mount that holds DIR and its users, until interrupted.

    Invalidations and their acknowledgements, what is freed and allocated, answers, users that come,
    break, are killed and go. What is left out for a slow reader is counted.
    """
    from privfs import control

    verbosity.log_to(None)
    try:
        with contextlib.suppress(BrokenPipeError):
            for event in control.events(directory, faults=faults):
                click.echo(json.dumps(event) if as_json else event_line(event))
    except control.ControlError as error:
        raise no_answer(error) from error
