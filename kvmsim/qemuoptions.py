# SPDX-License-Identifier: GPL-2.0-or-later
"""``-object`` and ``-machine`` as QEMU writes them, mapped onto what ``kvmsim boot`` takes.

The names are those of the QEMU patches that went with the series (memory-backend-memfd-private)
and of what came after them (confidential-guest-support; AMD's ``discard`` of a guest object). A
private file lies in a mount here, so a backend has to name it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvmsim.scriptvalues import DISCARDS, Memory, ScriptError, parse_size, parse_switch

BACKEND: Final = "memory-backend-memfd-private"

#: Guest objects, and the kind of VM that each makes.
GUESTS: Final[Mapping[str, str]] = {
    "shared-bit-guest": "shared-bit",
    "tdx-guest": "tdx",
    "sev-snp-guest": "snp",
}

#: Every object: its keys, and those that must be given.
OBJECTS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    BACKEND: (
        ("id", "size", "mem-path", "offset", "prealloc", "share"), ("id", "size", "mem-path"),
    ),
    **dict.fromkeys(GUESTS, (("id", "discard"), ("id",))),
}  # fmt: skip
MACHINES: Final = ("q35", "none")
MACHINE_KEYS: Final = ("type", "memory-backend", "confidential-guest-support")

_COMMA: Final = re.compile(r"(?<!,)((?:,,)*),(?!,)")


@dataclass(frozen=True, slots=True)
class Options:
    """What the options ask for; ``discard`` and ``kind`` None: they do not say."""

    memory: tuple[Memory, ...] = ()
    discard: str | None = None
    kind: str | None = None


def parse_options(objects: Sequence[str], machine: str | None) -> Options:
    """Return what ``-object`` (each) and ``-machine`` ask for; ScriptError says what to write."""
    made: dict[str, tuple[str, dict[str, str]]] = {}
    for text in objects:
        kind, values = _object(text)
        if values["id"] in made:
            raise ScriptError(f"-object {text}: there is an object {values['id']} already")
        made[values["id"]] = (kind, values)
    wanted = _machine(machine) if machine is not None else {}
    used: set[str] = set()

    def named(key: str, *kinds: str) -> tuple[str, dict[str, str]] | None:
        name = wanted.get(key)
        if name is None:
            return None
        if name not in made or made[name][0] not in kinds:
            known = ", ".join(n for n, (of, _) in made.items() if of in kinds) or "none"
            what = " or ".join(kinds)
            raise ScriptError(f"-machine {key}={name}: no {what} of that id; there is {known}")
        used.add(name)
        return made[name]

    backend = named("memory-backend", BACKEND)
    guest = named("confidential-guest-support", *GUESTS)
    for name, (kind, _) in made.items():
        if name not in used:
            key = "memory-backend" if kind == BACKEND else "confidential-guest-support"
            raise ScriptError(f"{kind} {name} is not used: write -machine q35,{key}={name}")
    memory = () if backend is None else (_memory(backend[1]),)
    if guest is None:
        return Options(memory)
    return Options(memory, guest[1].get("discard"), GUESTS[guest[0]])


def _object(text: str) -> tuple[str, dict[str, str]]:
    where = f"-object {text}"
    kind, *pairs = _split(text)
    if kind not in OBJECTS:
        raise ScriptError(f"{where}: no object {kind!r}; there are {', '.join(OBJECTS)}")
    keys, needed = OBJECTS[kind]
    values = _values(where, pairs, keys)
    for key in needed:
        if not values.get(key):
            raise ScriptError(f"{where}: {key}= is missing")
    if values.get("share", "on") != "on":
        raise ScriptError(f"{where}: share=off cannot be: the owner shares the file with its users")
    if values.get("discard", "both") not in DISCARDS:
        raise ScriptError(f"{where}: discard={values['discard']}: one of {', '.join(DISCARDS)}")
    if kind == BACKEND:
        _memory(values)  # so that a bad size is told of the object
    return kind, values


def _machine(text: str) -> dict[str, str]:
    where = f"-machine {text}"
    first, *pairs = _split(text)
    if "=" not in first:
        first = f"type={first}"
    values = _values(where, [first, *pairs], MACHINE_KEYS)
    if values.get("type", "q35") not in MACHINES:
        raise ScriptError(
            f"{where}: no machine {values['type']!r}; there are {', '.join(MACHINES)}"
        )
    return values


def _values(where: str, pairs: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for pair in pairs:
        key, given, value = pair.partition("=")
        if key not in keys or not given:
            raise ScriptError(f"{where}: no option {pair!r}; there are {', '.join(keys)}")
        if key in values:
            raise ScriptError(f"{where}: {key} is given twice")
        values[key] = value
    return values


def _memory(values: Mapping[str, str]) -> Memory:
    return Memory(
        values["mem-path"],
        parse_size(values.get("offset", "0")),
        parse_size(values["size"]),
        prealloc=parse_switch(values.get("prealloc", "off")),
    )


def _split(text: str) -> list[str]:
    """Cut at commas; two of them are one that belongs to a value."""
    parts = _COMMA.sub(lambda found: f"{found[1]}\0", text).split("\0")
    return [part.replace(",,", ",") for part in parts]
