# SPDX-License-Identifier: GPL-2.0-or-later
"""The session language of ``kvmsim run``: text in, statements out, without I/O.

One statement a line.  :data:`GRAMMAR` has every form; docs/kvmsim.md explains them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from kvmsim.scriptvalues import (
    DISCARDS,
    ENCRYPTS,
    KINDS,
    Memory,
    Payload,
    ScriptError,
    parse_memory,
    parse_payload,
    parse_size,
)

#: Seconds that ``expect`` and ``wait`` take if the line does not say.
WITHIN: Final = 10.0

#: What ``holds`` counts: the fields of :class:`kvmsim.memoryuse.Allocated`.
SIDES: Final = ("private", "shared", "both", "stale")

#: Words of ``vm`` that come once: those without a value, and all.
_SWITCHES: Final = ("selftest", "eager", "batches")
_WORDS: Final = ("vcpus", "kernel", "discard", "kind", "encrypt", "disk", *_SWITCHES)

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_VARIABLE: Final = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)
_WITHIN: Final = re.compile(r"\s+within\s+(\d+(?:\.\d+)?)$")


# --- statements --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Vm:
    """Boot a VM."""

    name: str
    memory: tuple[Memory, ...]
    vcpus: int = 2
    kernel: str | None = None
    discard: str = "both"
    selftest: bool = False
    payload: tuple[Payload, ...] = ()
    kind: str = "shared-bit"
    disk: str | None = None
    eager: bool = False
    batches: bool = False
    encrypt: str = "view"


@dataclass(frozen=True, slots=True)
class Send:
    """Type a line on a VM's console."""

    vm: str
    text: str


@dataclass(frozen=True, slots=True)
class Expect:
    """Wait for a console line, after those that were expected before."""

    vm: str
    regex: re.Pattern[str]
    within: float = WITHIN


@dataclass(frozen=True, slots=True)
class Host:
    """Run a shell command, which must succeed, or with ``fails`` must not."""

    command: str
    fails: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """The last host command printed this."""

    regex: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class Holds:
    """So many bytes are held: on each side, on both, on the side that no access reaches."""

    vm: str
    wanted: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Poison:
    """The memory of a private page fails; bytes."""

    vm: str
    gpa: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End a VM."""

    vm: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for a VM to end; ``status`` is what ``kvmsim boot`` would return."""

    vm: str
    status: int = 0
    within: float = WITHIN


@dataclass(frozen=True, slots=True)
class Say:
    """Print a text."""

    text: str


Action = Vm | Send | Expect | Holds | Host | Output | Poison | Stop | Wait | Say


@dataclass(frozen=True, slots=True)
class Statement:
    """An action and the number of its line."""

    line: int
    action: Action


@dataclass(slots=True)
class _State:
    """What earlier lines have established: the VMs by name, in order."""

    variables: Mapping[str, str]
    vms: list[str] = field(default_factory=list)
    host: bool = False

    def fill(self, text: str, *, quote: Callable[[str], str] = str) -> str:
        """Put in the values of variables."""

        def value(found: re.Match[str]) -> str:
            name = found[1] or found[2]
            if name not in self.variables:
                raise ScriptError(f"no variable {name}; give it with --var {name}=VALUE")
            return quote(self.variables[name])

        return _VARIABLE.sub(value, text)

    def known(self, name: str) -> str:
        """Return ``name`` if it is a VM's."""
        if name not in self.vms:
            raise ScriptError(
                f"no VM {name!r} at this line; there is {', '.join(self.vms) or 'none'}"
            )
        return name

    def pick(self, rest: str) -> tuple[str, str]:
        """Split ``[VM] TEXT``; without a VM's name it is the only one."""
        name, _, text = rest.partition(" ")
        if name in self.vms:
            return name, text.strip()
        if len(self.vms) != 1:
            raise ScriptError(
                f"which VM? begin with its name: {', '.join(self.vms)}"
                if self.vms
                else "no VM is up; begin one with: vm NAME memory=FILE"
            )
        return self.vms[0], rest


