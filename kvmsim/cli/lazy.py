# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that are imported when they are asked for: ``kvmsim stat`` needs no engine."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """A group whose commands stand in ``sources``: name → ``module:attribute``."""

    def __init__(self, *arguments: Any, sources: Mapping[str, str], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._sources = sources

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in order."""
        return sorted({*super().list_commands(ctx), *self._sources})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, once; None if there is no such name."""
        if cmd_name in self._sources and cmd_name not in self.commands:
            module, _, attribute = self._sources[cmd_name].partition(":")
            command = getattr(importlib.import_module(module), attribute)
            assert isinstance(command, click.Command), self._sources[cmd_name]
            self.add_command(command)
        return super().get_command(ctx, cmd_name)
