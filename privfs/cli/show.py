# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs map``, ``privfs stat`` and ``privfs status``: what a mount says of itself.

The JSON of each holds bytes and plain names; tables are for people and may change.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import click

from privfs.cli import tables
from privfs.cli.exitcodes import Exit
from privfs.cli.failure import Failure, no_answer
from privfs.cli.verbosity import Verbosity, verbose_options

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
#: The last incidents that the table of a mount shows; --json has all that are kept.
_INCIDENTS = 5
_bytes = click.option("--bytes", "in_bytes", is_flag=True, help="Print sizes in bytes.")


def asked(path: str, question: str, **arguments: Any) -> dict[str, Any]:
    """Ask the mount about the private file ``path``; raises Failure."""
    from privfs import control

    try:
        return control.ask_file(path, question, **arguments)
    except OSError as error:
        if isinstance(error, control.ControlError) and not str(error.strerror).startswith(path):
            error.strerror = f"{path}: {error.strerror}"
        raise no_answer(error) from error


def _sizes(in_bytes: bool) -> Callable[[int], str]:
    return str if in_bytes else tables.size


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


# --- map ---------------------------------------------------------------------------------------


def whole_map(path: str) -> dict[str, Any]:
    """Return the map of a file with its totals: bytes of each state."""
    rows: list[dict[str, Any]] = []
    start: int | None = 0
    size = 0
    while start is not None:
        part = asked(path, "map", start=start)
        size, start = part["size"], part["next"]
        for row in part["rows"]:
            last = rows[-1] if rows else None
            if last and (last["state"], last["users"]) == (row["state"], row["users"]):
                last["end"] = row["end"]
            else:
                rows.append(row)
    totals: Counter[str] = Counter({"hole": 0, "allocated": 0, "mapped": 0})
    for row in rows:
        row["size"] = row["end"] - row["start"]
        totals[row["state"]] += row["size"]
    totals["allocated"] += totals["mapped"]  # what users have mapped is allocated too
    return {"file": path, "size": size, "rows": rows, "totals": dict(totals)}


def map_lines(found: dict[str, Any], *, in_bytes: bool) -> list[str]:
    """Return a map as lsmem(1) shows memory: ranges with their last byte, totals below."""
    size = _sizes(in_bytes)
    lines = tables.columns(
        ["RANGE", "SIZE", "STATE", "USERS"],
        [
            [
                f"{row['start']:#018x}-{row['end'] - 1:#018x}",
                size(row["size"]),
                row["state"],
                ", ".join(row["users"]) or "-",
            ]
            for row in found["rows"]
        ],
        " >",
    )
    totals = found["totals"]
    summary = {
        "File size": found["size"],
        "Allocated": totals["allocated"],
        "Mapped by users": totals["mapped"],
        "Holes": totals["hole"],
    }
    width = max(map(len, summary)) + 1
    values = [size(value) for value in summary.values()]
    right = max(map(len, values))
    return [
        *lines, "",
        *(f"{name + ':':<{width}} {value:>{right}}"
          for name, value in zip(summary, values, strict=True)),
    ]  # fmt: skip


@click.command("map", short_help="Show which pages of a file hold memory, and for whom.")
@click.argument("file", metavar="FILE", type=click.Path())
@_json
@_bytes
@verbose_options
def map_(file: str, as_json: bool, in_bytes: bool, verbosity: Verbosity) -> None:
    """Show which pages of FILE hold memory, and who uses them.

    States: hole (no memory), allocated (memory that nobody has mapped), mapped (granted to USERS).
    RANGE shows the last byte; "end" in the JSON is the byte after it.
    """
    verbosity.log_to(None)
    found = whole_map(file)
    if as_json:
        _print_json(found)
    else:
        click.echo("\n".join(map_lines(found, in_bytes=in_bytes)))


# --- stat --------------------------------------------------------------------------------------


def backing_text(backing: dict[str, Any]) -> str:
    """Return the kind of memory in words: ``shmem, pages of 4K``."""
    return f"{backing['store']}, pages of {tables.size(backing['page_size'])}"


