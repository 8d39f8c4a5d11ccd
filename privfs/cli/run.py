# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs run``: a mount that lives as long as one command.

The mount is a child in a session of its own, tied to us by a pipe: if we are killed, it unmounts
and removes the directory; if it is killed, we do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from typing import Final

import click

from privfs.cli import child, options
from privfs.cli.exitcodes import Exit
from privfs.cli.failure import Failure
from privfs.cli.mount import option_arguments
from privfs.cli.verbosity import Verbosity, verbose_options
from privfs.leaving import unwind_on

#: Passed on to the command.  Those of the terminal reach it anyway, see :func:`_wait`.
_FORWARDED: Final = frozenset({
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
})  # fmt: skip
_SI_KERNEL: Final = 0x80  # sigaction(2): sent by the terminal, to the whole foreground group


@click.command(
    short_help="Mount, run a command, unmount.",
    context_settings={"allow_interspersed_args": False},
    epilog=options.help_text(),
)
@click.option("-o", "texts", metavar="OPTIONS", multiple=True, help="Mount options, see below.")
@click.option("--at", metavar="DIR", type=click.Path(), help="Mount on DIR, made if missing.")
@click.argument("command", metavar="-- COMMAND...", nargs=-1, type=click.UNPROCESSED, required=True)
@verbose_options
def run(
    texts: tuple[str, ...], at: str | None, command: tuple[str, ...], verbosity: Verbosity
) -> None:
    """Mount, run COMMAND with $PRIVFS set to the mount, unmount; return COMMAND's status."""
    verbosity.log_to(None)
    wishes = options.parse(texts)
    with _signals_unwind(), _mount(at, wishes, verbosity) as directory:
        status = _run(command, os.environ | {"PRIVFS": directory})
    raise SystemExit(status)


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """Let signals that would end us clean up on the way."""
    put_back = unwind_on(signal.SIGTERM, signal.SIGHUP)
    try:
        yield
    finally:
        put_back()


@contextlib.contextmanager
def _mount(at: str | None, wishes: options.Wishes, verbosity: Verbosity) -> Iterator[str]:
    """Mount on ``at`` or a new directory; leave nothing behind."""
    ours = at is None or not os.path.lexists(at)
    if at is None:
        directory = tempfile.mkdtemp(prefix="privfs.")
    else:
        directory = os.path.abspath(at)
        if ours:
            os.mkdir(directory)
    mount: child.MountProcess | None = None
    try:
        arguments = [*verbosity.arguments(), *option_arguments(wishes), *["--remove"] * ours]
        mount = child.start([*arguments, "--", directory], tied=True)
        yield directory
    finally:
        _end(mount, directory)
        if ours:
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(directory)


def _end(mount: child.MountProcess | None, directory: str) -> None:
    """End the mount's process, if there is one, and the mount, should it be left."""
    from privfs.fuse import ground

    status = mount.end() if mount is not None else 0
    found = ground.newest(directory)
    if mount is not None and found is not None and found.type == ground.TYPE:
        ground.unmount(directory)
    if status < 0:
        name = signal.Signals(-status).name
        click.echo(f"privfs: the mount was ended by {name}; it is cleared away", err=True)


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command to its end and return its status as a shell does; raises Failure."""
    watched = _FORWARDED | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        try:
            pid = os.posix_spawnp(
                command[0], tuple(command), environment,
                setsigmask=before, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
            )  # fmt: skip
        except OSError as error:
            missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
            code = Exit.RUN_NOT_FOUND if missing else Exit.RUN_CANNOT_EXECUTE
            raise Failure(code, f"{command[0]}: {error.strerror}") from error
        return _wait(pid, watched)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(pid: int, watched: frozenset[signal.Signals]) -> int:
    """Wait for a child and pass signals on to it, except those that it got from the terminal."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else Exit.SIGNAL - code
        info = signal.sigwaitinfo(watched)
        if info.si_signo != signal.SIGCHLD and info.si_code != _SI_KERNEL:
            os.kill(pid, info.si_signo)
