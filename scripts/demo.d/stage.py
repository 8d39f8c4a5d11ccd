# SPDX-License-Identifier: GPL-2.0-or-later
"""What the demonstration is shown on: titles, commands with their output, claims that must hold."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

COMMAND_TIMEOUT = 20.0
_LONG = 14  # lines of output that are shown in full


class Differs(Exception):
    """Something is not as the demonstration says."""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended; both outputs in one."""

    status: int
    output: str


def _has_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


@dataclass(slots=True)
class Stage:
    """Prints; colours only on a terminal and without $NO_COLOR."""

    folder: str  #: where all happens; paths are shown relative to it
    colour: bool = field(default_factory=_has_colour)
    steps: int = 0
    claims: int = 0

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour else text

    def _print(self, text: str) -> None:
        print(text.replace(self.folder + "/", ""), flush=True)

    def title(self, text: str) -> None:
        """Begin a step."""
        self.steps += 1
        self._print("\n" + self._paint("1;36", f"{self.steps}. {text}"))

    def say(self, text: str) -> None:
        """Print a sentence."""
        self._print(text)

    def shown(self, text: str, mark: str = "    ") -> None:
        """Print what a program said; the middle of a long text is left out."""
        lines = text.rstrip("\n").splitlines()
        if len(lines) > _LONG:
            half = _LONG // 2
            lines[half:-half] = [f"… {len(lines) - 2 * half} more lines …"]
        for line in lines:
            self._print(mark + self._paint("2", line))

    def typed(self, text: str, prompt: str = "$ ") -> None:
        """Print what is typed."""
        self._print(self._paint("1;32", prompt) + self._paint("1", text))

    def run(self, command: Sequence[str], *, quiet: bool = False) -> Ran:
        """Run a host command, showing it and its output."""
        if not quiet:
            self.typed(shlex.join(_short(word) for word in command))
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=COMMAND_TIMEOUT,
                text=True,
                check=False,
                env=os.environ | {"LC_ALL": "C"},
            )
        except subprocess.TimeoutExpired:
            raise Differs(f"{shlex.join(command)} did not end in {COMMAND_TIMEOUT:g} s") from None
        if not quiet:
            self.shown(done.stdout)
        return Ran(done.returncode, done.stdout)

    def must(self, command: Sequence[str], *, quiet: bool = False) -> str:
        """Run a host command that must succeed; its output."""
        ran = self.run(command, quiet=quiet)
        if ran.status != 0:
            raise Differs(f"{shlex.join(command)} returned {ran.status}: {ran.output.strip()}")
        return ran.output

    def claim(self, holds: bool, text: str, otherwise: object = "") -> None:
        """State something; Differs unless it holds."""
        if not holds:
            self._print("  " + self._paint("1;31", "✗ " + text))
            raise Differs(f"{text}: {otherwise}" if otherwise != "" else text)
        self.claims += 1
        self._print("  " + self._paint("32", "✓ ") + text)

    def failed(self, text: str) -> None:
        """Tell why the demonstration ends early."""
        sys.stdout.flush()
        print(f"demo: {text}", file=sys.stderr, flush=True)


def _short(word: str) -> str:
    """Return a program by its name, as one types it."""
    return os.path.basename(word) if word.startswith("/") and os.access(word, os.X_OK) and \
        os.path.isfile(word) else word  # fmt: skip
