# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import stat
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfs.inode import Kind, NamespaceError
from privfs.namespace import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    ROOT_INO,
    Namespace,
    Removal,
)
from privfs.naming import RESERVED_NAME

UID, GID = 1000, 100


class Tree:
    """A Namespace with a clock that ticks and short ways to say things."""

    def __init__(self, limit: int = 1000) -> None:
        self.now = 1
        self.names = Namespace(self.now, limit=limit)

    def tick(self) -> int:
        self.now += 1
        return self.now

    def file(self, name: bytes, parent: int = ROOT_INO, mode: int = 0o644) -> int:
        return self.names.create(parent, name, mode, UID, GID, self.tick()).ino

    def dir(self, name: bytes, parent: int = ROOT_INO, mode: int = 0o755) -> int:
        return self.names.mkdir(parent, name, mode, UID, GID, self.tick()).ino

    def listing(self, ino: int = ROOT_INO) -> list[bytes]:
        hidden = (b".", b"..", RESERVED_NAME)
        return [e.name for e in self.names.readdir(ino) if e.name not in hidden]

    def snapshot(self) -> object:
        """Everything there is to see, to show that a refusal changed nothing."""
        seen = []
        todo = [ROOT_INO]
        while todo:
            entries = self.names.readdir(todo.pop())
            seen.append((entries, [self.names.attributes(e.ino) for e in entries]))
            todo += [e.ino for e in entries[2:] if e.kind is Kind.DIRECTORY]
        return seen, self.names.inode_count


@pytest.fixture
def tree() -> Tree:
    return Tree()


def refused(code: int, call: Callable[[], object]) -> NamespaceError:
    with pytest.raises(NamespaceError) as caught:
        call()
    assert caught.value.errno == code
    assert errno.errorcode[code] in str(caught.value)
    return caught.value


def test_a_new_tree_has_a_root_and_the_reserved_directory(tree: Tree) -> None:
    root = tree.names.attributes(ROOT_INO)
    assert (root.st_mode, root.nlink) == (stat.S_IFDIR | 0o755, 3)
    reserved = tree.names.lookup(ROOT_INO, RESERVED_NAME)
    assert reserved.ino == tree.names.reserved_ino
    assert tree.names.inode_count == 2
    assert tree.names.lookup(ROOT_INO, b"..").ino == ROOT_INO


def test_create_answers_with_attributes_and_times(tree: Tree) -> None:
    made = tree.names.create(ROOT_INO, b"f", 0o100640, UID, GID, 77)
    assert (made.kind, made.mode, made.uid, made.gid, made.nlink) == (
        Kind.FILE,
        0o640,
        UID,
        GID,
        1,
    )
    assert made.atime_ns == made.mtime_ns == made.ctime_ns == 77
    root = tree.names.attributes(ROOT_INO)
    assert root.mtime_ns == root.ctime_ns == 77
    assert root.atime_ns == 1


def test_an_inode_lives_until_name_lookup_and_handle_are_gone(tree: Tree) -> None:
    ino = tree.file(b"f")
    tree.names.open(ino)
    tree.names.lookup(ROOT_INO, b"f")
    assert tree.names.unlink(ROOT_INO, b"f", tree.tick()) == Removal(ino, 0, ())
    assert tree.names.forget(ino, 2) == ()
    assert tree.names.attributes(ino).nlink == 0
    assert tree.names.release(ino) == (ino,)
    refused(errno.ESTALE, lambda: tree.names.attributes(ino))


def test_the_last_forget_or_the_unlink_itself_can_be_the_end(tree: Tree) -> None:
    first, second = tree.file(b"1"), tree.file(b"2")
    assert tree.names.unlink(ROOT_INO, b"1", tree.tick()).dead == ()
    assert tree.names.forget(first, 1) == (first,)
    assert tree.names.forget(second, 1) == ()
    assert tree.names.unlink(ROOT_INO, b"2", tree.tick()).dead == (second,)
    assert tree.file(b"3") > second


def test_rename_over_a_file_tells_of_the_end_of_it(tree: Tree) -> None:
    old, new = tree.file(b"old"), tree.file(b"new")
    tree.names.forget(new, 1)
    assert tree.names.rename(ROOT_INO, b"old", ROOT_INO, b"new", 0, tree.tick()) == Removal(
        new, 0, (new,)
    )
    assert tree.names.lookup(ROOT_INO, b"new").ino == old


