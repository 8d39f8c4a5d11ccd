# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs compact``: move the memory of a private file into new extents."""

from __future__ import annotations

import json
import sys
from typing import Any, Final

import click

from privfs.cli import tables
from privfs.cli.failure import no_answer
from privfs.cli.options import parse_size
from privfs.cli.verbosity import Verbosity, verbose_options
from privfs.personality import MAX_BYTES, PAGE_SIZE

_ERASE: Final = "\r\x1b[K"


class _Range(click.ParamType[tuple[int, int]]):
    """``OFFSET:LENGTH`` in bytes, both with K, M, G or T; pages ``(start, end)``."""

    name = "OFF:LEN"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        offset, colon, length = value.partition(":")
        try:
            first = 0 if offset in ("", "0") else parse_size(offset)
            size = parse_size(length) if length else MAX_BYTES - first
        except ValueError:
            size = 0
        if not colon or size <= 0 or first + size > MAX_BYTES:
            self.fail(f"{value!r}: write OFFSET:LENGTH in bytes, as 0:64M; either may be left out")
        return first // PAGE_SIZE, (first + size) // PAGE_SIZE


class _Shown:
    """How far it is: one line of a terminal that is written over."""

    def __init__(self, file: str, *, quiet: bool) -> None:
        self._file = file
        self._on_terminal = not quiet and sys.stderr.isatty()
        self._shown = False

    def told(self, progress: dict[str, Any]) -> None:
        """Show it."""
        if self._on_terminal and progress["total"]:
            self._shown = True
            share = 100 * min(progress["bytes"], progress["total"]) // progress["total"]
            text = f"{self._file}: moving {share:3}% of {tables.size(progress['total'])}"
            click.echo(f"{_ERASE}privfs: {text}", nl=False, err=True)

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            click.echo(_ERASE, nl=False, err=True)


def compact_line(file: str, found: dict[str, Any]) -> str:
    """Return what was moved, in words."""
    text = f"{tables.size(found['bytes'])} in {found['moved']} extents moved"
    if found["ended"]:
        text += f", {found['ended']} empty ones ended"
    text += f", in {tables.microseconds(found['seconds'] * 1e6)}"
    if found["bytes"] and found["seconds"]:
        text += f" ({tables.size(int(found['bytes'] / found['seconds']))}/s)"
    return f"{file}: {text}"


@click.command("compact", short_help="Move the memory of a file into new extents.")
@click.argument("file", metavar="FILE", type=click.Path())
@click.option(
    "--range", "pages", type=_Range(), default=(0, MAX_BYTES // PAGE_SIZE),
    help="Only the extents that lie in these bytes or reach into them, as 4G:1G.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@verbose_options
def compact(
    file: str, pages: tuple[int, int], as_json: bool, quiet: bool, verbosity: Verbosity
) -> None:
    """Move the memory of FILE into new extents, while its users run.

    Each extent is taken from its users, copied, and given back to the system; they get the new one
    at their next access. What was kept or touched of the old one by somebody who should not is
    freed with it, empty extents end. While an extent moves the mount needs room for it twice.
    A file whose users were promised that nothing moves (UNMOVABLE) is refused; so is secretmem.
    Interrupted or failed, the extent under way stays where it is.
    """
    from privfs import control

    verbosity.log_to(None)
    shown = _Shown(file, quiet=quiet or as_json)
    try:
        found = control.compact(file, *pages, shown.told)
    except OSError as error:
        raise no_answer(error) from error
    finally:
        shown.clear()
    if as_json:
        click.echo(json.dumps({"file": file} | found, indent=2))
    else:
        click.echo(compact_line(file, found))
