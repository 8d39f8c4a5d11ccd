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
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.raw_kernel import (
    ATTR,
    ENTRY_SIZE,
    IN,
    OPEN_SIZE,
    ROOT,
    S_IFDIR,
    S_IFMT,
    S_IFREG,
    Attributes,
    Kernel,
    Op,
    Reply,
    connected,
    hang_up,
)
from tests.fuse.raw_stream import Stream

MOUNTS = [
    ("resizable", "direct_io"),
    ("shim", "passthrough"),  # which no socket has: the mount falls back
    ("v7", "passthrough+direct_io"),
    ("guest_memfd", "direct_io"),
]
PAGES = 4096
BURST = 24
CHECK_EVERY, SUM_EVERY = 5, 100

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


def check(kernel: Kernel, message: bytes, reply: Reply) -> None:
    op = IN.unpack_from(message)[1]
    if reply.error:
        assert reply.error != errno.EIO or op in EIO_IS_RIGHT, (op, message, kernel.log())
    elif op not in VARIABLE:
        assert len(reply.body) in SIZES.get(op, {0}), Op(op)


def last_inode(kernel: Kernel) -> int:
    """Return the newest inode number: they ascend."""
    made = kernel.ask(Op.SYMLINK, ROOT, b"probe\0target\0")
    assert made.error == 0, made
    (node,) = struct.unpack_from("=Q", made.body)
    assert kernel.ask(Op.UNLINK, ROOT, b"probe\0").error == 0
    kernel.send(kernel.message(Op.FORGET, node, struct.pack("=Q", 1)))
    return int(node)


def alive(kernel: Kernel) -> Attributes:
    """Assert that the root is there and statfs within bounds; return the root's attributes."""
    root = kernel.getattr(ROOT)
    assert root is not None
    assert (root.ino, root.mode & S_IFMT) == (ROOT, S_IFDIR)
    pages, free, inodes, free_inodes = kernel.statfs()
    assert 0 <= free <= pages == PAGES
    assert inodes - free_inodes >= 4
    return root


def adds_up(kernel: Kernel) -> None:
    """Assert that what statfs says is the sum of the inodes."""
    root = alive(kernel)
    last = last_inode(kernel)
    there = [found for ino in range(1, last) if (found := kernel.getattr(ino)) is not None]
    pages, free, inodes, free_inodes = kernel.statfs()
    assert inodes - free_inodes == len(there)
    used = 0
    for found in there:
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
                check(kernel, sent[unique][0], reply)
                if not reply.error:
                    stream.learn(IN.unpack_from(sent[unique][0])[1], reply.body)
        if number % SUM_EVERY == 0:
            adds_up(kernel)
        elif number % CHECK_EVERY == 0:
            alive(kernel)


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


def run(place: Path, personality: str, mode: str, seed: object, bursts: int) -> None:
    print(f"seed {seed!r}")
    stream = Stream(seed)
    with connected(place, personality, PAGES, mode) as kernel:
        assert kernel.init().error == 0
        fuzz(kernel, stream, bursts)
        adds_up(kernel)
        take_all_away(kernel, stream)
        assert hang_up(kernel) == {"left": [], "files": 0}
        quiet(kernel)


@pytest.mark.parametrize(("personality", "mode"), MOUNTS)
def test_any_stream_is_answered(tmp_path: Path, personality: str, mode: str) -> None:
    run(tmp_path, personality, mode, personality, 400)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("personality", "mode"), MOUNTS)
def test_many_streams_are_answered(tmp_path: Path, personality: str, mode: str, seed: int) -> None:
    run(tmp_path, personality, mode, seed, 1500)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    """A fresh mount, which must end in order and without a word."""
    with connected(tmp_path, "resizable", PAGES) as made:
        assert made.init().error == 0
        yield made
        hang_up(made)
        quiet(made)


def test_a_message_may_end_anywhere(kernel: Kernel) -> None:
    for message in Stream("cuts").cuts():
        kernel.send(message)
        kernel.collect()
    adds_up(kernel)


def test_nobody_is_answered_who_cannot_be_named(kernel: Kernel) -> None:
    message = kernel.message(Op.GETATTR, ROOT, bytes(16))
    for length in range(1, IN.size):
        kernel.send(message[:length])
    adds_up(kernel)


