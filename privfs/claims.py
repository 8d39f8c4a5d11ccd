# SPDX-License-Identifier: GPL-2.0-or-later
"""What a request claims of a private file: which pages, whether its end too; or why it is refused.

Read from the tables of :mod:`privfs.personality` and :mod:`privfs.seals` against the file as it is
now: a request that has waited is judged again when its turn comes.

Units: pages of 4096 bytes in half-open ranges, except ``offset``, ``length`` and ``size`` (bytes).
"""

from __future__ import annotations

import errno

from privfs import seals
from privfs.filestate import FileState
from privfs.operation import (
    KINDS,
    MAX_PAGES,
    Claim,
    Destroy,
    Fallocate,
    FaultIn,
    Kind,
    Migrate,
    Request,
    Resize,
)
from privfs.personality import (
    PAGE_SIZE,
    Action,
    BeyondEof,
    Refused,
    fallocate_rule,
    resize_rule,
)


def claim_of(file: FileState, request: Request) -> Claim:
    """Name the pages that a request concerns; raise what it is refused with today."""
    if file.dead:
        raise Refused(errno.ENOENT, f"{request}: the file is gone")
    unit = file.personality.page_size // PAGE_SIZE
    match request:
        case Fallocate(mode, offset, length):
            row = fallocate_rule(file.personality, mode, offset, length, file.size)
            if row.action is not Action.ALLOCATE:
                seals.check(file.seals, seals.Deed.ERASE, request)
            end = min(-(-(offset + length) // (unit * PAGE_SIZE)) * unit, MAX_PAGES)
            start = min(offset // (unit * PAGE_SIZE) * unit, end)
            sizes = new_size(file, request) is not None
            if sizes:
                seals.check(file.seals, seals.Deed.GROW, request)
            beyond = row.action is Action.ALLOCATE and end * PAGE_SIZE > file.size
            return Claim(KINDS[row.action], start, end, sizes or beyond)
        case Resize(size):
            resize_rule(file.personality, size, file.size)
            if size != file.size:
                deed = seals.Deed.GROW if size > file.size else seals.Deed.SHRINK
                seals.check(file.seals, deed, request)
            return Claim(Kind.RESIZE, min(size, file.size) // PAGE_SIZE, MAX_PAGES, True)
        case FaultIn(page):
            page -= page % unit
            return Claim(Kind.FAULT, page, page + unit)
        case Destroy():
            return Claim(Kind.DESTROY, 0, MAX_PAGES)
        case Migrate(extent):
            _require_movable(file, request)
            return Claim(Kind.MIGRATE, *file.personality.layout.extent_range(extent))


def new_size(file: FileState, request: Request) -> int | None:
    """Return the size in bytes that a request gives the file in the end, if it sets any."""
    match request:
        case Resize(size):
            return size
        case Fallocate(mode, offset, length):
            row = file.personality.fallocate[mode]
            if row.beyond_eof is BeyondEof.GROW and offset + length > file.size:
                return offset + length
    return None


def _require_movable(file: FileState, request: Migrate) -> None:
    """What is promised to stay where it is stays (``migrate_page`` of v7's shmem: EOPNOTSUPP).

    The promise is to users: a file that has none may be moved, whatever its last one asked for.
    """
    if file.shared:
        raise Refused(
            errno.EOPNOTSUPP, f"{request}: the host may have mapped its pages where they are"
        )
    if file.users and (file.purpose or 0) & seals.Purpose.UNMOVABLE:
        raise Refused(
            errno.EOPNOTSUPP,
            f"{request}: its users were promised that its pages stay where they are "
            "(MEMFILE_F_UNMOVABLE)",
        )