# --- one parser a keyword ----------------------------------------------------------------------


def _vm(rest: str, state: _State) -> Vm:
    try:
        words = [state.fill(word) for word in shlex.split(rest)]
    except ValueError as error:
        raise error if isinstance(error, ScriptError) else ScriptError(str(error)) from error
    if not words or not _NAME.fullmatch(words[0]):
        raise ScriptError("a VM's name is a letter, then letters, digits, - or _")
    name, memory, payload, other = words[0], [], [], dict[str, str]()
    if name in state.vms:
        raise ScriptError(f"VM {name} is up already; stop it or wait for it first")
    for word in words[1:]:
        key, given, value = word.partition("=")
        if key == "memory" and value:
            memory.append(parse_memory(value))
        elif key == "payload" and value:
            payload.append(parse_payload(value))
        elif key in _WORDS and key not in other:
            if bool(given) == (key in _SWITCHES) or (given and not value):
                raise ScriptError(f"{word!r}: see {GRAMMAR['vm'].form}")
            other[key] = value
        else:
            raise ScriptError(f"{word!r} is not known or comes twice; see {GRAMMAR['vm'].form}")
    if not memory:
        raise ScriptError("a VM needs memory=FILE")
    vcpus = other.get("vcpus", "2")
    if not vcpus.isdecimal() or not 1 <= int(vcpus) <= 16:
        raise ScriptError(f"vcpus={vcpus}: 1 to 16")
    discard = other.get("discard", "both")
    if discard not in DISCARDS:
        raise ScriptError(f"discard={discard}: one of {', '.join(DISCARDS)}")
    kind = other.get("kind", KINDS[0])
    if kind not in KINDS:
        raise ScriptError(f"kind={kind}: one of {', '.join(KINDS)}")
    encrypt = other.get("encrypt", ENCRYPTS[0])
    if encrypt not in ENCRYPTS:
        raise ScriptError(f"encrypt={encrypt}: one of {', '.join(ENCRYPTS)}")
    state.vms.append(name)
    return Vm(
        name, tuple(memory), int(vcpus), other.get("kernel"), discard, "selftest" in other,
        tuple(payload), kind, other.get("disk"), "eager" in other,
        "batches" in other, encrypt,
    )  # fmt: skip


def _send(rest: str, state: _State) -> Send:
    vm, text = state.pick(rest)
    return Send(vm, state.fill(text))


def _expect(rest: str, state: _State) -> Expect:
    vm, text = state.pick(rest)
    text, within = _timed(text)
    return Expect(vm, _regex(text, state), within)


def _holds(rest: str, state: _State) -> Holds:
    vm, text = state.pick(rest)
    wanted: dict[str, int] = {}
    for word in state.fill(text).split():
        side, given, size = word.partition("=")
        if side not in SIDES or not given or side in wanted:
            raise ScriptError(f"{word!r}: one of {', '.join(SIDES)}, each once, = and bytes")
        wanted[side] = parse_size(size)
    if not wanted:
        raise ScriptError(f"write {GRAMMAR['holds'].form}")
    return Holds(vm, tuple(wanted.items()))


def _host(rest: str, state: _State) -> Host:
    if not rest:
        raise ScriptError("a command must follow")
    state.host = True
    return Host(rest)


def _fails(rest: str, state: _State) -> Host:
    return Host(_host(rest, state).command, fails=True)


def _output(rest: str, state: _State) -> Output:
    if not state.host:
        raise ScriptError("output is about the last host command, and there is none before")
    return Output(_regex(rest, state))


def _poison(rest: str, state: _State) -> Poison:
    vm, gpa = state.pick(rest)
    return Poison(vm, parse_size(state.fill(gpa)))


def _stop(rest: str, state: _State) -> Stop:
    state.vms.remove(state.known(rest))
    return Stop(rest)


