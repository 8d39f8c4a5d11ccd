# SPDX-License-Identifier: GPL-2.0-or-later
"""Many of the lightest users in one process and one thread: they acknowledge and do nothing else.

crowd.py SOCKET USERS FILE...    register every user on every file, print "ready", leave at the end
of stdin
"""

from __future__ import annotations

import os
import select
import socket
import sys

from privfs.notifier.fds import receive_frame, send_frame
from privfs.notifier.lane import connect
from privfs.notifier.user import Happening, Opened, Registered, User, Zap
from privfs.notifier.wire import Record, To, pack, parse


class LightUser:
    """One session."""

    def __init__(self, path: str) -> None:
        self.user = User()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connect(self.sock, path)
        opened = self._ask(self.user.hello("bench"), [])
        assert isinstance(opened, Opened)
        assert not opened.status

    def register(self, files: list[str]) -> None:
        """Become a user of every file."""
        for path in files:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            registered = self._ask(self.user.register(), [fd])
            os.close(fd)
            assert isinstance(registered, Registered)
            assert not registered.status, os.strerror(registered.status)

    def turn(self) -> bool:
        """Answer one frame; False at the end of the session."""
        frame, _ = receive_frame(self.sock)
        if not frame:
            return False
        zaps = [self.user.received(record) for record in parse(frame, To.USER)]
        acks = [self.user.ack(zap.seq) for zap in zaps if isinstance(zap, Zap)]
        if acks:
            send_frame(self.sock, pack(acks), [])
        return True

    def _ask(self, record: Record, fds: list[int]) -> Happening:
        send_frame(self.sock, pack([record]), fds)
        frame, _ = receive_frame(self.sock)
        (answer,) = parse(frame, To.USER)
        return self.user.received(answer)


def main(path: str, users: int, files: list[str]) -> None:
    """Answer until stdin ends."""
    crowd = [LightUser(path) for _ in range(users)]
    for user in crowd:
        user.register(files)
    by_fd = {user.sock.fileno(): user for user in crowd}
    poll = select.epoll()
    poll.register(sys.stdin, select.EPOLLIN)
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    print("ready", flush=True)
    while by_fd:
        for fd, _ in poll.poll():
            if fd == sys.stdin.fileno():
                return
            if not by_fd[fd].turn():
                poll.unregister(fd)
                del by_fd[fd]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
