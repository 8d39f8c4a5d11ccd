# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmsim map``: what the tables of running VMs say of their pages, with the odd ones marked."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any, Final

import click

from kvmsim import control
from kvmsim.cli import tables
from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.failure import Failure
from kvmsim.cli.verbosity import Verbosity, verbose_options
from kvmsim.kind import ADDRESS_BITS
from kvmsim.scriptvalues import ScriptError, parse_size
from kvmsim.uapi import PAGE_SIZE
from kvmsim.views.odd import is_wrong
from kvmsim.views.picture import picture

TABLES: Final = ("all", "attributes", "stage2", "sept", "pamt", "rmp", "pkvm")
_END: Final = 1 << ADDRESS_BITS


class _Range(click.ParamType[tuple[int, int]]):
    name = "range"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "GPA[:SIZE]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        first, colon, size = value.partition(":")
        try:
            start = parse_size(first)
            end = start + parse_size(size) if size else _END if colon else start + PAGE_SIZE
        except ScriptError as error:
            self.fail(f"{error}", param, ctx)
        if start % PAGE_SIZE or end % PAGE_SIZE or not start < end <= _END:
            self.fail(f"{value!r}: whole pages below {_END:#x}, as 1G:64M, or 1G: to the end",
                      param, ctx)  # fmt: skip
        return start, end


@click.command("map", short_help="Show what the tables of running VMs say of their pages.")
@click.argument("which", metavar="[PID|NAME]", required=False)
@click.option("--table", type=click.Choice(TABLES), default="all", show_default=True,
              help="One table alone: rmp and pamt by host-physical address.")  # fmt: skip
@click.option("--gpa", "gpas", type=_Range(), default=(0, _END), show_default="all",
              help="Only these guest-physical addresses, such as 1G:64M.")  # fmt: skip
