# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's side of FUSE, played by a test: linux/fuse.h on a socket (see raw_server.py)."""

from __future__ import annotations

import enum
import errno
import json
import select
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = 1
S_IFMT, S_IFREG, S_IFDIR = 0o170000, 0o100000, 0o040000
IN = struct.Struct("=IIQQIIIHH")  # struct fuse_in_header
OUT = struct.Struct("=IiQ")  # struct fuse_out_header
ATTR = struct.Struct("=6Q10I")  # struct fuse_attr
ENTRY_SIZE, OPEN_SIZE = 40 + ATTR.size, 16
_ANSWER_SECONDS = 10
_SOCKET_BYTES = 8 << 20


class Op(enum.IntEnum):
    """enum fuse_opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53
    CUSE_INIT = 4096


#: What is never answered.
SILENT = frozenset({Op.FORGET, Op.INTERRUPT, Op.NOTIFY_REPLY, Op.BATCH_FORGET})


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; ``error`` is an errno or 0."""

    error: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Attributes:
    """What matters of struct fuse_attr."""

    ino: int
    size: int
    blocks: int
    mode: int
    nlink: int

    @classmethod
    def unpack(cls, data: bytes) -> Attributes:
        ino, size, blocks, _, _, _, _, _, _, mode, nlink, *_ = ATTR.unpack_from(data)
        return cls(ino, size, blocks, mode, nlink)


@dataclass(slots=True)
class Kernel:
    """One mount; requests go out with :meth:`send`, answers come in with :meth:`collect`."""

    sock: socket.socket
    process: subprocess.Popen[bytes]
    log_path: Path
    unique: int = 2
    awaited: Counter[int] = field(default_factory=Counter)

    # --- messages -----------------------------------------------------------------------------

    def message(self, op: int, nodeid: int, body: bytes = b"", unique: int | None = None) -> bytes:
        """Return a request as the kernel writes it; ``unique`` counts by twos as in the kernel."""
        if unique is None:
            self.unique += 2
            unique = self.unique
        return IN.pack(IN.size + len(body), op, unique, nodeid, 0, 0, 1, 0, 0) + body

    def send(self, message: bytes) -> None:
        """Send a request of any shape and note whether it must be answered."""
        self.sock.sendall(message)
        if len(message) >= IN.size:
            _, op, unique, *_ = IN.unpack_from(message)
            if op not in SILENT:
                self.awaited[unique] += 1

    def collect(self) -> dict[int, Reply]:
        """Wait until everything is answered, each request once."""
        found: dict[int, Reply] = {}
        while self.awaited:
            unique, reply = self.receive()
            assert self.awaited[unique], f"an answer to request {unique}, that nobody made"
            self.awaited[unique] -= 1
            if not self.awaited[unique]:
                del self.awaited[unique]
            found[unique] = reply
        return found

    def receive(self) -> tuple[int, Reply]:
        """Return the next answer."""
        if not select.select([self.sock], [], [], _ANSWER_SECONDS)[0]:
            self.process.send_signal(signal.SIGABRT)  # it leaves a traceback
            self.process.wait()
            raise AssertionError(f"no answer to {dict(self.awaited)}: {self.log()}")
        data = self.sock.recv(_SOCKET_BYTES)
        assert data, f"the mount ended with {self.process.wait(_ANSWER_SECONDS)}: {self.log()}"
        length, error, unique = OUT.unpack_from(data)
        assert length == len(data), (length, len(data))
        assert -4096 < error <= 0
        assert not error or length == OUT.size, "an error has no body"
        return unique, Reply(-error, data[OUT.size :])

    def ask(self, op: int, nodeid: int, body: bytes = b"") -> Reply:
        """Make one request and return its answer; nothing else may be under way."""
        assert not self.awaited
        self.send(self.message(op, nodeid, body))
        (reply,) = self.collect().values()
        return reply

    def log(self) -> str:
        return self.log_path.read_text()

    # --- well-formed requests -----------------------------------------------------------------

    def init(self, major: int = 7, minor: int = 38, flags: int = 0xFFFFFFFF & ~(1 << 16)) -> Reply:
        """INIT; all flags but FUSE_WRITEBACK_CACHE are offered, and all of the second word."""
        body = struct.pack("=IIIII11I", major, minor, 1 << 20, flags, 0xFFFFFFFF, *[0] * 11)
        return self.ask(Op.INIT, 0, body)

    def getattr(self, ino: int) -> Attributes | None:
        """GETATTR; None for an inode that is not there."""
        reply = self.ask(Op.GETATTR, ino, struct.pack("=IIQ", 0, 0, 0))
        if reply.error:
            assert reply.error == errno.ESTALE, reply
            return None
        assert len(reply.body) == 16 + ATTR.size
        return Attributes.unpack(reply.body[16:])

    def statfs(self) -> tuple[int, int, int, int]:
        """STATFS: pages, free pages, inodes, free inodes."""
        reply = self.ask(Op.STATFS, ROOT)
        assert reply.error == 0, reply
        blocks, free, _, inodes, free_inodes, _, namelen, fragment = struct.unpack_from(
            "=5QIII", reply.body
        )
        assert (namelen, fragment) == (255, 4096)
        return blocks, free, inodes, free_inodes

    def list(self, ino: int) -> dict[bytes, int]:
        """OPENDIR, READDIRPLUS to the end, RELEASEDIR, and FORGET what was learnt."""
        reply = self.ask(Op.OPENDIR, ino, bytes(8))
        assert reply.error == 0, reply
        (handle,) = struct.unpack_from("=Q", reply.body)
        found: dict[bytes, int] = {}
        offset = 0
        while True:
            body = struct.pack("=QQIIQII", handle, offset, 4096, 0, 0, 0, 0)
            reply = self.ask(Op.READDIRPLUS, ino, body)
            assert reply.error == 0, reply
            if not reply.body:
                break
            for name, node, cookie in entries(reply.body):
                assert cookie > offset, "a scan that does not go on"
                offset = cookie
                found[name] = node
                if name not in (b".", b".."):
                    self.send(self.message(Op.FORGET, node, struct.pack("=Q", 1)))
        assert self.ask(Op.RELEASEDIR, ino, struct.pack("=QIIQ", handle, 0, 0, 0)).error == 0
        return found


def entries(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, node, cookie) of struct fuse_direntplus."""
    while data:
        (node,) = struct.unpack_from("=Q", data)
        _, cookie, length, _ = struct.unpack_from("=QQII", data, ENTRY_SIZE)
        start = ENTRY_SIZE + 24
        yield data[start : start + length], node, cookie
        data = data[(start + length + 7) & ~7 :]


@contextmanager
def connected(place: Path, personality: str, pages: int, *more: str) -> Iterator[Kernel]:
    """Start raw_server.py; INIT is the caller's to send."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    log_path = place / "raw_server.log"
    with ours, open(log_path, "wb") as log:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("raw_server.py"), str(theirs.fileno()),
                 personality, str(pages), *more],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=log, cwd=Path(__file__).parents[2],
            )  # fmt: skip
        try:
            yield Kernel(ours, process, log_path)
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def hang_up(kernel: Kernel) -> dict[str, object]:
    """Close the socket and return what the mount says at its end; it must end in order."""
    kernel.sock.close()
    said, _ = kernel.process.communicate(timeout=_ANSWER_SECONDS)
    assert kernel.process.returncode == 0, kernel.log()
    report: dict[str, object] = json.loads(said)
    return report
