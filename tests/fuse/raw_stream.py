# SPDX-License-Identifier: GPL-2.0-or-later
"""Streams of FUSE requests, sound and unsound, the same ones for the same seed.

What the running kernel never sends is here on purpose: it marks what the mount takes for granted.
fs/fuse checks names (no NUL or '/', 1 to 255 bytes), sizes (max_pages), that an inode and a handle
are its own, and always sends whole messages; uid, modes, times, offsets, whence and flags come from
system calls.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator

from tests.fuse.raw_kernel import IN, ROOT, S_IFDIR, S_IFMT, S_IFREG, Attributes, Op

PAGE = 4096
MAX64 = (1 << 64) - 1
LIVE_HANDLE = 1 << 48

_EDGES = [
    0, 1, 2, 511, PAGE - 1, PAGE, PAGE + 1, 16 * PAGE, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 32,
    1 << 44, (1 << 44) + PAGE, (1 << 63) - PAGE, (1 << 63) - 1, 1 << 63, MAX64 - PAGE + 1, MAX64,
]  # fmt: skip
_PLAIN = [b"a", b"b", b"c", b"d", b"e", b"f"]
_ODD = [
    b"", b".", b"..", b"a/b", b"/", b"\xff\xfe\x80", b"x" * 255, b"x" * 256, b"x" * 300,
    b"y" * 70_000, b"\n\t\x1b[2J", "größe".encode(), b".privfs",
]  # fmt: skip
_PRIVATE = [b"meminfo", b"sessions", b"socket", b"control", *_PLAIN]
_IN_FOLDERS = {
    Op.LOOKUP, Op.SYMLINK, Op.MKNOD, Op.MKDIR, Op.UNLINK, Op.RMDIR, Op.RENAME, Op.RENAME2, Op.LINK,
    Op.CREATE, Op.OPENDIR,
}  # fmt: skip
_MAKES = {Op.LOOKUP, Op.SYMLINK, Op.MKNOD, Op.MKDIR, Op.LINK, Op.CREATE}
_KINDS = [0, 0o010000, 0o020000, 0o040000, 0o060000, 0o100000, 0o120000, 0o140000, 0o170000]


class Stream:
    """An endless source of messages; the test tells it which inodes and handles there are."""

    def __init__(self, seed: object) -> None:
        self.random = random.Random(str(seed))
        self.folders, self.files, self.others = [ROOT, 2], [3, 4], [ROOT]
        self.handles = [0]
        self._unique = 1 << 32
        self._recent = [0]
        self._makers: list[tuple[Op, Callable[[], bytes]]] = []
        weights: list[int] = []
        for op, weight, maker in (
            (Op.LOOKUP, 6, self._name),
            (Op.FORGET, 3, lambda: struct.pack("=Q", self._few())),
            (Op.BATCH_FORGET, 1, self._batch),
            (Op.GETATTR, 3, lambda: struct.pack("=IIQ", self._word(), 0, self._handle())),
            (Op.SETATTR, 9, self._setattr),
            (Op.READLINK, 1, lambda: b""),
            (Op.SYMLINK, 3, lambda: self._name() + self._name()),
            (Op.MKNOD, 4, lambda: struct.pack("=IIII", self._mode(), self._word(), 18, 0)
             + self._name()),
            (Op.MKDIR, 4, lambda: struct.pack("=II", self._mode(), 18) + self._name()),
            (Op.UNLINK, 4, self._name),
            (Op.RMDIR, 3, self._name),
            (Op.RENAME, 4, lambda: struct.pack("=Q", self._folder()) + self._name() + self._name()),
            (Op.RENAME2, 6, lambda: struct.pack("=QII", self._folder(), self._flags(), 0)
             + self._name() + self._name()),
            (Op.LINK, 3, lambda: struct.pack("=Q", self._node()) + self._name()),
            (Op.CREATE, 8, lambda: struct.pack("=IIII", self._open(), self._mode(), 18, 0)
             + self._name()),
            (Op.OPEN, 5, lambda: struct.pack("=II", self._open(), self._word())),
            (Op.READ, 1, self._read),
            (Op.WRITE, 2, self._write),
            (Op.STATFS, 1, lambda: b""),
            (Op.RELEASE, 4, lambda: struct.pack("=QIIQ", self._handle(), self._word(), 0, 0)),
            (Op.FSYNC, 1, lambda: struct.pack("=QII", self._handle(), self._few(), 0)),
            (Op.FSYNCDIR, 1, lambda: struct.pack("=QII", self._handle(), self._few(), 0)),
            (Op.FLUSH, 1, lambda: struct.pack("=QIIQ", self._handle(), 0, 0, 0)),
            (Op.OPENDIR, 3, lambda: struct.pack("=II", self._open(), 0)),
            (Op.READDIR, 1, self._read),
            (Op.READDIRPLUS, 5, self._read),
            (Op.RELEASEDIR, 3, lambda: struct.pack("=QIIQ", self._handle(), 0, 0, 0)),
            (Op.FALLOCATE, 12, lambda: struct.pack(
                "=QQQII", self._handle(), self._offset(), self._offset(), self._flags(), 0)),
            (Op.LSEEK, 6, lambda: struct.pack(
                "=QQII", self._handle(), self._offset(), self._flags(), 0)),
            (Op.GETXATTR, 1, lambda: struct.pack("=II", self._few(), 0) + self._name()),
            (Op.SETXATTR, 1, lambda: struct.pack("=II", self._few(), self._few()) + self._name()),
            (Op.LISTXATTR, 1, lambda: struct.pack("=II", self._few(), 0)),
            (Op.REMOVEXATTR, 1, self._name),
            (Op.ACCESS, 1, lambda: struct.pack("=II", self._word(), 0)),
            (Op.POLL, 1, lambda: struct.pack(
                "=QQII", self._handle(), self._edge(), self._few(), self._word())),
            (Op.IOCTL, 1, lambda: struct.pack(
                "=QIIQII", self._handle(), self._few(), self._word(), self._edge(), 0, 0)),
            (Op.INTERRUPT, 2, lambda: struct.pack("=Q", self._meant())),
            (Op.COPY_FILE_RANGE, 1, lambda: struct.pack(
                "=7Q", self._handle(), self._offset(), self._node(), self._handle(),
                self._offset(), self._offset(), self._few())),
            (Op.BMAP, 1, lambda: struct.pack("=QII", self._edge(), PAGE, 0)),
            (Op.STATX, 1, lambda: struct.pack("=IIQII", 0, 0, self._handle(), 0, self._word())),
        ):  # fmt: skip
            self._makers.append((op, maker))
            weights.append(weight)
        rare = (
            Op.INIT, Op.CUSE_INIT, Op.GETLK, Op.SETLK, Op.SETLKW, Op.NOTIFY_REPLY, Op.SETUPMAPPING,
            Op.REMOVEMAPPING, Op.SYNCFS, Op.TMPFILE, Op.COPY_FILE_RANGE_64,
        )  # fmt: skip
        self._makers += [(op, self._noise) for op in rare]
        weights += [1 for _ in rare]
        self._weights = weights

    def next(self) -> bytes:
        """Return one message; one in eight is damaged."""
        if self._one_in(40):
            return self._message(self._opcode(), self._node(), self._noise())
        ((op, maker),) = self.random.choices(self._makers, self._weights)
        nodeid = self._folder() if op in _IN_FOLDERS else self._node()
        message = self._message(op, nodeid, maker())
        return self._damaged(message) if self._one_in(8) else message

    def learn(self, op: int, body: bytes) -> None:
        """Take up what a good answer tells: inodes and handles to come back to."""
        if op in (Op.OPEN, Op.OPENDIR):
            (handle,) = struct.unpack_from("=Q", body)
            self.handles = [*self.handles[-20:], handle]
        elif op in _MAKES:
            found = Attributes.unpack(body[40:])
            kinds = {S_IFDIR: self.folders, S_IFREG: self.files}
            pool = kinds.get(found.mode & S_IFMT, self.others)
            pool[:] = [pool[0], *pool[-12:], found.ino]

    def cuts(self) -> Iterator[bytes]:
        """Yield one message of each kind, cut at every byte behind its header."""
        for op, maker in self._makers:
            body = maker()
            for length in range(min(len(body), 120)):
                yield self._message(op, self._folder(), body[:length])

    # --- messages -----------------------------------------------------------------------------

    def _message(self, op: int, nodeid: int, body: bytes) -> bytes:
        self._unique += 2
        unique = self._unique
        if self._one_in(100):
            unique = self.random.choice([0, 1, MAX64, *self._recent])
        self._recent = [*self._recent[-8:], unique]
        length = IN.size + len(body)
        if self._one_in(50):
            length = self._word()
        caller = (self._word() if self._one_in(20) else 0 for _ in range(3))
        return IN.pack(length, op, unique, nodeid, *caller, 0, 0) + body

    def _damaged(self, message: bytes) -> bytes:
        header, body = message[: IN.size], message[IN.size :]
        match self.random.randrange(5):
            case 0:
                return header + body[: self.random.randrange(len(body) + 1)]
            case 1:
                return header + body + self._noise()
            case 2:
                return header + self.random.randbytes(len(body))
            case 3:
                return header + body.rstrip(b"\0")  # a name without its end
            case _:
                return header[: self.random.randrange(1, IN.size)]

    def _opcode(self) -> int:
        """Return any number but DESTROY, after which some libfuse answer EIO to everything.

        fuse_send_destroy() sends that for block devices and virtiofs only.
        """
        op = self.random.choice([self.random.randrange(70), self._word(), 1 << 31, 4095, 4097])
        return 0 if op == Op.DESTROY else op

    # --- fields -------------------------------------------------------------------------------

    def _one_in(self, times: int) -> bool:
        return self.random.randrange(times) == 0

    def _word(self) -> int:
        return self.random.choice([0, 1, 0xFFFFFFFF, self.random.getrandbits(32)])

    def _few(self) -> int:
        return self._edge() & 0xFFFFFFFF if self._one_in(6) else self.random.randrange(4)

    def _edge(self) -> int:
        return self.random.choice([*_EDGES, self.random.getrandbits(64)])

    def _offset(self) -> int:
        return self._edge() if self._one_in(3) else self.random.randrange(40) * PAGE

    def _flags(self) -> int:
        bits = self.random.choice([0, 0, 1, 2, 3, 3, 4, 8, 16, 17, 32, 64, 128, 255])
        return self._word() if self._one_in(12) else bits

    def _mode(self) -> int:
        return self.random.choice(_KINDS) | self.random.getrandbits(12)

    def _open(self) -> int:
        return self.random.choice([0, 1, 2, 0x241, 0x242, 0x4002, self._word()])

    def _node(self) -> int:
        if self._one_in(20):
            return self._edge()
        return self.random.choice(self.random.choice([self.folders, self.files, self.others]))

    def _folder(self) -> int:
        return self._node() if self._one_in(5) else self.random.choice(self.folders)

    def _handle(self) -> int:
        if self._one_in(12):
            return self._edge() if self._one_in(2) else LIVE_HANDLE + self.random.randrange(50)
        return self.random.choice(self.random.choice([self.handles, self.files]))

    def _name(self) -> bytes:
        if self._one_in(6):
            return self.random.choice([*_ODD, self.random.randbytes(9)]) + b"\0"
        return self.random.choice(_PRIVATE if self._one_in(8) else _PLAIN) + b"\0"

    def _noise(self) -> bytes:
        return self.random.randbytes(self.random.choice([0, 1, 7, 16, 64, 300, PAGE, 70_000]))

    def _meant(self) -> int:
        return self._edge() if self._one_in(3) else self.random.choice(self._recent)

    # --- bodies -------------------------------------------------------------------------------

    def _setattr(self) -> bytes:
        valid = self.random.choice(
            [1 << self.random.randrange(16), self.random.getrandbits(16), 0, self._word()]
        )
        size = self._offset() if self._one_in(2) else self.random.randrange(20) * PAGE
        times = [self._edge() for _ in range(3)]
        parts = [self.random.choice([0, 999_999_999, self._word()]) for _ in range(3)]
        return struct.pack(
            "=II6Q8I", valid, 0, self._handle(), size, self._edge(), *times, *parts,
            self._mode(), 0, self._word(), self._word(), 0,
        )  # fmt: skip

    def _batch(self) -> bytes:
        pairs = [(self._node(), self._few()) for _ in range(self.random.randrange(6))]
        count = self._word() if self._one_in(3) else len(pairs)
        return struct.pack("=II", count, 0) + b"".join(struct.pack("=QQ", *p) for p in pairs)

    def _read(self) -> bytes:
        size = self.random.choice([0, 1, 24, 200, PAGE, 1 << 20, 0xFFFFFFFF, self._word()])
        where = self._edge() if self._one_in(3) else self.random.randrange(12)
        return struct.pack(
            "=QQIIQII", self._handle(), where, size, self._word(), 0, self._word(), 0
        )

    def _write(self) -> bytes:
        data = self._noise()
        size = self._word() if self._one_in(3) else len(data)
        head = struct.pack("=QQIIQII", self._handle(), self._offset(), size, 0, 0, 0, 0)
        return head + data
