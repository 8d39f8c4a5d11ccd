# SPDX-License-Identifier: GPL-2.0-or-later
"""What a demonstration is shown on: steps, commands with their answers, claims that must hold."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from kvmsim.cli.streams import event

_WIDTH: Final = 96
_LONG: Final = 10  #: lines that are shown in full


class Differs(Exception):
    """Something is not as the demonstration says."""


class Stage(Protocol):
    """Where a demonstration tells what it does."""

    def begin(self, name: str, text: str) -> None:
        """A demonstration begins."""

    def title(self, text: str) -> None:
        """A step begins."""

    def say(self, text: str) -> None:
        """An explanation."""

    def typed(self, text: str, prompt: str = "$ ") -> None:
        """What is typed: on the host, or at the guest's prompt ``> ``."""

    def shown(self, text: str) -> None:
        """What is answered."""

    def calls(self, counts: Mapping[str, int]) -> None:
        """What the hardware was asked, in order of the first time."""

    def claim(self, holds: bool, text: str, otherwise: object = "") -> None:
        """State something; Differs unless it holds."""

    def end(self, name: str, seconds: float, error: str) -> None:
        """A demonstration has ended; ``error`` is empty if all of it held."""


class Text:
    """For a person; colours only on a terminal and without $NO_COLOR."""

    def __init__(self, put: Callable[[str], None], *, quiet: bool = False) -> None:
        self._put = put
        self._quiet = quiet
        self._colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._steps = self._claims = 0

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour else text

    def _print(self, text: str) -> None:
        if not self._quiet:
            self._put(text)

    def begin(self, name: str, text: str) -> None:
        """Its name and what it is about."""
        self._steps = self._claims = 0
        self._print(self._paint("1", f"{name}: {text}"))

    def title(self, text: str) -> None:
        """A numbered line."""
        self._steps += 1
        self._print("\n" + self._paint("1;36", f"{self._steps}. {text}"))

    def say(self, text: str) -> None:
        """A paragraph."""
        self._print(textwrap.fill(text, _WIDTH))

    def typed(self, text: str, prompt: str = "$ ") -> None:
        """With its prompt."""
        self._print(self._paint("1;32", prompt) + self._paint("1", _short(text)))

    def shown(self, text: str) -> None:
        """Indented; the middle of a long text is left out."""
        lines = text.rstrip("\n").splitlines()
        if len(lines) > _LONG:
            half = _LONG // 2
            lines[half:-half] = [f"… {len(lines) - 2 * half} more lines …"]
        for line in lines:
            self._print("    " + self._paint("2", _short(line)))

    def calls(self, counts: Mapping[str, int]) -> None:
        """One after the other, with how often."""
        parts = [name if count == 1 else f"{name} ×{count}" for name, count in counts.items()]
        text = textwrap.fill(
            ", ".join(part.replace(" ", "\0") for part in parts), _WIDTH,
            initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False,
        )  # fmt: skip
        self._print(self._paint("2", text.replace("\0", " ")))

    def claim(self, holds: bool, text: str, otherwise: object = "") -> None:
        """Ticked off, or not."""
        if not holds:
            self._print("  " + self._paint("1;31", "✗ " + text))
            raise Differs(f"{text}: {otherwise}" if otherwise != "" else text)
        self._claims += 1
        self._print("  " + self._paint("32", "✓ ") + text)

    def end(self, name: str, seconds: float, error: str) -> None:
        """How many claims held."""
        if error:
            self._print("")
        else:
            self._print(f"\n{name}: all {self._claims} claims hold, in {seconds:.1f} s\n")


class Json:
    """For programs: an object a line."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        self._put = put
        self._demo = ""
        self._claims = 0

    def _tell(self, name: str, **values: object) -> None:
        self._put(event(name, demo=self._demo, **values))

    def begin(self, name: str, text: str) -> None:
        """``begin``."""
        self._demo, self._claims = name, 0
        self._tell("begin", text=text)

    def title(self, text: str) -> None:
        """``step``."""
        self._tell("step", text=text)

    def say(self, text: str) -> None:
        """``text``."""
        self._tell("text", text=text)

    def typed(self, text: str, prompt: str = "$ ") -> None:
        """``typed``."""
        self._tell("typed", where="host" if prompt == "$ " else "guest", text=text)

    def shown(self, text: str) -> None:
        """``shown``."""
        self._tell("shown", lines=text.splitlines())

    def calls(self, counts: Mapping[str, int]) -> None:
        """``calls``."""
        self._tell("calls", counts=dict(counts))

    def claim(self, holds: bool, text: str, otherwise: object = "") -> None:
        """``claim``."""
        self._tell("claim", holds=holds, text=text, otherwise=str(otherwise) if not holds else "")
        if not holds:
            raise Differs(f"{text}: {otherwise}" if otherwise != "" else text)
        self._claims += 1

    def end(self, name: str, seconds: float, error: str) -> None:
        """``end``."""
        self._tell("end", held=not error, claims=self._claims, seconds=seconds, error=error)


def _short(text: str) -> str:
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"
