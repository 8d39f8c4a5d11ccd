# SPDX-License-Identifier: GPL-2.0-or-later
"""A mount without a kernel: ``raw_server.py FD PERSONALITY PAGES [MODE]``.

Serves the file system of privfs to whoever plays the kernel at the other end of a SEQPACKET socket
(libfuse takes ``/dev/fd/N`` for a mount point that is mounted already). Ends with the socket;
then says on stdout how many tasks are left that serve nobody.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import time
from functools import partial

from privfs import views
from privfs.fuse import lowlevel
from privfs.fuse.live import LiveFiles
from privfs.fuse.operations import Files
from privfs.namespace import Namespace
from privfs.personality import PERSONALITIES
from privfs.service import Service

import trio  # isort: skip


async def serve(service: Service, left: set[str]) -> None:
    """Serve until the kernel hangs up; ``left`` takes the tasks that outlive the mount."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as users:
        users.bind("")
        users.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run, users)
            before = tasks()
            await lowlevel.main()
            left |= tasks() - before
            nursery.cancel_scope.cancel()


def tasks() -> set[str]:
    """Return the names of all tasks below the main one."""
    found: set[str] = set()
    todo = [trio.lowlevel.current_task()]
    while todo:
        for nursery in todo.pop().child_nurseries:
            for child in nursery.child_tasks:
                found.add(f"{child.name} {id(child)}")
                todo.append(child)
    return found


def main() -> None:
    fd, personality, pages = int(sys.argv[1]), PERSONALITIES[sys.argv[2]], int(sys.argv[3])
    mode = lowlevel.Mode(sys.argv[4]) if len(sys.argv) > 4 else lowlevel.Mode.DIRECT_IO
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING)
    now = time.time_ns()
    names = Namespace(now, os.getuid(), os.getgid())
    service = Service(personality, pages)
    live = LiveFiles()
    live.add(names, b"meminfo", partial(views.meminfo_text, service.owner), now)
    live.add(names, b"sessions", partial(views.sessions_text, service.owner), now)
    files = Files(names, service, live)
    lowlevel.init(files, f"/dev/fd/{fd}", mode=mode)
    left: set[str] = set()
    try:
        lowlevel.install_fastwait()
        trio.run(serve, service, left)
    finally:
        lowlevel.close(unmount=False)
    print(json.dumps({"left": sorted(left), "files": len(service.owner.files)}), flush=True)


if __name__ == "__main__":
    main()
