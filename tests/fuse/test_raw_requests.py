# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever comes out of /dev/fuse: the mount answers each request once, and goes on.

No kernel and no mount is needed: the test plays the kernel on a socket, and so can say what a
kernel never says. What must hold: every request has one answer in time, an answer is well formed,
no handler fails unexpectedly, the counts of statfs are those of the files, and when all is
unlinked, closed and forgotten, nothing is left.
"""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest

from tests.fuse.raw_kernel import (
    ATTR,
    ENTRY_SIZE,
    IN,
    OPEN_SIZE,
    ROOT,
    Kernel,
    Op,
    Reply,
    connected,
    hang_up,
)
from tests.fuse.raw_stream import Stream

PERSONALITIES = ["resizable", "shim", "v7", "guest_memfd"]
PAGES = 4096
BURST = 24
CHECK_EVERY = 12  # bursts
S_IFMT, S_IFREG, S_IFDIR = 0o170000, 0o100000, 0o040000

#: The bodies of good answers, in bytes; what is not here has none.
SIZES = {
    Op.LOOKUP: {ENTRY_SIZE}, Op.SYMLINK: {ENTRY_SIZE}, Op.MKNOD: {ENTRY_SIZE},
    Op.MKDIR: {ENTRY_SIZE}, Op.LINK: {ENTRY_SIZE}, Op.GETATTR: {16 + ATTR.size},
    Op.SETATTR: {16 + ATTR.size}, Op.CREATE: {ENTRY_SIZE + OPEN_SIZE}, Op.OPEN: {OPEN_SIZE},
    Op.OPENDIR: {OPEN_SIZE}, Op.STATFS: {80}, Op.LSEEK: {8}, Op.LISTXATTR: {0, 8},
}  # fmt: skip
VARIABLE = {Op.READLINK, Op.READ, Op.READDIRPLUS}
#: libfuse's own: a second INIT; a WRITE that is shorter than it says.
EIO_IS_RIGHT = {Op.INIT, Op.CUSE_INIT, Op.WRITE}
#: libfuse's own words on stderr.
LIBFUSE_SAYS = ("fuse: do_write_buf: buffer size too small",)


def check(message: bytes, reply: Reply) -> None:
    op = IN.unpack_from(message)[1]
    if reply.error:
        assert reply.error != errno.EIO or op in EIO_IS_RIGHT, Op(op)
    elif op not in VARIABLE:
        assert len(reply.body) in SIZES.get(op, {0}), Op(op)


def learn(stream: Stream, message: bytes, reply: Reply) -> None:
    """Tell the stream what there is now."""
    op = IN.unpack_from(message)[1]
    if reply.error:
        return
    if len(reply.body) >= ENTRY_SIZE and op not in VARIABLE:
        (node,) = struct.unpack_from("=Q", reply.body)
        if op in SIZES and SIZES[op] & {ENTRY_SIZE, ENTRY_SIZE + OPEN_SIZE}:
            stream.inodes = [*stream.inodes[-30:], node]
    if op in (Op.OPEN, Op.OPENDIR):
        (handle,) = struct.unpack_from("=Q", reply.body)
        stream.handles = [*stream.handles[-20:], handle]


def last_inode(kernel: Kernel) -> int:
    """Return the newest inode number: they ascend."""
    made = kernel.ask(Op.SYMLINK, ROOT, b"probe\0target\0")
    assert made.error == 0, made
    (node,) = struct.unpack_from("=Q", made.body)
    assert kernel.ask(Op.UNLINK, ROOT, b"probe\0").error == 0
    kernel.send(kernel.message(Op.FORGET, node, struct.pack("=Q", 1)))
    return int(node)


def adds_up(kernel: Kernel) -> None:
    """Assert that what statfs says is the sum of the inodes."""
    root = kernel.getattr(ROOT)
    assert root is not None
    assert (root.ino, root.mode & S_IFMT) == (ROOT, S_IFDIR)
    last = last_inode(kernel)
    alive = [found for ino in range(1, last) if (found := kernel.getattr(ino)) is not None]
    pages, free, inodes, free_inodes = kernel.statfs()
    assert 0 <= free <= pages == PAGES
    assert inodes - free_inodes == len(alive)
    used = 0
    for found in alive:
        if found.mode & S_IFMT == S_IFREG:
            assert found.blocks % 8 == 0
            assert found.size % 4096 == 0
            used += found.blocks // 8
        else:
            assert found.blocks == 0
    assert used == pages - free
    names = kernel.list(ROOT)
    assert names[b"."] == names[b".."] == ROOT
    below = [kernel.getattr(node) for name, node in names.items() if name not in (b".", b"..")]
    assert None not in below
    folders = [found for found in below if found and found.mode & S_IFMT == S_IFDIR]
    assert root.nlink == 2 + len(folders)
    quiet(kernel)


def quiet(kernel: Kernel) -> None:
    said = [line for line in kernel.log().splitlines() if line not in LIBFUSE_SAYS]
    assert not said, "the mount said:\n" + "\n".join(said)


def fuzz(kernel: Kernel, stream: Stream, bursts: int) -> None:
    for number in range(1, bursts + 1):
        sent: dict[int, list[bytes]] = {}
        for _ in range(BURST):
            message = stream.next()
            kernel.send(message)
            if len(message) >= IN.size:
                sent.setdefault(IN.unpack_from(message)[2], []).append(message)
        for unique, reply in kernel.collect().items():
            if len(sent[unique]) == 1:
                check(sent[unique][0], reply)
                learn(stream, sent[unique][0], reply)
        if number % CHECK_EVERY == 0:
            adds_up(kernel)


def remove(kernel: Kernel, ino: int) -> None:
    """Remove all that lies below a directory, which must be ours to remove."""
    for name, node in kernel.list(ino).items():
        if name in (b".", b"..") or (ino == ROOT and name == b".privfs"):
            continue
        found = kernel.getattr(node)
        assert found is not None
        folder = found.mode & S_IFMT == S_IFDIR
        if folder:
            remove(kernel, node)
        reply = kernel.ask(Op.RMDIR if folder else Op.UNLINK, ino, name + b"\0")
        assert reply.error == 0, (name, reply)


def take_all_away(kernel: Kernel, stream: Stream) -> None:
    """Unlink, close and forget everything; nothing may be left but what was there before."""
    remove(kernel, ROOT)
    for handle in range(1, 100_000):
        reply = kernel.ask(Op.RELEASEDIR, ROOT, struct.pack("=QIIQ", handle, 0, 0, 0))
        if reply.error and handle > max((h for h in stream.handles if h < 1 << 40), default=0) + 64:
            break
    for ino in range(5, last_inode(kernel)):
        while kernel.getattr(ino) is not None:
            kernel.send(kernel.message(Op.FORGET, ino, struct.pack("=Q", 1)))
            kernel.ask(Op.RELEASE, ino, struct.pack("=QIIQ", ino, 0, 0, 0))
    pages, free, inodes, free_inodes = kernel.statfs()
    assert pages == free
    assert inodes - free_inodes == 4
    quiet(kernel)


def run(place: Path, personality: str, seed: object, bursts: int) -> None:
    print(f"seed {seed!r}")
    stream = Stream(seed)
    with connected(place, personality, PAGES) as kernel:
        assert kernel.init().error == 0
        fuzz(kernel, stream, bursts)
        adds_up(kernel)
        take_all_away(kernel, stream)
        assert hang_up(kernel) == {"left": [], "files": 0}
        quiet(kernel)


@pytest.mark.parametrize("personality", PERSONALITIES)
def test_any_stream_is_answered(tmp_path: Path, personality: str) -> None:
    run(tmp_path, personality, personality, 60)
