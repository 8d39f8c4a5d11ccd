# SPDX-License-Identifier: GPL-2.0-or-later
"""``privfs mount``, ``privfs umount`` and the mount helper."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from privfs.backing import StoreError, default_size
from privfs.cli import child, options, supervisor, tables
from privfs.cli.exitcodes import Exit
from privfs.cli.failure import Failure, mount_failed
from privfs.cli.verbosity import Verbosity, verbose_options
from privfs.leaving import unwind_on

if TYPE_CHECKING:
    from privfs.fuse import ground

log = logging.getLogger(__name__)

_UNMOUNT_PATIENCE: Final = 15.0


@click.command(short_help="Mount private memory on a directory.", epilog=options.help_text())
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("-o", "texts", metavar="OPTIONS", multiple=True, help="Mount options, see below.")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground (the default).")
@click.option("--daemon", is_flag=True, help="Return when the mount answers; it goes on.")
@click.option("-q", "--quiet", is_flag=True, help="Do not say when the mount is ready.")
@click.option("--log", "log_file", metavar="FILE", type=click.Path(), help="Log to FILE.")
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--life-fd", type=int, hidden=True)
@click.option("--detach", is_flag=True, hidden=True)
@click.option("--remove", is_flag=True, hidden=True)
@verbose_options
def mount(
    directory: str,
    texts: tuple[str, ...],
    foreground: bool,
    daemon: bool,
    quiet: bool,
    log_file: str | None,
    ready_fd: int | None,
    life_fd: int | None,
    detach: bool,
    remove: bool,
    verbosity: Verbosity,
) -> None:
    """Mount private memory on DIR and serve it until unmounted or interrupted.

    SIGTERM, SIGHUP or Ctrl-C end the mount; memory that is still in use is taken away from its
    users first.
    """
    wishes = options.parse(texts)
    if daemon and foreground:
        raise Failure(Exit.USAGE, "--daemon and --foreground exclude each other")
    if daemon:
        start_daemon(directory, wishes, verbosity, log_file)
        return
    verbosity.log_to(log_file, syslog=detach)
    # so that what is mounted already gets unmounted; trio takes over when it runs
    unwind_on(signal.SIGTERM, signal.SIGHUP)
    if life_fd is not None:
        child.end_with_parent(life_fd)

    told = supervisor.Supervisor(tied=life_fd is not None)

    def ready() -> None:
        facts = _facts(wishes)
        told.ready(f"serving {directory} ({facts['personality']}, {facts['mode']})")
        if detach:
            os.chdir("/")
            child.detach_streams()
        if ready_fd is not None:
            child.tell_ready(ready_fd, facts)
        elif not quiet:
            click.echo(
                f"privfs on {directory}: {facts['personality']}, {tables.gib(facts['size'])}, "
                f"{facts['mode']}",
                err=True,
            )

    try:
        _serve(directory, wishes, ready, told.stopping)
    finally:
        if remove:
            with contextlib.suppress(OSError):
                os.rmdir(directory)


def _serve(
    directory: str,
    wishes: options.Wishes,
    ready: Callable[[], None],
    ending: Callable[[], None],
) -> None:
    from privfs import doctor, probes

    device = doctor.fuse_device()
    if device.result is probes.Result.FAIL:
        raise Failure(Exit.FUSE, f"{device.name} {device.text}; {device.remedy}")
    try:
        from privfs.fuse.mount import serve
    except ImportError as error:
        raise Failure(Exit.FUSE, f"{error}; see: privfs doctor") from error
    try:
        serve(directory, wishes.mount_options(), ready, ending)
    except* SystemExit as group:  # a signal while the mount was being set up
        raise _first(group) from None
    except* OSError as group:  # most are MountErrors
        raise _explained(group) from group


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _explained(error: BaseException) -> Failure:
    error = _first(error)
    assert isinstance(error, OSError)
    if isinstance(error, StoreError):
        return Failure(
            Exit.USAGE if error.errno == errno.EINVAL else Exit.FAILED, error.strerror or ""
        )
    failure = mount_failed(error)
    if failure.code == Exit.FUSE:
        return Failure(failure.code, f"{failure}; see: privfs doctor")
    return failure


def _facts(wishes: options.Wishes) -> dict[str, Any]:
    from privfs.fuse import lowlevel

    return {
        "personality": wishes.personality,
        "size": wishes.size or default_size(wishes.backing, wishes.pagesize),
        "mode": lowlevel.status().mode,
        "pid": os.getpid(),
    }


def start_daemon(
    directory: str, wishes: options.Wishes, verbosity: Verbosity, log_file: str | None = None
) -> None:
    """Start a mount in a session of its own; returns when it answers, raises Failure."""
    arguments = [*verbosity.arguments(), "--detach", *option_arguments(wishes)]
    if log_file is not None:
        arguments += ["--log", os.path.abspath(log_file)]
    child.start([*arguments, "--", directory], tied=False)


def option_arguments(wishes: options.Wishes) -> list[str]:
    """Return the arguments that pass ``wishes`` on."""
    text = wishes.text()
    return ["-o", text] if text else []


def is_helper_call(arguments: Sequence[str], commands: Sequence[str]) -> bool:
    """Whether mount.fuse3 calls: ``privfs SOURCE DIR -o OPTIONS``, always with options."""
    return (
        len(arguments) >= 3
        and arguments[0] not in commands
        and not arguments[0].startswith("-")
        and arguments[2].startswith("-o")
    )


@click.command()
@click.argument("source")
@click.argument("directory", type=click.Path())
@click.option("-o", "texts", metavar="OPTIONS", multiple=True)
def helper(source: str, directory: str, texts: tuple[str, ...]) -> None:
    """Mount as mount(8) asks for it, in the background."""
    wishes = options.parse([f"fsname={source}", *texts])
    start_daemon(directory, wishes, Verbosity())


@click.command(short_help="Unmount a directory.")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("-z", "--lazy", is_flag=True, help="Even if it is in use: it vanishes at once.")
@verbose_options
def umount(directory: str, lazy: bool, verbosity: Verbosity) -> None:
    """Unmount DIR, alive or dead, and wait until its memory is given back."""
    from privfs.fuse import ground

    verbosity.log_to(None)
    found = ground.newest(directory)
    if found is None or found.type != ground.TYPE:
        raise Failure(Exit.NO_MOUNT, f"{directory}: no privfs is mounted there; see: privfs status")
    status, pidfd = _server(directory)
    try:
        try:
            ground.unmount(found.place, lazy=lazy or pidfd is None)
        except ground.MountError as error:
            if error.errno != errno.EBUSY:
                raise Failure(Exit.FAILED, str(error.strerror)) from error
            users = _users(found, status)
            if users or not status.get("pinned"):
                who = f": in use by {', '.join(users)}" if users else ""
                raise Failure(
                    Exit.FAILED,
                    f"{error.strerror}{who}; end its users (fuser -vm {directory}) or add --lazy",
                ) from error
            log.info("%s: busy with its own sockets alone: unmounting it lazily", directory)
            ground.unmount(found.place, lazy=True)
        if pidfd is not None:
            ended = select.select([pidfd], [], [], _UNMOUNT_PATIENCE)[0]
            if not ended and not lazy:
                text = f"{directory}: unmounted, but its process has not ended"
                raise Failure(Exit.FAILED, text)
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _users(mount: ground.Mount, status: dict[str, Any]) -> list[str]:
    """Return who uses a mount, as far as we may know, as texts for a person."""
    from privfs.fuse import holders

    found = {holder.pid: str(holder) for holder in holders.of(mount)}
    for session in status.get("sessions", []):
        found.setdefault(session["pid"], session["user"])
    return [*found.values(), *holders.mounts_in(mount)]


def _server(directory: str) -> tuple[dict[str, Any], int | None]:
    """Return the status of the mount and a pidfd of its process; nothing and None if it is dead."""
    from privfs import control

    try:
        status = control.ask(directory, "status")
        return status, os.pidfd_open(status["pid"])
    except (control.ControlError, OSError) as error:
        log.info("%s: %s", directory, error)
        return {}, None
