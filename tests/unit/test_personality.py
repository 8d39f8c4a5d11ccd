# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno

import pytest

from privfs.personality import (
    GUEST_MEMFD,
    MAX_BYTES,
    MAX_LFS_FILESIZE,
    PAGE_SIZE,
    PERSONALITIES,
    RESIZABLE,
    Action,
    Personality,
    Refused,
    Resizing,
    fallocate_rule,
    metadata_rule,
    resize_rule,
)

P = PAGE_SIZE
SIZE = 8 * P
KEEP, PUNCH, HIDE_STALE, COLLAPSE, ZERO, INSERT, UNSHARE = 1, 2, 4, 8, 16, 32, 64
OK_ALLOCATE, OK_PUNCH, OK_ZERO = Action.ALLOCATE, Action.PUNCH, Action.ZERO
EINVAL, EFBIG, EOPN = errno.EINVAL, errno.EFBIG, errno.EOPNOTSUPP


def answer(who: Personality, mode: int, offset: int, length: int, size: int = SIZE) -> object:
    try:
        return fallocate_rule(who, mode, offset, length, size).action
    except Refused as refused:
        return refused.errno


# mode, offset, length, resizable, guest_memfd (measured on Linux 6.18)
GRID = [
    # allocation, any alignment, in the file
    (0, 0, P, OK_ALLOCATE, EOPN),
    (0, 1, 1, OK_ALLOCATE, EOPN),
    (0, P - 1, 2, OK_ALLOCATE, EOPN),
    # beyond the end of the file it grows, to whole pages only
    (0, SIZE, P, OK_ALLOCATE, EOPN),
    (0, SIZE - P, 2 * P, OK_ALLOCATE, EOPN),
    (0, 0, SIZE + 1, EINVAL, EOPN),
    (0, SIZE + 1, P - 1, OK_ALLOCATE, EOPN),
    (0, 0, MAX_BYTES, OK_ALLOCATE, EOPN),
    (0, 0, MAX_BYTES + P, EFBIG, EOPN),
    # KEEP_SIZE
    (KEEP, 0, P, OK_ALLOCATE, OK_ALLOCATE),
    (KEEP, 0, SIZE, OK_ALLOCATE, OK_ALLOCATE),
    (KEEP, 1, P, OK_ALLOCATE, EINVAL),
    (KEEP, 0, 100, OK_ALLOCATE, EINVAL),
    (KEEP, SIZE, P, EINVAL, EINVAL),
    (KEEP, SIZE - P, 2 * P, EINVAL, EINVAL),
    (KEEP, MAX_BYTES, P, EINVAL, EINVAL),
    # PUNCH_HOLE is fine at, after and across the end
    (PUNCH | KEEP, 0, P, OK_PUNCH, OK_PUNCH),
    (PUNCH | KEEP, SIZE, P, OK_PUNCH, OK_PUNCH),
    (PUNCH | KEEP, SIZE - P, 2 * P, OK_PUNCH, OK_PUNCH),
    (PUNCH | KEEP, 0, 2**63 - P, OK_PUNCH, OK_PUNCH),
    (PUNCH | KEEP, 2**62, P, OK_PUNCH, OK_PUNCH),
    (PUNCH | KEEP, 1, P, EINVAL, EINVAL),
    (PUNCH | KEEP, 0, 100, EINVAL, EINVAL),
    (PUNCH | KEEP, SIZE + 1, P, EINVAL, EINVAL),
    # ZERO_RANGE
    (ZERO, 0, P, OK_ZERO, EOPN),
    (ZERO, SIZE, P, OK_ZERO, EOPN),
    (ZERO, 1, P, EINVAL, EOPN),
    (ZERO | KEEP, 0, P, OK_ZERO, EOPN),
    (ZERO | KEEP, SIZE, P, EINVAL, EOPN),
    (ZERO, 0, MAX_BYTES + P, EFBIG, EOPN),
    # nothing else exists
    (PUNCH, 0, P, EOPN, EOPN),
    (HIDE_STALE, 0, P, EOPN, EOPN),
    (COLLAPSE, 0, P, EOPN, EOPN),
    (INSERT, 0, P, EOPN, EOPN),
    (UNSHARE, 0, P, EOPN, EOPN),
    (UNSHARE | KEEP, 0, P, EOPN, EOPN),
    (PUNCH | ZERO | KEEP, 0, P, EOPN, EOPN),
    (1 << 30, 0, P, EOPN, EOPN),
    # the order of the checks: empty or negative beats the mode, the mode beats the rest,
    # s_maxbytes beats alignment
    (COLLAPSE, 0, 0, EINVAL, EINVAL),
    (0, 0, 0, EINVAL, EINVAL),
    (0, -P, P, EINVAL, EINVAL),
    (KEEP, 0, -1, EINVAL, EINVAL),
    (COLLAPSE, 1, 1, EOPN, EOPN),
    (KEEP, MAX_LFS_FILESIZE - 1, 2, EFBIG, EFBIG),
    (PUNCH | KEEP, MAX_LFS_FILESIZE, P, EFBIG, EFBIG),
    (PUNCH | KEEP, MAX_LFS_FILESIZE - P + 1, P, EFBIG, EFBIG),
]