def _wait(rest: str, state: _State) -> Wait:
    text, within = _timed(rest)
    words = text.split()
    status = 0
    if len(words) == 3 and words[1] == "status" and words[2].isdecimal():
        status = int(words[2])
    elif len(words) != 1:
        raise ScriptError(f"write {GRAMMAR['wait'].form}")
    state.vms.remove(state.known(words[0]))
    return Wait(words[0], status, within)


def _say(rest: str, state: _State) -> Say:
    return Say(state.fill(rest))


def _timed(text: str) -> tuple[str, float]:
    found = _WITHIN.search(text)
    if found is None:
        return text, WITHIN
    return text[: found.start()], float(found[1])


def _regex(text: str, state: _State) -> re.Pattern[str]:
    """Compile a regular expression; the value of a variable stands for itself in it."""
    if not text:
        raise ScriptError("a regular expression must follow")
    filled = state.fill(text, quote=re.escape)
    try:
        return re.compile(filled, re.MULTILINE)
    except re.error as error:
        raise ScriptError(f"{text!r} is no regular expression: {error}") from None


@dataclass(frozen=True, slots=True)
class Form:
    """How a statement is written, what it does, and its parser."""

    form: str
    help: str
    parse: Callable[[str, _State], Action]


GRAMMAR: Final[dict[str, Form]] = {
    "vm": Form(
        "vm NAME memory=FILE[,offset=N][,size=N][,slots=N][,prealloc=on|off]… [vcpus=N]"
        " [kernel=ELF] [payload=FILE@GPA]… [discard=none|private|shared|both]"
        " [kind=shared-bit|sw-protected|tdx|snp|pkvm] [encrypt=view|backing|none]"
        " [disk=FILE] [eager] [batches] [selftest]",
        "boots a VM", _vm,
    ),
    "send": Form("send [VM] TEXT", "types a line on its console", _send),
    "expect": Form(
        "expect [VM] REGEX [within S]",
        "waits (10 s) for a console line, after the last one that was expected", _expect,
    ),
    "holds": Form(
        "holds [VM] private|shared|both|stale=BYTES…",
        "its memory has so much: on the private side, on the shared side, on both sides of the same"
        " page, on the side that no access reaches", _holds,
    ),
    "host": Form("host COMMAND…", "runs a shell command, which must return 0", _host),
    "fails": Form(
        "fails COMMAND…", "runs a shell command, which must be found and return another status",
        _fails,
    ),
    "output": Form("output REGEX", "the last command printed a line like this", _output),
    "poison": Form(
        "poison [VM] GPA",
        "lets the memory of the private page at GPA fail, as a machine check would tell", _poison,
    ),
    "stop": Form("stop VM", "ends a VM from outside", _stop),
    "wait": Form(
        "wait VM [status N] [within S]",
        "waits (10 s) for the VM to end by itself, with the exit code (0) of `kvmsim boot`", _wait,
    ),
    "say": Form("say TEXT", "prints a text", _say),
}  # fmt: skip


def parse(text: str, variables: Mapping[str, str]) -> tuple[Statement, ...]:
    """Return the statements of a script; ScriptError begins with ``LINE: ``."""
    state = _State(variables)
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        keyword, _, rest = line.partition(" ")
        try:
            if keyword not in GRAMMAR:
                raise ScriptError(f"no statement {keyword!r}; there are {', '.join(GRAMMAR)}")
            found.append(Statement(number, GRAMMAR[keyword].parse(rest.strip(), state)))
        except ScriptError as error:
            raise ScriptError(f"{number}: {error}") from None
    return tuple(found)


def table() -> str:
    """Return the grammar as a Markdown table."""
    rows = [
        f"| `{form.form.replace('|', chr(92) + '|')}` | {form.help} |" for form in GRAMMAR.values()
    ]
    return "\n".join(["| statement | does |", "|---|---|", *rows])
