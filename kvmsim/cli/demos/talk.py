# SPDX-License-Identifier: GPL-2.0-or-later
"""The console of a guest that is asked one thing after the other."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Final

from kvmsim.cli.demos.stage import Differs
from kvmsim.console import Lines

_PATIENCE: Final = 30.0
_ANSWER: Final = re.compile(r"^(ok|error|panic:)")
_FIELD: Final = re.compile(r"(\S+)=(\S+)")


class Talk:
    """Lines as they come; ``put`` and ``end`` are what a :class:`ConsoleVm` calls."""

    def __init__(self) -> None:
        self.type: Callable[[bytes], None] = lambda data: None
        self._lines: list[str] = []
        self._cut = Lines()
        self._ended = False
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def put(self, data: bytes) -> None:
        """Take console output."""
        with self._lock:
            self._lines += self._cut.feed(data)
            self._changed.notify_all()

    def end(self) -> None:
        """There will be no more."""
        with self._lock:
            self._ended = True
            self._changed.notify_all()

    def until(self, pattern: re.Pattern[str], seconds: float = _PATIENCE) -> list[str]:
        """The lines up to one like this, which is the last; Differs if it does not come."""
        deadline = time.monotonic() + seconds
        with self._lock:
            while True:
                for index, line in enumerate(self._lines):
                    if pattern.search(line):
                        found, self._lines = self._lines[: index + 1], self._lines[index + 1 :]
                        return found
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    why = "ended" if self._ended else f"was silent for {seconds:g} s"
                    last = self._lines[-1] if self._lines else "nothing"
                    raise Differs(f"the guest {why} before it said {pattern.pattern!r}: {last}")
                self._changed.wait(left)

    def ask(self, line: str) -> list[str]:
        """Type a command; its lines, the answer last."""
        self.type(line.encode() + b"\n")
        return self.until(_ANSWER)


def fields(answer: str) -> dict[str, int]:
    """The numbers among ``name=value`` of an answer."""
    return {name: int(value, 0) for name, value in _FIELD.findall(answer)
            if re.fullmatch(r"0x[0-9a-f]+|[0-9]+", value)}  # fmt: skip
