# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs doctor``."""

from __future__ import annotations

import json

import click

from privfs import doctor as checks
from privfs.cli.exitcodes import Exit
from privfs.cli.failure import Failure
from privfs.cli.verbosity import Verbosity, verbose_options
from privfs.probes import Result


@click.command(short_help="Check what this machine can do, and how to mend it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
@verbose_options
def doctor(as_json: bool, verbosity: Verbosity) -> None:
    """Check what this machine can do; ends with 0 only if mounting will work."""
    verbosity.log_to(None)
    found = []
    for check in checks.run_all():
        found.append(check)
        if not as_json:
            click.echo(f"[{check.result.value}] {check.name}: {check.text}")
            if check.remedy:
                click.echo(f"       mend: {check.remedy}")
    failed = [check.name for check in found if check.result is Result.FAIL]
    if as_json:
        rows = [
            {"check": c.name, "result": c.result.value, "text": c.text, "remedy": c.remedy}
            for c in found
        ]
        click.echo(json.dumps({"ok": not failed, "checks": rows}, indent=2))
    if failed:
        raise Failure(Exit.REQUIREMENT, f"missing: {', '.join(failed)}")
