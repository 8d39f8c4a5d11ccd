# SPDX-License-Identifier: GPL-2.0-or-later
"""How far preallocation is: one line of a terminal that is written over, or JSON lines."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Final, Self

import click

from kvmsim.cli import tables
from kvmsim.cli.streams import event
from kvmsim.emulator import MemoryBackend
from kvmsim.uapi import PAGE_SIZE
from kvmsim.vmm.prealloc import Progress

_ERASE: Final = "\r\x1b[K"


class PreallocProgress:
    """A block in which ``told`` may be called; its end clears the line."""

    def __init__(self, vm: str, *, as_json: bool, quiet: bool) -> None:
        self._vm = vm
        self._as_json = as_json
        self._on_terminal = not quiet and sys.stderr.isatty()
        self._shown = False

    def told(self, backend: MemoryBackend, progress: Progress) -> None:
        """Show it."""
        done, total = progress.done * PAGE_SIZE, progress.total * PAGE_SIZE
        if self._as_json:
            line = event("prealloc", vm=self._vm, file=backend.path, done=done, total=total)
            click.echo(line, nl=False)
        elif self._on_terminal and total:
            self._shown = True
            share = f"{100 * done // total:3}% of {tables.size(total)}"
            line = f"{_ERASE}kvmsim: {self._vm}: {backend.path}: allocating {share}".encode()
            click.echo(line, nl=False, err=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown:
            click.echo(_ERASE, nl=False, err=True)
