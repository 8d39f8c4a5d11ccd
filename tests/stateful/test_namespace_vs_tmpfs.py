# SPDX-License-Identifier: GPL-2.0-or-later
"""The tree of names against a real directory on tmpfs: same errno, same tree, same link counts."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from privfs.inode import NamespaceError
from privfs.namespace import RENAME_EXCHANGE, RENAME_NOREPLACE, ROOT_INO, Namespace

PLAIN = [b"a", b"b", b"c", b"d"]
NAMES = st.sampled_from(PLAIN)
ODD_NAMES = st.sampled_from([*PLAIN, *PLAIN, b"n" * 255, b"n" * 256])
MODES = st.sampled_from([0o644, 0o755, 0o2755, 0o1777, 0])
FLAGS = st.sampled_from([0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_EXCHANGE, 3, 16])
INDEX = st.integers(0, 99)
OLD_NS = 1_000_000_000
NEW_NS = 2_000_000_000

_libc = ctypes.CDLL(None, use_errno=True)


def renameat2(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    if _libc.renameat2(old_fd, old, new_fd, new, flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@dataclass
class Place:
    """One directory on both sides; it stays usable, by number and descriptor, once removed."""

    ino: int
    fd: int


class NamespaceAgainstTmpfs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tree = Namespace(OLD_NS)
        self.umask = os.umask(0)
        base = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.path = tempfile.mkdtemp(prefix="privfs-test-", dir=base)
        self.uid, self.gid = os.geteuid(), os.getegid()
        work = self.tree.mkdir(ROOT_INO, b"work", 0o700, self.uid, self.gid, OLD_NS)
        self.places = [Place(work.ino, os.open(self.path, os.O_RDONLY))]
        os.utime(self.path, ns=(OLD_NS, OLD_NS))
        self.held: list[tuple[int, int]] = []  # open files: inode number, descriptor

    @initialize()
    def plant(self) -> None:
        """Start with a few names, so that most steps have something to work on."""
        for at, name in ((0, b"a"), (1, b"a"), (0, b"b"), (2, b"b")):
            self.mkdir(at, name, 0o755)
        for at, name in ((0, b"c"), (1, b"c"), (3, b"a")):
            self.create(at, name, 0o644, hold=name == b"c")
        self.link(0, b"c", 2, b"d")

    def teardown(self) -> None:
        for place in self.places:
            os.close(place.fd)
        for _, fd in self.held:
            os.close(fd)
        shutil.rmtree(self.path)
        os.umask(self.umask)

    def place(self, index: int) -> Place:
        return self.places[index % len(self.places)]

    def both(self, ours: Callable[[], object], theirs: Callable[[], object]) -> bool:
        """Do an operation on both sides; return whether it worked on both."""
        expected = got = 0
        try:
            theirs()
        except OSError as error:
            expected = error.errno or -1
        try:
            ours()
        except NamespaceError as error:
            got = error.errno
        assert got == expected, (os.strerror(got), os.strerror(expected))
        return expected == 0

    # ---- making

    @rule(at=INDEX, name=ODD_NAMES, mode=MODES)
    def mkdir(self, at: int, name: bytes, mode: int) -> None:
        place = self.place(at)
        made = self.both(
            lambda: self.tree.mkdir(place.ino, name, mode, self.uid, self.gid, NEW_NS),
            lambda: os.mkdir(name, mode, dir_fd=place.fd),
        )
        if made and (mode & 0o700 == 0o700 or self.uid == 0):
            ino = self.tree.lookup(place.ino, name).ino
            self.places.append(Place(ino, os.open(name, os.O_RDONLY, dir_fd=place.fd)))

    @rule(at=INDEX, name=ODD_NAMES, mode=MODES, hold=st.booleans())
    def create(self, at: int, name: bytes, mode: int, hold: bool) -> None:
        place = self.place(at)
        fds: list[int] = []
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        made = self.both(
            lambda: self.tree.create(place.ino, name, mode, self.uid, self.gid, NEW_NS),
            lambda: fds.append(os.open(name, flags, mode, dir_fd=place.fd)),
        )
        if made and hold:
            ino = self.tree.lookup(place.ino, name).ino
            self.tree.open(ino)
            self.held.append((ino, fds[0]))
        elif made:
            os.close(fds[0])

    @rule(
        at=INDEX,
        name=ODD_NAMES,
        mode=MODES,
        kind=st.sampled_from([0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFDIR]),
    )
    def mknod(self, at: int, name: bytes, mode: int, kind: int) -> None:
        place = self.place(at)
        self.both(
            lambda: self.tree.mknod(place.ino, name, kind | mode, self.uid, self.gid, NEW_NS),
            lambda: os.mknod(name, kind | mode, dir_fd=place.fd),
        )

    @rule(at=INDEX, name=ODD_NAMES, content=st.sampled_from([b"", b"x", b"t" * 4095, b"t" * 4096]))
    def symlink(self, at: int, name: bytes, content: bytes) -> None:
        place = self.place(at)
        self.both(
            lambda: self.tree.symlink(place.ino, name, content, self.uid, self.gid, NEW_NS),
            lambda: os.symlink(content, name, dir_fd=place.fd),
        )

    @rule(at=INDEX, name=NAMES, to=INDEX, new=ODD_NAMES)
    def link(self, at: int, name: bytes, to: int, new: bytes) -> None:
        old, place = self.place(at), self.place(to)
        self.both(
            lambda: self.tree.link(self.tree.lookup(old.ino, name).ino, place.ino, new, NEW_NS),
            lambda: os.link(
                name, new, src_dir_fd=old.fd, dst_dir_fd=place.fd, follow_symlinks=False
            ),
        )

    # ---- removing, renaming, changing

    @rule(at=INDEX, name=ODD_NAMES)
    def unlink(self, at: int, name: bytes) -> None:
        place = self.place(at)
        self.both(
            lambda: self.tree.unlink(place.ino, name, NEW_NS),
            lambda: os.unlink(name, dir_fd=place.fd),
        )

    @rule(at=INDEX, name=ODD_NAMES)
    def rmdir(self, at: int, name: bytes) -> None:
        place = self.place(at)
        self.both(
            lambda: self.tree.rmdir(place.ino, name, NEW_NS),
            lambda: os.rmdir(name, dir_fd=place.fd),
        )

    @rule(at=INDEX, old=ODD_NAMES, to=INDEX, new=ODD_NAMES, flags=FLAGS)
    def rename(self, at: int, old: bytes, to: int, new: bytes, flags: int) -> None:
        source, goal = self.place(at), self.place(to)
        self.both(
            lambda: self.tree.rename(source.ino, old, goal.ino, new, flags, NEW_NS),
            lambda: renameat2(source.fd, old, goal.fd, new, flags),
        )

    @rule(at=INDEX, old=NAMES, to=INDEX, new=NAMES, exchange=st.booleans())
    def move(self, at: int, old: bytes, to: int, new: bytes, exchange: bool) -> None:
        self.rename(at, old, to, new, RENAME_EXCHANGE if exchange else 0)

    @rule(at=INDEX, mode=st.sampled_from([0o700, 0o2755, 0o1777]), other=st.booleans())
    def change_directory(self, at: int, mode: int, other: bool) -> None:
        place = self.place(at)
        gid = 12345 if other and self.uid == 0 else self.gid
        os.fchown(place.fd, -1, gid)
        os.fchmod(place.fd, mode)
        self.tree.setattr(place.ino, NEW_NS, gid=gid)
        self.tree.setattr(place.ino, NEW_NS, mode=mode)

    # ---- the same tree?

    @invariant()
    def trees_agree(self) -> None:
        for place in self.places:
            theirs, ours = os.fstat(place.fd), self.tree.attributes(place.ino)
            assert ours.nlink == theirs.st_nlink
            assert ours.st_mode == theirs.st_mode
            assert ours.gid == theirs.st_gid
            # Both clocks were set back after the step before: was the directory changed?
            assert (ours.mtime_ns == OLD_NS) == (theirs.st_mtime_ns == OLD_NS)
            self.tree.setattr(place.ino, OLD_NS, mtime_ns=OLD_NS)
            os.utime(place.fd, ns=(OLD_NS, OLD_NS))
            if theirs.st_nlink:
                self.listings_agree(place)
        for ino, fd in self.held:
            assert self.tree.attributes(ino).nlink == os.fstat(fd).st_nlink

    def listings_agree(self, place: Place) -> None:
        listing = self.tree.readdir(place.ino)
        assert [entry.name for entry in listing[:2]] == [b".", b".."]
        assert sorted(entry.name for entry in listing[2:]) == sorted(
            os.fsencode(name) for name in os.listdir(place.fd)
        )
        assert self.tree.lookup(place.ino, b"..").ino == listing[1].ino
        above = self.tree.attributes(listing[1].ino)
        if place is not self.places[0]:
            assert above.nlink == os.stat("..", dir_fd=place.fd).st_nlink
        for entry in listing[2:]:
            ours = self.tree.attributes(entry.ino)
            theirs = os.stat(entry.name, dir_fd=place.fd, follow_symlinks=False)
            assert ours.st_mode == theirs.st_mode
            assert entry.kind.value == stat.S_IFMT(theirs.st_mode)
            assert (ours.nlink, ours.uid, ours.gid) == (
                theirs.st_nlink,
                theirs.st_uid,
                theirs.st_gid,
            )
            if stat.S_ISLNK(theirs.st_mode):
                assert self.tree.readlink(entry.ino) == os.readlink(entry.name, dir_fd=place.fd)


TestNamespaceAgainstTmpfs = NamespaceAgainstTmpfs.TestCase
TestNamespaceAgainstTmpfs.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