@click.option("--odd", is_flag=True, help="Only what is marked.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
@click.option("--png", "png", metavar="FILE", type=click.Path(dir_okay=False),
              help="Draw one VM, a dot for a page; - is standard output.")  # fmt: skip
@verbose_options
def show_map(
    which: str | None,
    table: str,
    gpas: tuple[int, int],
    odd: bool,
    as_json: bool,
    png: str | None,
    verbosity: Verbosity,
) -> None:
    """Show what RMP, PAMT, S-EPT, second stage and attributes say of VMs of yours.

    Neighbours that are alike are one line. ODD names what is remarkable: memory that its guest has
    not accepted, entries of 4 KiB where one of 2 MiB could be; with ! what must never be seen.
    """
    verbosity.log_to_stderr()
    if png and (table != "all" or as_json or odd):
        raise click.UsageError("--png draws --table all alone.", click.get_current_context())
    found, silent = _asked(which, table, gpas)
    if odd:
        for vm in found:
            vm["rows"] = [row for row in vm["rows"] if row["odd"]] if _marked(table) else []
    if png:
        _draw(found, png, gpas)
    elif as_json:
        click.echo(json.dumps(found, indent=2))
    elif not found and not silent:
        click.echo("no VM is up; boot one with: kvmsim boot --memory FILE")
    else:
        click.echo("\n\n".join("\n".join(map_lines(vm)) for vm in found))
    if silent:
        raise Failure(Exit.FAILED, silent)


def _marked(table: str) -> bool:
    return table != "attributes"


def _asked(
    which: str | None, table: str, gpas: tuple[int, int]
) -> tuple[list[dict[str, Any]], str]:
    ask = partial(control.Process.map, vm=which, table=table, start=gpas[0], end=gpas[1])
    try:
        found, errors = control.everything(ask)
    except OSError as error:
        raise Failure(Exit.FAILED, error.strerror or str(error)) from error
    silent = "; ".join(error.strerror or str(error) for error in errors)
    if which is not None and not found:
        also = f"; {silent}" if silent else ""
        raise Failure(Exit.FAILED, f"no VM {which}: see kvmsim stat{also}")
    return found, "" if which is not None and found else silent


def _draw(found: list[dict[str, Any]], path: str, gpas: tuple[int, int]) -> None:
    if len(found) != 1:
        names = ", ".join(f"{vm['vm']}({vm['pid']})" for vm in found) or "none"
        raise Failure(Exit.FAILED, f"--png draws one VM: name it; there is {names}")
    rows = found[0]["rows"]
    if not rows:
        raise Failure(Exit.FAILED, "--png: the VM has no memory there")
    data = picture(found[0], max(gpas[0], rows[0]["start"]), min(gpas[1], rows[-1]["end"]))
    try:
        if path == "-":
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        with open(path, "wb") as file:
            file.write(data)
    except OSError as error:
        raise Failure(Exit.FAILED, f"--png {path}: {error.strerror}") from error
    click.echo(f"{os.fspath(path)}: {len(data)} bytes", err=True)


def map_lines(vm: dict[str, Any]) -> list[str]:
    """Return what was answered of one VM as lines."""
    rows = vm["rows"]
    what = f"{vm['technology']}, " if vm["technology"] else ""
    lines = [f"VM: {vm['vm']} (pid {vm['pid']}), {what}table {vm['table']}"]
    if rows:
        head = [name for name, _ in _columns(vm["table"])]
        body = [[cell(row) for _, cell in _columns(vm["table"])] for row in rows]
        lines += ["", *tables.columns(head, body, " >")]
    if vm["odd"]:
        sums = ", ".join(f"{tables.size(count)} {_name(name)}" for name, count in vm["odd"].items())
        lines += ["", f"Odd: {sums}"]
    elif not rows:
        lines += ["nothing to show"]
    return lines


def _columns(table: str) -> list[tuple[str, Any]]:
    frames = table in ("rmp", "pamt")
    found: list[tuple[str, Any]] = [("HPA" if frames else "GPA", _range), ("SIZE", _size)]
    match table:
        case "attributes":
            found += [("SLOT", lambda row: str(row["slot"])), ("TYPE", lambda row: row["type"])]
        case "stage2":
            found += [("SIDE", lambda row: row["side"]), ("HPA", _hpa), ("LEAF", _own_leaf)]
        case "sept" | "pkvm":
            found += [("ENTRY", _entry), ("HPA", _hpa)]
        case "rmp" | "pamt":
            found += [("STATE", _entry), ("GPA", _gpa)]
        case _:
            found += [
                ("SLOT", lambda row: str(row["slot"])), ("TYPE", lambda row: row["type"]),
                ("PAGE", lambda row: "yes" if row["page"] else "-"), ("ENTRY", _entry),
                ("STAGE-2", lambda row: _leaf(row["leaf"])),
                ("SHARED", lambda row: _leaf(row["shared"])),
            ]  # fmt: skip
    if _marked(table):
        found.append(("ODD", lambda row: ", ".join(map(_name, row["odd"]))))
    return found


def _range(row: dict[str, Any]) -> str:
    return f"{row['start']:#014x}-{row['end'] - 1:#014x}"


def _size(row: dict[str, Any]) -> str:
    return tables.size(row["end"] - row["start"])


def _hpa(row: dict[str, Any]) -> str:
    return f"{row['hpa']:#014x}" if "hpa" in row else "-"


def _gpa(row: dict[str, Any]) -> str:
    return "-" if row["gpa"] is None else f"{row['gpa']:#014x}"


def _entry(row: dict[str, Any]) -> str:
    return "-" if row["state"] is None else f"{row['state']} {tables.size(row['entry_size'])}"


def _leaf(leaf: dict[str, Any] | None) -> str:
    return "-" if leaf is None else f"{leaf['rights']} {tables.size(leaf['size'])}"


def _own_leaf(row: dict[str, Any]) -> str:
    return _leaf(row)


def _name(name: str) -> str:
    return f"! {name}" if is_wrong(name) else name