def _unpromised(backing: dict[str, Any]) -> dict[str, str]:
    """Return the row that says what this kind of memory does not promise, if anything."""
    from privfs.backing.store import Promise

    broken = [p.value for p in Promise if not backing["promises"][p.name.lower()]]
    return {"Beware": "; ".join(broken)} if broken else {}


def stat_lines(found: dict[str, Any], *, in_bytes: bool) -> list[str]:
    """Return the counts of one file as lines."""
    size = _sizes(in_bytes)
    operations = [
        f"{o['step']} {o['start']:#x}-{o['end'] - 1:#x}" if o["end"] > o["start"] else o["step"]
        for o in found["operations"]
    ]
    rows = {
        "File": found["file"],
        "Inode": found["inode"],
        "Personality": found["personality"],
        "Backing": backing_text(found["backing"]),
        **_unpromised(found["backing"]),
        "Size": size(found["size"]),
        "Allocated": size(found["allocated"]),
        "Mapped": size(found["mapped"]),
        "Held": f"{size(found['held'])} in {found['extents']} extents",
        "Users": ", ".join(_users(found, size)) or "-",
        **({"Shared": "not in this file; of a kvmsim: kvmsim stat"} if found["users"] else {}),
        "Seals": ", ".join(found["seals"]) or "-",
        "Promised": ", ".join(found["purpose"]),
        "Operations": ", ".join(operations) or "-",
    }
    return [f"{name + ':':<12} {value}" for name, value in rows.items()]


def _users(found: dict[str, Any], size: Callable[[int], str]) -> Iterator[str]:
    """Yield each user with what it has mapped, and the one that has the file for itself."""
    alone = found.get("exclusive")  # one that was mounted before we were installed tells nothing
    for user in found["mapped_by"]:
        yield f"{user['user']} {size(user['mapped'])}" + " exclusive" * (user["user"] == alone)
    if alone is not None and alone not in found["users"]:
        yield f"{alone} exclusive, not registered"


@click.command()
@click.argument("files", metavar="FILE...", type=click.Path(), nargs=-1, required=True)
@_json
@_bytes
@verbose_options
def stat(files: tuple[str, ...], as_json: bool, in_bytes: bool, verbosity: Verbosity) -> None:
    """Show the counts of each FILE.

    Held is the memory that really backs the file; it equals Allocated, or something is wrong.
    Users are shown with what they have mapped of it, and one that has the file exclusively as that.
    A guest's memory has a shared side as well, which its VMM holds.
    """
    verbosity.log_to(None)
    found = [{"file": file} | asked(file, "stat") for file in files]
    if as_json:
        _print_json(found)
    else:
        blocks = ["\n".join(stat_lines(file, in_bytes=in_bytes)) for file in found]
        click.echo("\n\n".join(blocks))


# --- status ------------------------------------------------------------------------------------


def mount_status(directory: str) -> dict[str, Any]:
    """Return what the mount that holds ``directory`` says of itself; raises Failure."""
    from privfs import control

    try:
        return control.ask(directory, "status")
    except OSError as error:
        raise no_answer(error) from error


def all_status() -> list[dict[str, Any]]:
    """Return the status of every privfs mount that we see; one with ``error`` if it is dead."""
    from privfs.fuse import ground

    found = []
    for mount in ground.mounts():
        if mount.type == ground.TYPE:
            try:
                found.append(mount_status(mount.place))
            except Failure as failure:
                found.append({"mountpoint": mount.place, "error": str(failure)})
    return found


def status_lines(found: dict[str, Any], *, in_bytes: bool) -> list[str]:
    """Return the status of one mount as lines."""
    if "error" in found:
        return [found["error"]]
    try:
        return _status_lines(found, in_bytes=in_bytes)
    except KeyError as missing:  # it was mounted before we were installed
        where = f"{found['mountpoint']} (pid {found['pid']})"
        return [f"{where}: served by another version of privfs, which does not tell {missing}; "
                "--json shows what it does tell"]  # fmt: skip


