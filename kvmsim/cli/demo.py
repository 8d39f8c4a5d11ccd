# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmsim demo``: guests of one kind or of each, from launch to teardown, all claims checked."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NoReturn

import click

from kvmsim.cli.demos.kinds import SHOWN, Shown
from kvmsim.cli.demos.play import MEMORY_SIZE, Play
from kvmsim.cli.demos.stage import Differs, Json, Stage, Text
from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.failure import Failure, check_memory, explained
from kvmsim.cli.hosts import fence_option, make_host
from kvmsim.cli.verbosity import Verbosity, verbose_options
from kvmsim.images import find_kernel, read_kernel
from kvmsim.scriptvalues import Memory

_ALL: Final = "all"
_MEASURE: Final = Path(__file__).parents[2] / "scripts" / "measure"
#: Names the directory of the mount that `privfs run` has made.
_PRIVFS: Final = "PRIVFS"
_BUDGET: Final = "128M"


@click.command(short_help="Show a confidential guest from launch to teardown.")
@click.argument("name", type=click.Choice((*SHOWN, _ALL)))
@click.option("--memory", metavar="FILE", type=click.Path(),
              help="Private file, whose first 32 MiB the guest uses; else a mount is made and "
              "removed again.")  # fmt: skip
@click.option("--eager", is_flag=True, help="The guest accepts all its memory at boot.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
@click.option("-q", "--quiet", is_flag=True, help="Say only what does not hold.")
@click.option("--mounted", is_flag=True, hidden=True)
@fence_option
@verbose_options
def demo(
    name: str,
    memory: str | None,
    eager: bool,
    as_json: bool,
    quiet: bool,
    mounted: bool,
    fence: str,
    verbosity: Verbosity,
) -> int:
    """Show what a guest of kind NAME is: measured launch, acceptance, conversion, bounce buffers,
    a report that is checked, memory that is taken away, and a teardown that leaves nothing.

    Ends with 0 only if all that is claimed holds. Models of the rules: nothing here is encrypted
    by hardware, and nothing is secret from root.
    """
    if memory is None and not mounted:
        _in_a_mount()
    verbosity.log_to_stderr()
    with explained():
        read_kernel()
    if not _MEASURE.is_file():
        raise Failure(Exit.IMAGE, f"no {_MEASURE}: run this in a checkout of the project")
    stage: Stage = Text(click.echo, quiet=quiet)
    if as_json:
        stage = Json(lambda line: click.echo(line, nl=False))
    failed = []
    for shown in SHOWN.values() if name == _ALL else (SHOWN[name],):
        if why := _one(stage, shown, memory, fence, eager=eager):
            failed.append(f"{shown.kind}: {why}")
    if failed:
        raise Failure(Exit.FAILED, "; ".join(failed))
    return Exit.OK


def _in_a_mount() -> NoReturn:
    """Become ``privfs run`` of the same command: it makes the mount, and leaves none behind."""
    sys.stdout.flush()
    python = [sys.executable, "-P", "-m"]
    os.execv(sys.executable, [
        *python, "privfs", "run", "-o", f"size={_BUDGET}", "--",
        *python, "kvmsim", *sys.argv[1:], "--mounted",
    ])  # fmt: skip


def _one(stage: Stage, shown: Shown, memory: str | None, fence: str, *, eager: bool) -> str:
    """Run one; why it failed, "" if all held."""
    stage.begin(shown.kind, shown.about)
    began, why = time.monotonic(), ""
    path = memory or os.path.join(os.environ[_PRIVFS], f"ram-{shown.kind}")
    if memory is None:
        with open(path, "xb") as file:
            os.truncate(file.fileno(), MEMORY_SIZE)
    try:
        check_memory(Memory(path, 0, MEMORY_SIZE), "tdx")
        host = make_host(fence)
        try:
            with explained(), tempfile.TemporaryDirectory(prefix="kvmsim-demo.") as folder:
                Play(
                    stage, shown, path, folder,
                    kernel=find_kernel(), measure=_MEASURE, eager=eager,
                ).run(host)  # fmt: skip
        finally:
            host.close()
    except (Differs, Failure) as error:
        why = str(error)
    finally:
        if memory is None:
            os.unlink(path)
    stage.end(shown.kind, time.monotonic() - began, why)
    return why
