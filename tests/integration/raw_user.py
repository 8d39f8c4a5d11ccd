# SPDX-License-Identifier: GPL-2.0-or-later
"""Say anything to a mount's socket: ``raw_user.py SOCKET``, one command a line.

``hello``, ``register PATH [FLAGS [PURPOSE]]``, ``record OP [FLAGS STATUS REQ OBJ START END SEQ]``,
``frame HEX``, ``noise BYTES SEED``, ``flood COUNT OP ...`` (that record again and again, reading
nothing), ``fds COUNT`` (HELLO with descriptors), ``odd KIND PATH`` (REGISTER with another kind of
descriptor), ``fence KIND PATH`` (HELLO with one for a userfaultfd), ``read``.  What arrives is
printed as ``got OP STATUS REQ OBJ START END SEQ``, the end of the session as ``eof``.  Each command
is answered ``sent`` or, if the socket is closed, ``closed``.
"""

from __future__ import annotations

import array
import os
import random
import socket
import sys

from privfs.notifier.lane import connect
from privfs.notifier.user import User
from privfs.notifier.wire import MAX_FRAME, MAX_RECORDS, RECORD, Fence, Op, Record, pack
from privfs.seals import ALL_PURPOSES

PAGE = 4096


def say(text: str) -> None:
    print(text, flush=True)


class RawUser:
    """A socket and no conscience."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connect(self.sock, path)

    def send(self, frame: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([frame], rights)

    def record(self, name: str, *numbers: str) -> bytes:
        return pack([Record(Op[name], *[int(number, 0) for number in numbers])])

    def read(self) -> None:
        """Print the next frame."""
        frame, _, _, _ = self.sock.recvmsg(MAX_FRAME, socket.CMSG_SPACE(64))
        if not frame:
            say("eof")
        for fields in RECORD.iter_unpack(frame):
            op, _, *rest = fields
            say(f"got {Op(op).name} {' '.join(map(str, rest))}")

    def register(self, path: str, flags: int, purpose: int = ALL_PURPOSES) -> None:
        fd = os.open(path, flags)
        self.send(pack([User().register(purpose)]), [fd])
        os.close(fd)

    def odd(self, kind: str, path: str, record: Record) -> None:
        """Send a record with another descriptor than it wants."""
        ours, theirs = socket.socketpair()
        ours.shutdown(socket.SHUT_RDWR)
        reader, writer = os.pipe()
        made = {
            "socket": ours.fileno(),
            "pipe": reader,
            "memfd": os.memfd_create("odd"),
            "epoll": os.eventfd(0),
            "self": self.sock.fileno(),
            "path": os.open(path, os.O_PATH),
            "symlink": os.open(path, os.O_PATH | os.O_NOFOLLOW),
            "file": os.open(path, os.O_RDONLY),
        }
        self.send(pack([record]), [made[kind]])
        theirs.close()
        os.close(writer)

    def obey(self, words: list[str]) -> None:
        match words:
            case ["hello"]:
                self.send(pack([Record(Op.HELLO, req=1, start=1)]))
            case ["register", path]:
                self.register(path, os.O_RDWR)
            case ["register", path, flags]:
                self.register(path, getattr(os, flags))
            case ["register", path, flags, purpose]:
                self.register(path, getattr(os, flags), int(purpose))
            case ["odd", kind, path]:
                self.odd(kind, path, User().register())
            case ["fence", kind, path]:
                self.odd(kind, path, User().hello("raw", fence=Fence.UFFD))
            case ["record", name, *numbers]:
                self.send(self.record(name, *numbers))
            case ["frame", *text]:
                self.send(bytes.fromhex("".join(text)))
            case ["noise", length, seed]:
                self.send(random.Random(int(seed)).randbytes(int(length)))
            case ["large"]:
                self.send(pack([Record(Op.BYE)]) * (MAX_RECORDS + 1))
            case ["fds", count]:
                hello = pack([Record(Op.HELLO, req=1, start=1)])
                self.send(hello, [0] * int(count))
            case ["flood", count, name, *numbers]:
                record = self.record(name, *numbers)
                whole, rest = divmod(int(count), MAX_RECORDS)
                for _ in range(whole):
                    self.send(record * MAX_RECORDS)
                if rest:
                    self.send(record * rest)
            case ["read"]:
                self.read()
                return
        say("sent")


def main() -> int:
    user = RawUser(sys.argv[1])
    say("ready")
    for line in sys.stdin:
        try:
            user.obey(line.split())
        except (BrokenPipeError, ConnectionResetError):
            say("closed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
