# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of a mount: cleared ground, FUSE, sockets inside it, signals, and an orderly end.

The sockets lie *inside* the mount, so that whoever sees a private file finds its owner.  They are
bound from a worker thread: bind(2) makes a request that this process itself must answer.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import platform
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from privfs import control, views
from privfs.backing import Backing, choose, default_size
from privfs.fuse import ground, lowlevel
from privfs.fuse.ground import MountError
from privfs.fuse.live import LiveFiles
from privfs.fuse.lowlevel import pyfuse3
from privfs.fuse.operations import Files
from privfs.hostmapped import Passthrough
from privfs.ladder import Ladder
from privfs.machine import Machine
from privfs.namespace import Namespace
from privfs.notifier.lane import SOCKET
from privfs.personality import PAGE_SIZE, PERSONALITIES, Personality
from privfs.service import Service

log = logging.getLogger(__name__)

_PR_SET_DUMPABLE = 4


@dataclass(frozen=True, slots=True)
class MountOptions:
    """Everything that a mount can be told.

    ``size`` is the budget in bytes, ``quota`` that of each file, 0 for none of its own.
    """

    personality: str = "resizable"
    size: int = 0
    mode: int = 0o755
    ladder: Ladder = field(default_factory=Ladder)
    passthrough: bool = True
    allow_other: bool = False
    fsname: str = "privfs"
    backing: str = "shmem"
    pagesize: int = 0
    quota: int = 0

    def __post_init__(self) -> None:
        if self.personality not in PERSONALITIES:
            known = ", ".join(PERSONALITIES)
            raise MountError(errno.EINVAL, f"personality {self.personality!r}: choose {known}")
        for name, size in (("size", self.size), ("quota", self.quota)):
            if size < 0 or size % PAGE_SIZE:
                raise MountError(errno.EINVAL, f"{name}={size}: must be a multiple of {PAGE_SIZE}")


def hide_memory() -> None:
    """Keep other processes of this user, debuggers and core dumps away from our memory."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("prctl(PR_SET_DUMPABLE): %s", os.strerror(ctypes.get_errno()))


def raise_fd_limit() -> None:
    """Take all the descriptors that we may have: every extent of every file is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_size(size: int, total: int) -> None:
    """Raise MountError for a budget of ``size`` bytes that this machine can never fill.

    tmpfs takes it: what it holds can be swapped out.
    """
    if size > total:
        raise MountError(
            errno.EINVAL,
            f"size={size}: more than the memory of this machine, or of our cgroup, which is {total}"
            " bytes; give less, or a share of it (size=50%). Files may be larger: only the pages "
            "that they hold count",
        )


def serve(
    mountpoint: str,
    options: MountOptions,
    ready: Callable[[], None],
    ending: Callable[[], None] = lambda: None,
) -> None:
    """Mount, call ``ready`` when everything answers, and serve until unmounted or told to end.

    Then ``ending`` is called, before the memory is taken away from its users.
    """
    store = choose(options.backing, options.pagesize)
    if not store.pooled:
        _check_size(options.size, Machine().total_bytes())
    mountpoint = os.path.realpath(mountpoint)  # as the mount table writes it
    ground.clear(mountpoint)
    hide_memory()
    raise_fd_limit()
    now = time.time_ns()
    names = Namespace(now, os.getuid(), os.getgid(), options.mode)
    personality = replace(
        PERSONALITIES[options.personality], page_size=store.page_size, layout=store.layout,
        read_only_users=store.read_only,
    )  # fmt: skip
    budget = (options.size or default_size(options.backing, options.pagesize)) // PAGE_SIZE
    service = Service(
        personality, budget, options.ladder, backing=Backing(store=store),
        quota_pages=options.quota // PAGE_SIZE,
    )  # fmt: skip
    live = LiveFiles()
    live.add(names, b"meminfo", partial(views.meminfo_text, service.owner), now)
    live.add(names, b"sessions", partial(views.sessions_text, service.owner), now)
    files = Files(names, service, live)
    fuse_options = {*lowlevel.DEFAULT_OPTIONS, f"fsname={options.fsname}", "subtype=privfs"}
    if options.allow_other:
        fuse_options.add("allow_other")
    mode = _mode(personality, options)
    try:
        status = lowlevel.init(
            files, mountpoint, fuse_options, mode=mode, seekable=not personality.metadata["lseek"]
        )
    except RuntimeError as error:
        raise MountError(errno.EIO, str(error)) from error
    if status.mode == "passthrough":
        service.host_mapped.allow(Passthrough(lowlevel.back, lowlevel.unback, names.open_count))
    info = control.MountInfo(
        mountpoint, os.getpid(), status.mode, status.passthrough_errno, versions(status)
    )
    try:
        lowlevel.install_fastwait()
        service.hub.glance = lowlevel.glance
        trio.run(_main, service, info, ready, ending)
    finally:
        # What was unmounted lazily still has open files; another mount may be in its place.
        # Nobody serves us any more: this must not ask our own mount.
        found = ground.seen_at(mountpoint)
        lowlevel.close(unmount=found is not None and service.dev in (0, found.dev))