def test_too_many_forgets_and_releases_are_refused(tree: Tree) -> None:
    ino = tree.file(b"f")
    refused(errno.EINVAL, lambda: tree.names.forget(ino, 2))
    refused(errno.EBADF, lambda: tree.names.release(ino))
    tree.names.unlink(ROOT_INO, b"f", tree.tick())
    assert tree.names.forget(ino, 1) == (ino,)
    refused(errno.ESTALE, lambda: tree.names.forget(ino, 1))


def test_a_directory_that_replaces_an_empty_one(tree: Tree) -> None:
    a, b = tree.dir(b"a"), tree.dir(b"b")
    inner = tree.dir(b"inner", a)
    victim = tree.dir(b"victim", b)
    removal = tree.names.rename(a, b"inner", b, b"victim", 0, tree.tick())
    assert removal == Removal(victim, 0, ())
    assert tree.names.attributes(a).nlink == 2
    assert tree.names.attributes(b).nlink == 3
    assert tree.names.lookup(inner, b"..").ino == b
    refused(errno.ENOENT, lambda: tree.file(b"x", victim))
    refused(errno.ENOENT, lambda: tree.names.readdir(victim))


def test_exchange_moves_the_links_of_a_directory(tree: Tree) -> None:
    a, b = tree.dir(b"a"), tree.dir(b"b")
    inner, file = tree.dir(b"x", a), tree.file(b"y", b)
    assert tree.names.rename(a, b"x", b, b"y", RENAME_EXCHANGE, tree.tick()) is None
    assert (tree.names.attributes(a).nlink, tree.names.attributes(b).nlink) == (2, 3)
    assert tree.names.lookup(inner, b"..").ino == b
    assert tree.names.lookup(a, b"x").ino == file
    assert tree.names.rename(a, b"x", b, b"y", RENAME_EXCHANGE, tree.tick()) is None
    assert (tree.names.attributes(a).nlink, tree.names.attributes(b).nlink) == (3, 2)
    assert tree.names.lookup(inner, b"..").ino == a


def test_the_set_group_id_bit_is_inherited(tree: Tree) -> None:
    shared = tree.dir(b"shared")
    tree.names.setattr(shared, tree.tick(), mode=0o2775, gid=55)
    inner = tree.names.attributes(tree.dir(b"d", shared, 0o4755))
    assert (inner.mode, inner.gid) == (0o2755, 55)
    assert tree.names.attributes(tree.file(b"f", shared)).gid == 55


def test_setattr_changes_what_is_given_and_ctime(tree: Tree) -> None:
    ino = tree.file(b"f")
    before = tree.names.attributes(ino)
    after = tree.names.setattr(ino, 500, mtime_ns=3)
    assert (after.mtime_ns, after.ctime_ns, after.atime_ns) == (3, 500, before.atime_ns)
    after = tree.names.setattr(ino, 501, mode=0o107777, uid=1, gid=2, atime_ns=9)
    assert (after.mode, after.uid, after.gid, after.atime_ns) == (0o7777, 1, 2, 9)
    assert after.kind is Kind.FILE
    after = tree.names.modified(ino, 502)
    assert (after.mtime_ns, after.ctime_ns, after.atime_ns) == (502, 502, 9)


@pytest.mark.parametrize(
    ("mode", "code"),
    [
        (stat.S_IFCHR, errno.EPERM),
        (stat.S_IFBLK, errno.EPERM),
        (stat.S_IFDIR, errno.EPERM),
        (stat.S_IFLNK, errno.EINVAL),
    ],
)
def test_mknod_makes_no_devices(tree: Tree, mode: int, code: int) -> None:
    refused(code, lambda: tree.names.mknod(ROOT_INO, b"x", mode | 0o600, UID, GID, 9))


@pytest.mark.parametrize(
    ("st_mode", "kind"),
    [(0o600, Kind.FILE), (stat.S_IFIFO | 0o600, Kind.FIFO), (stat.S_IFSOCK | 0o600, Kind.SOCKET)],
)
def test_mknod_kinds(tree: Tree, st_mode: int, kind: Kind) -> None:
    made = tree.names.mknod(ROOT_INO, b"x", st_mode, UID, GID, 9)
    assert (made.kind, made.mode) == (kind, 0o600)


