# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmsim stat``: what running VMs are, and what their memory holds on both sides."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import click

from kvmsim import control
from kvmsim.cli import tables
from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.failure import Failure
from kvmsim.cli.verbosity import Verbosity, verbose_options
from kvmsim.script import SIDES

_UNKNOWN = "?"
_BOOT = "boot one with: kvmsim boot --memory FILE"


@click.command(short_help="Show running VMs and their memory.")
@click.argument("which", metavar="[PID|NAME]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
@click.option("--bytes", "in_bytes", is_flag=True, help="Print sizes in bytes.")
@verbose_options
def stat(which: str | None, as_json: bool, in_bytes: bool, verbosity: Verbosity) -> None:
    """Show the VMs of your kvmsim processes, or those of one process or of one name.

    PRIVATE and SHARED are the memory held on each side, BOTH what is held for the same pages on
    both, STALE what no access reaches, since it lies on the side that the page's attribute does
    not name.
    """
    verbosity.log_to_stderr()
    found, silent = _found(which)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif not found and not silent:
        click.echo(f"no VM is up; {_BOOT}")
    else:
        blocks = ["\n".join(stat_lines(vm, in_bytes=in_bytes)) for vm in found]
        click.echo("\n\n".join(blocks))
    if silent:
        raise Failure(Exit.FAILED, silent)


def _found(which: str | None) -> tuple[list[dict[str, Any]], str]:
    """Return the reports that are wanted, and why there may be more of them."""
    try:
        found, errors = control.everything()
    except OSError as error:
        raise Failure(Exit.FAILED, error.strerror or str(error)) from error
    silent = "; ".join(error.strerror or str(error) for error in errors)
    if which is None:
        return found, silent
    wanted = [vm for vm in found if which in (vm["vm"], str(vm["pid"]))]
    if not wanted:
        names = ", ".join(f"{vm['vm']}({vm['pid']})" for vm in found)
        also = f"; {silent}" if silent else ""
        following = f"name one of yours: {names}" if names else "none of yours is up, " + _BOOT
        raise Failure(Exit.FAILED, f"no VM {which}; {following}{also}")
    return wanted, ""


def stat_lines(vm: dict[str, Any], *, in_bytes: bool) -> list[str]:
    """Return what one VM is and holds as lines."""
    size: Callable[[int], str] = str if in_bytes else tables.size
    types, counters = vm["attributes"], vm["counters"]
    states = ", ".join(f"{vcpu['vcpu']} {vcpu['state']}" for vcpu in vm["vcpus"])
    rows = {
        "VM": f"{vm['vm']} (pid {vm['pid']}), {vm['state']}",
        **_hardware(vm),
        "vCPUs": states,
        "Fence": vm["fence"],
        "Attributes": f"{size(types['private'])} private, {size(types['shared'])} shared",
        "Held": ", ".join(
            f"{_held(vm, side, size)} {'on ' if side == 'both' else ''}{side}" for side in SIDES
        ),
        "Conversions": _conversions(vm, size),
        "Faults": f"{counters['vm']['faults']}, {counters['vm']['exits']} exits, "
        f"{counters['vm']['retries']} retries, {counters['runner']['pages_asked']} pages asked",
        "Zaps": f"{counters['vm']['invalidations']}, {counters['vm']['zapped_leaves']} leaves, "
        f"{counters['runner']['shootdowns']} shootdowns, {counters['runner']['flushes']} flushes",
    }
    if vm["error"]:
        rows["Unknown"] = vm["error"]
    slots = [
        [
            str(slot["slot"]),
            f"{slot['gpa']:#014x}-{slot['gpa'] + slot['size'] - 1:#014x}",
            size(slot["size"]),
            *(_held(slot, side, size) for side in SIDES),
            f"{slot['file']}+{slot['offset']:#x}" if slot["file"] else "-",
        ]
        for slot in vm["slots"]
    ]
    head = ["SLOT", "GPA", "SIZE", *(side.upper() for side in SIDES), "FILE"]
    return [
        *(f"{name + ':':<12} {value}" for name, value in rows.items()),
        "",
        *tables.columns(head, slots, "> >>>>> "),
    ]


def _hardware(vm: dict[str, Any]) -> dict[str, str]:
    """What kind it is, and what its confidential hardware says of it, a line for each table."""
    rows = {"Kind": vm["kind"]}
    for name, value in (vm.get("hardware") or {}).items():
        if name == "technology":
            rows["Kind"] += f" ({value})"
        elif isinstance(value, dict):
            rows[name] = ", ".join(f"{of} {count}" for of, count in value.items()) or "none"
        elif isinstance(value, list):
            rows[name] = _repeated(value)
        else:
            rows[name] = str(value)
    return rows


def _repeated(values: list[Any]) -> str:
    """A list in a line, equal neighbours counted."""
    runs = [(str(value), len(list(same))) for value, same in itertools.groupby(values)]
    return ", ".join(value if count == 1 else f"{count} × {value}" for value, count in runs)


def _conversions(vm: dict[str, Any], size: Callable[[int], str]) -> str:
    vmm = vm["counters"]["vmm"]
    if vmm is None:  # of a program under kvmsim exec
        return "the program's own"
    return (
        f"{vmm['conversions_explicit']} explicit, {vmm['conversions_implicit']} implicit, "
        f"{vmm['conversions_refused']} refused; {size(vmm['discarded_bytes'])} discarded "
        f"(discard={vm['discard']})"
    )


def _held(row: dict[str, Any], side: str, size: Callable[[int], str]) -> str:
    return _UNKNOWN if row["allocated"] is None else size(row["allocated"][side])
