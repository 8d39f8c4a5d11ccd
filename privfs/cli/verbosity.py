# SPDX-License-Identifier: GPL-2.0-or-later
"""``-v`` and ``--debug``, the same for every command, and where messages go."""

from __future__ import annotations

import functools
import logging
import logging.handlers
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import click

_SYSLOG: Final = "/dev/log"
#: Where trio says that accept(2) found no descriptor free, with a traceback each time.
_ACCEPTS: Final = logging.getLogger("trio.serve_listeners")


def _one_line(record: logging.LogRecord) -> bool:
    """Let a message pass without its traceback."""
    record.exc_info = None
    return True


@dataclass(slots=True)
class Verbosity:
    """How much a command says; one for each call of the program."""

    verbose: bool = False
    debug: bool = False
    handler: logging.Handler | None = None

    def arguments(self) -> list[str]:
        """Return the arguments that pass it on."""
        return ["--debug"] * self.debug + ["--verbose"] * self.verbose

    def log_to(self, path: str | None, *, syslog: bool = False) -> None:
        """Send log messages to a file, to syslog(3) where it exists, or to stderr."""
        level = logging.WARNING
        if self.verbose or self.debug:
            level = logging.DEBUG if self.debug else logging.INFO
        style = "privfs: %(message)s"
        handler: logging.Handler = logging.StreamHandler()
        if path is not None:
            handler = logging.FileHandler(path)
            style = "%(asctime)s %(levelname)s %(message)s"
        elif syslog and os.path.exists(_SYSLOG):
            handler = logging.handlers.SysLogHandler(_SYSLOG)
            style = f"privfs[{os.getpid()}]: %(message)s"
        elif self.debug:
            style = "privfs: %(relativeCreated)d ms %(name)s: %(message)s"
        handler.setFormatter(logging.Formatter(style))
        if not self.debug:
            _ACCEPTS.addFilter(_one_line)
        root = logging.getLogger()
        root.addHandler(handler)
        root.setLevel(level)
        self.handler = handler

    def close(self) -> None:
        """Stop logging."""
        if self.handler is not None:
            logging.getLogger().removeHandler(self.handler)
            _ACCEPTS.removeFilter(_one_line)
            self.handler.close()


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