def _status_lines(found: dict[str, Any], *, in_bytes: bool) -> list[str]:
    size = _sizes(in_bytes)
    memory, waits = found["memory"], found["invalidations"]
    mode = found["mode"]
    if found["passthrough_errno"]:
        mode += f" (passthrough: {os.strerror(found['passthrough_errno'])})"
    rows = {
        "Mount": f"{found['mountpoint']} (pid {found['pid']})",
        "Personality": found["personality"],
        "Backing": backing_text(found["backing"]),
        **_unpromised(found["backing"]),
        "Refusal": mode,
        "Memory": f"{size(memory['total'])} budget, {size(memory['used'])} used, "
        f"{size(memory['free'])} free; the machine can give {size(memory['available'])} of it",
        "Files": f"{found['files']} in {found['extents']} extents",
        "Invalidations": f"{waits['total']}, p50 {tables.microseconds(waits['p50_us'])}, "
        f"p99 {tables.microseconds(waits['p99_us'])}, "
        f"at most {tables.microseconds(waits['max_us'])}; "
        f"{found['kills']} users killed, {found['failures']} failed",
    }
    lines = [f"{name + ':':<14} {value}" for name, value in rows.items()]
    lines += [
        f"Touched:       {stray['pages']} freed pages of inode {stray['inode']}, "
        f"given to nobody; held by {', '.join(stray['users']) or 'nobody alive'}"
        for stray in found["strays"]
    ]
    users = [
        [s["user"] or "-", str(s["pid"]), s["state"], s["fence"], _files(s), size(s["granted"]),
         str(s["unacknowledged"])]
        for s in found["sessions"]
    ]  # fmt: skip
    if users:
        head = ["USER", "PID", "STATE", "FENCE", "FILES", "GRANTED", "UNACKED"]
        lines += ["", *tables.columns(head, users, " >  >>>")]
    waits = [
        [s["user"], str(o["inode"]), f"{o['start']:#x}-{o['end'] - 1:#x}", str(o["seq"]),
         tables.microseconds(o["seconds"] * 1e6)]
        for s in found["sessions"] for o in s["outstanding"]
    ]  # fmt: skip
    if waits:
        lines += [
            "",
            *tables.columns(["WAITED FOR", "INODE", "RANGE", "SEQ", "SINCE"], waits, " > >>"),
        ]
    lines += _incident_lines(found)
    return lines


def _files(session: dict[str, Any]) -> str:
    """Return how many files a session has, and how many of them for itself."""
    alone = len(session["exclusive"])
    return f"{len(session['files'])}" + (f" ({alone} exclusive)" if alone else "")


def _incident_lines(found: dict[str, Any]) -> list[str]:
    """Return the last of what went wrong."""
    lines: list[str] = []
    last = found["incidents"][-_INCIDENTS:]
    if last:
        lines += ["", "Last incidents:"]
        lines += [
            f"{time.strftime('%F %T', time.localtime(one['time']))} {one['what']}" for one in last
        ]
    return lines


@click.command(short_help="Show mounts: users, waits, memory.")
@click.argument("directory", metavar="[DIR]", type=click.Path(), required=False)
@_json
@_bytes
@verbose_options
def status(directory: str | None, as_json: bool, in_bytes: bool, verbosity: Verbosity) -> None:
    """Show the privfs mount that holds DIR, or all of them: users, waits, memory.

    Invalidations: how long punches and shrinks waited for their users' acknowledgements.
    """
    verbosity.log_to(None)
    found = all_status() if directory is None else [mount_status(directory)]
    if as_json:
        _print_json(found)
    elif not found:
        click.echo("no privfs mounts; make one with: privfs mount DIR")
    else:
        blocks = ["\n".join(status_lines(mount, in_bytes=in_bytes)) for mount in found]
        click.echo("\n\n".join(blocks))
    if any("error" in mount for mount in found):
        raise Failure(Exit.NO_MOUNT)