def test_the_reserved_directory_is_the_mount_s_own(tree: Tree) -> None:
    names, reserved = tree.names, tree.names.reserved_ino
    socket = names.mknod(reserved, b"socket", stat.S_IFSOCK | 0o666, 0, 0, 5, trusted=True).ino
    inner = names.mkdir(reserved, b"d", 0o755, 0, 0, 5, trusted=True).ino
    file = tree.file(b"f")
    before = tree.snapshot()
    for call in (
        lambda: tree.file(b"x", reserved),
        lambda: tree.dir(b"x", reserved),
        lambda: tree.file(b"x", inner),
        lambda: names.symlink(reserved, b"x", b"t", UID, GID, 9),
        lambda: names.mknod(reserved, b"x", stat.S_IFIFO, UID, GID, 9),
        lambda: names.link(file, reserved, b"x", 9),
        lambda: names.link(socket, ROOT_INO, b"x", 9),
        lambda: names.unlink(reserved, b"socket", 9),
        lambda: names.rmdir(reserved, b"d", 9),
        lambda: names.rmdir(ROOT_INO, RESERVED_NAME, 9),
        lambda: names.rmdir(ROOT_INO, RESERVED_NAME, 9, trusted=True),
        lambda: names.rename(ROOT_INO, RESERVED_NAME, ROOT_INO, b"x", 0, 9),
        lambda: names.rename(ROOT_INO, b"f", reserved, b"x", 0, 9),
        lambda: names.rename(ROOT_INO, b"f", reserved, b"socket", 0, 9),
        lambda: names.rename(ROOT_INO, b"f", reserved, b"socket", RENAME_EXCHANGE, 9),
        lambda: names.rename(ROOT_INO, b"f", ROOT_INO, RESERVED_NAME, RENAME_EXCHANGE, 9),
        lambda: names.rename(reserved, b"socket", ROOT_INO, b"x", 0, 9),
    ):
        refused(errno.EPERM, call)
    refused(errno.EEXIST, lambda: tree.dir(RESERVED_NAME))
    assert tree.snapshot() == before
    assert names.is_reserved(socket)
    assert not names.is_reserved(file)
    names.unlink(reserved, b"socket", 9, trusted=True)
    names.rmdir(reserved, b"d", 9, trusted=True)


def test_refusals_change_nothing(tree: Tree) -> None:
    names = tree.names
    a, f = tree.dir(b"a"), tree.file(b"f")
    b = tree.dir(b"b", a)
    gone = tree.file(b"gone")
    names.unlink(ROOT_INO, b"gone", tree.tick())
    before = tree.snapshot()
    for code, call in (
        (errno.ENOENT, lambda: names.lookup(ROOT_INO, b"nothing")),
        (errno.ENOTDIR, lambda: names.lookup(f, b"x")),
        (errno.ENAMETOOLONG, lambda: tree.file(b"n" * 256)),
        (errno.EINVAL, lambda: tree.file(b"a/b")),
        (errno.EINVAL, lambda: tree.dir(b"..")),
        (errno.EEXIST, lambda: tree.file(b"a")),
        (errno.EISDIR, lambda: names.unlink(ROOT_INO, b"a", 9)),
        (errno.ENOTDIR, lambda: names.rmdir(ROOT_INO, b"f", 9)),
        (errno.ENOTEMPTY, lambda: names.rmdir(ROOT_INO, b"a", 9)),
        (errno.EPERM, lambda: names.link(a, ROOT_INO, b"x", 9)),
        (errno.ENOENT, lambda: names.link(gone, ROOT_INO, b"x", 9)),
        (errno.EINVAL, lambda: names.readlink(f)),
        (errno.EINVAL, lambda: names.rename(ROOT_INO, b"a", b, b"x", 0, 9)),
        (errno.ENOTEMPTY, lambda: names.rename(a, b"b", ROOT_INO, b"a", 0, 9)),
        (errno.ENOTDIR, lambda: names.rename(ROOT_INO, b"a", ROOT_INO, b"f", 0, 9)),
        (errno.EISDIR, lambda: names.rename(ROOT_INO, b"f", ROOT_INO, b"a", 0, 9)),
        (errno.EEXIST, lambda: names.rename(ROOT_INO, b"f", a, b"b", RENAME_NOREPLACE, 9)),
        (errno.ENOENT, lambda: names.rename(ROOT_INO, b"f", a, b"x", RENAME_EXCHANGE, 9)),
        (errno.EINVAL, lambda: names.rename(ROOT_INO, b"f", a, b"x", 4, 9)),
        (errno.ENOENT, lambda: names.symlink(ROOT_INO, b"s", b"", UID, GID, 9)),
    ):
        refused(code, call)
        assert tree.snapshot() == before


