# SPDX-License-Identifier: GPL-2.0-or-later
"""``-v`` and ``--debug``, the same for every command."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click


@dataclass(slots=True)
class Verbosity:
    """How much a command says; one for each call of the program."""

    verbose: bool = False
    debug: bool = False

    def log_to_stderr(self) -> None:
        """Send log messages to stderr."""
        level = logging.WARNING
        if self.verbose or self.debug:
            level = logging.DEBUG if self.debug else logging.INFO
        style = "kvmsim: %(message)s"
        if self.debug:
            style = "kvmsim: %(relativeCreated)d ms %(name)s: %(message)s"
        logging.basicConfig(level=level, format=style, force=True)


def verbose_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which gets them as ``verbosity``."""

    @click.option("-v", "--verbose", is_flag=True, help="Log what happens.")
    @click.option("--debug", is_flag=True, help="Log everything; errors come with a traceback.")
    @click.pass_context
    def wrapped(context: click.Context, /, *args: Any, **kwargs: Any) -> Any:
        verbosity = context.ensure_object(Verbosity)
        verbosity.verbose, verbosity.debug = kwargs.pop("verbose"), kwargs.pop("debug")
        return command(*args, verbosity=verbosity, **kwargs)

    return functools.update_wrapper(wrapped, command)