def _mode(personality: Personality, options: MountOptions) -> lowlevel.Mode:
    """In passthrough the kernel refuses reads with EINVAL; another errno must come from us."""
    if not options.passthrough:
        return lowlevel.Mode.DIRECT_IO
    if personality.read_errno == personality.write_errno == errno.EINVAL:
        return lowlevel.Mode.PASSTHROUGH
    return lowlevel.Mode.PASSTHROUGH_DIRECT_IO


def versions(status: lowlevel.Status | None = None) -> dict[str, str]:
    """Return the versions that a report of a problem should name."""
    found = {
        "pyfuse3": str(pyfuse3.__version__),
        "libfuse": lowlevel.LIBFUSE_VERSION,
        "trio": trio.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
    if status is not None:
        found["fuse protocol"] = ".".join(map(str, status.protocol))
    return found


async def _main(
    service: Service,
    info: control.MountInfo,
    ready: Callable[[], None],
    ending: Callable[[], None],
) -> None:
    async with trio.open_nursery() as nursery:
        ended = trio.Event()
        nursery.start_soon(_serve_fuse, ended)
        with _listeners() as (records, questions):
            # Users show descriptors of their files; questions are answered about all files.
            sockets = {SOCKET: (records, 0o666), control.SOCKET: (questions, 0o600)}
            place = await trio.to_thread.run_sync(ground.settle, info.mountpoint, sockets)
            service.dev = place.dev
            info = replace(info, pinned=place.pinned)
            await nursery.start(service.run, records)
            nursery.start_soon(control.serve, service, info, questions)
            await nursery.start(_obey_signals, service, ended)
            token = trio.lowlevel.current_trio_token()
            watch = ground.Watch(place, lambda: token.run_sync_soon(ended.set))
            try:
                ready()
                await ended.wait()
                ending()
                with trio.CancelScope(shield=True):
                    await service.shutdown()
            finally:
                watch.close()
            nursery.cancel_scope.cancel()


async def _serve_fuse(ended: trio.Event) -> None:
    try:
        await lowlevel.main()
    finally:
        ended.set()


async def _obey_signals(
    service: Service,
    ended: trio.Event,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """SIGTERM or SIGHUP ends the mount; the first SIGINT only names the users, if any."""
    warned = False
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            users = [s.name for s in service.owner.sessions.values() if s.files]
            if number == signal.SIGINT and users and not warned:
                warned = True
                log.warning(
                    "in use by %s; interrupt again to take their memory away and unmount",
                    ", ".join(users),
                )
                continue
            ended.set()
            return


@contextmanager
def _listeners() -> Iterator[tuple[socket.socket, socket.socket]]:
    records = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    questions = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        yield records, questions
    finally:
        records.close()
        questions.close()