def created(kernel: Kernel, name: bytes) -> int:
    reply = kernel.ask(Op.CREATE, ROOT, struct.pack("=IIII", 2, 0o600, 0, 0) + name + b"\0")
    assert reply.error == 0
    (node,) = struct.unpack_from("=Q", reply.body)
    return int(node)


def test_a_read_that_waits_is_interrupted_and_no_other(kernel: Kernel) -> None:
    ino = created(kernel, b"file")
    body = struct.pack("=QQIIQII", ino, 0, 4096, 0, 0, 0, 0)
    reads = [kernel.message(Op.READ, ino, body) for _ in range(40)]  # 20 ms each
    for message in reads:
        kernel.send(message)
    uniques = [IN.unpack_from(message)[2] for message in reads]
    kernel.send(kernel.message(Op.INTERRUPT, 0, struct.pack("=Q", 1)))
    kernel.send(kernel.message(Op.INTERRUPT, 0, struct.pack("=Q", uniques[-1])))
    found = kernel.collect()
    assert found.pop(uniques[-1]).error == errno.EINTR
    assert {reply.error for reply in found.values()} == {errno.EINVAL}


def test_a_forget_that_is_refused_does_not_hold_up_the_others(kernel: Kernel) -> None:
    ino = created(kernel, b"file")
    assert kernel.ask(Op.UNLINK, ROOT, b"file\0").error == 0
    assert kernel.ask(Op.RELEASE, ino, struct.pack("=QIIQ", ino, 0, 0, 0)).error == 0
    pairs = [(ino, 2), (99, 1), (ROOT, 1 << 63), (ino, 1)]
    body = struct.pack("=II", 1 << 31, 0) + b"".join(struct.pack("=QQ", *pair) for pair in pairs)
    kernel.send(kernel.message(Op.BATCH_FORGET, 0, body))
    assert kernel.getattr(ino) is None
    adds_up(kernel)


def test_opendir_of_a_file_does_not_keep_it(kernel: Kernel) -> None:
    ino = created(kernel, b"file")
    assert kernel.ask(Op.OPENDIR, ino, bytes(8)).error == errno.ENOTDIR
    assert kernel.ask(Op.RELEASE, ino, struct.pack("=QIIQ", ino, 0, 0, 0)).error == 0
    assert kernel.ask(Op.UNLINK, ROOT, b"file\0").error == 0
    kernel.send(kernel.message(Op.FORGET, ino, struct.pack("=Q", 1)))
    assert kernel.getattr(ino) is None


def test_a_write_without_its_header_is_refused(kernel: Kernel) -> None:
    """Libfuse would subtract the header from the size, and copy 4 GiB."""
    body = struct.pack("=QQI", 3, 0, 0xFFFFFFFF)
    assert kernel.ask(Op.WRITE, 3, body).error == errno.EIO
    adds_up(kernel)


def test_a_relay_may_hang_up_at_any_time(tmp_path: Path) -> None:
    with connected(tmp_path, "resizable", PAGES) as kernel:
        assert kernel.init().error == 0
        ino = created(kernel, b"file")
        body = struct.pack("=QQIIQII", ino, 0, 4096, 0, 0, 0, 0)
        for _ in range(5):
            kernel.sock.send(kernel.message(Op.READ, ino, body))
        assert hang_up(kernel)["left"] == []
        assert "Traceback" not in kernel.log()


def test_destroy_is_the_end(kernel: Kernel) -> None:
    """Later releases of libfuse than 3.14 answer EIO to all that comes after it."""
    assert kernel.ask(Op.DESTROY, 0).error == 0
    assert kernel.ask(Op.GETATTR, ROOT, bytes(16)).error in (0, errno.EIO)


@pytest.mark.parametrize("cut", [0, 4, 8])
def test_an_init_of_no_version_is_refused(tmp_path: Path, cut: int) -> None:
    with connected(tmp_path, "resizable", PAGES) as kernel:
        body = struct.pack("=IIII", 6, 38, 0, 0)[:cut]
        kernel.sock.send(kernel.message(Op.INIT, 0, body))
        assert kernel.process.wait(10) == 1
        assert "the FUSE INIT exchange failed (Protocol error)" in kernel.log()


def test_what_is_no_init_is_refused(tmp_path: Path) -> None:
    with connected(tmp_path, "resizable", PAGES) as kernel:
        kernel.sock.send(kernel.message(Op.GETATTR, ROOT, bytes(16)))
        assert kernel.process.wait(10) == 1
        assert "the FUSE INIT exchange failed (Protocol error)" in kernel.log()