@pytest.mark.parametrize(("mode", "offset", "length", "resizable", "gmem"), GRID)
def test_every_fallocate_answers_as_its_table_says(
    mode: int, offset: int, length: int, resizable: object, gmem: object
) -> None:
    assert answer(RESIZABLE, mode, offset, length) == resizable
    assert answer(GUEST_MEMFD, mode, offset, length) == gmem


@pytest.mark.parametrize(
    ("size", "new", "resizable", "gmem"),
    [
        (0, 0, 0, 0),
        (0, SIZE, 0, 0),
        (0, 1, EINVAL, EINVAL),
        (0, -P, EINVAL, EINVAL),
        (0, MAX_BYTES, 0, 0),
        (0, MAX_BYTES + P, EFBIG, EFBIG),
        (SIZE, SIZE, 0, EINVAL),
        (SIZE, SIZE + P, 0, EINVAL),
        (SIZE, P, 0, EINVAL),
        (SIZE, 0, 0, EINVAL),
        (SIZE, P + 1, EINVAL, EINVAL),
        (SIZE, -1, EINVAL, EINVAL),
        (SIZE, MAX_BYTES + 1, EINVAL, EINVAL),
    ],
)
def test_sizes(size: int, new: int, resizable: int, gmem: int) -> None:
    for who, expected in ((RESIZABLE, resizable), (GUEST_MEMFD, gmem)):
        code = 0
        try:
            resize_rule(who, new, size)
        except Refused as refused:
            code = refused.errno
        assert code == expected


def test_metadata_as_a_guest_memfd() -> None:
    for operation, code in GUEST_MEMFD.metadata.items():
        with pytest.raises(Refused) as refused:
            metadata_rule(GUEST_MEMFD, operation)
        assert refused.value.errno == code
        assert code == (errno.ESPIPE if operation == "lseek" else EINVAL)
    for operation in RESIZABLE.metadata:
        metadata_rule(RESIZABLE, operation)


def test_tables_are_complete_and_named() -> None:
    operations = {frozenset(p.metadata) for p in PERSONALITIES.values()}
    assert len(operations) == 1
    for name, who in PERSONALITIES.items():
        assert who.name == name
        assert who.source
        assert all(row.source for row in who.fallocate.values())
    assert GUEST_MEMFD.resizing is Resizing.ONCE
    assert not GUEST_MEMFD.pinned_by_users


def test_a_refusal_says_what_was_asked_and_of_what() -> None:
    with pytest.raises(Refused, match=r"EINVAL: fallocate\(mode=0x3, offset=1, length=4096\)") as r:
        fallocate_rule(RESIZABLE, 3, 1, P, SIZE)
    assert "32768 bytes" in str(r.value)
    with pytest.raises(Refused, match="set once"):
        resize_rule(GUEST_MEMFD, P, SIZE)