def test_the_inode_limit_is_enospc() -> None:
    tree = Tree(limit=3)
    tree.file(b"f")
    refused(errno.ENOSPC, lambda: tree.file(b"g"))
    assert tree.listing() == [b"f"]
    tree.names.forget(tree.names.unlink(ROOT_INO, b"f", 9).ino, 1)
    tree.file(b"g")


def test_a_scan_goes_on_behind_its_cookie(tree: Tree) -> None:
    for name in (b"1", b"2", b"3", b"4"):
        tree.file(name)
    first = tree.names.readdir(ROOT_INO, 0, 4)
    assert [e.name for e in first] == [b".", b"..", RESERVED_NAME, b"1"]
    tree.names.unlink(ROOT_INO, b"1", tree.tick())
    tree.names.unlink(ROOT_INO, b"3", tree.tick())
    assert [e.name for e in tree.names.readdir(ROOT_INO, first[-1].cookie)] == [b"2", b"4"]
    assert [e.name for e in tree.names.readdir(ROOT_INO, 1, 1)] == [b".."]


def test_a_rename_in_place_is_not_met_again(tree: Tree) -> None:
    """A loop that renames what it reads must end."""
    tree.file(b"1")
    tree.file(b"2")
    cookie = tree.names.readdir(ROOT_INO)[2].cookie
    seen = []
    while entries := tree.names.readdir(ROOT_INO, cookie, 1):
        seen.append(entries[0].name)
        assert len(seen) < 10
        cookie = entries[0].cookie
        tree.names.rename(ROOT_INO, entries[0].name, ROOT_INO, b"new" + entries[0].name, 0, 9)
    assert seen == [b"1", b"2"]


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "rename"]), st.integers(0, 5), st.integers(0, 5)),
    max_size=8,
)


@given(st.sets(st.integers(0, 5)), st.lists(STEPS, max_size=8), st.integers(1, 3))
def test_what_stays_is_seen_once(
    start: set[int], rounds: list[list[tuple[str, int, int]]], count: int
) -> None:
    """Names 10.. are never touched; a scan meets each exactly once among any changes."""
    tree = Tree()
    for number in range(6):
        if number in start:
            tree.file(b"%d" % number)
        tree.file(b"%d" % (10 + number))
    end = tree.names.last_cookie(ROOT_INO)
    cookie, seen = 0, []
    pending = iter(rounds)
    while entries := tree.names.readdir(ROOT_INO, cookie, count):
        entries = [e for e in entries if e.cookie <= end]
        if not entries:
            break
        seen += [e.name for e in entries]
        cookie = entries[-1].cookie
        for what, one, other in next(pending, []):
            name, new = b"%d" % one, b"%d" % other
            try:
                if what == "add":
                    tree.file(name)
                elif what == "remove":
                    tree.names.unlink(ROOT_INO, name, 9)
                else:
                    tree.names.rename(ROOT_INO, name, ROOT_INO, new, 0, 9)
            except NamespaceError:
                continue  # no such name, or it is taken
    assert [n for n in seen if len(n) == 2 and n != b".."] == [b"%d" % n for n in range(10, 16)]


def test_readdir_counts_no_lookup_and_remember_does(tree: Tree) -> None:
    ino = tree.file(b"f")
    tree.names.readdir(ROOT_INO)
    tree.names.remember(ino)
    tree.names.unlink(ROOT_INO, b"f", tree.tick())
    assert tree.names.forget(ino, 1) == ()
    assert tree.names.forget(ino, 1) == (ino,)
