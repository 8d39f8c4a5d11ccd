# SPDX-License-Identifier: GPL-2.0-or-later
"""What people see of a mount: plain values made from the cores, never a page's content.

Each function returns dicts and lists of strings and numbers, the same for tables, ``--json``
and the live files in ``.privfs/``.  Ranges are bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from privfs import seals
from privfs.memfile import MemFile
from privfs.notifier.owner import Owner
from privfs.operation import OpId
from privfs.personality import PAGE_SIZE

#: Rows that one map may have; a caller that wants more asks again from where it ends.
MAX_ROWS = 65_536


def file_map(owner: Owner, ino: int, start: int = 0) -> dict[str, Any]:
    """Return the runs of equal state of a file from page ``start``: hole, allocated, mapped.

    ``next`` is the page to go on from, None when the map is complete.  What v7 and the shim have
    allocated past the end of a file is in it, the holes there are not.
    """
    file = owner.files[ino]
    inside = file.size // PAGE_SIZE
    end = max(inside, file.pages.max() + 1 if file.pages else 0)
    users = [owner.sessions[sid] for sid in sorted(owner.users[ino])]
    rows: list[dict[str, Any]] = []
    page = start
    while page < end and len(rows) < MAX_ROWS:
        names: list[str] = []
        if page not in file.pages:
            data = file.data_from(page)
            last = end if data is None else data
            if page >= inside:
                page = last  # there is nothing that could be a hole
                continue
            last, state = min(last, inside), "hole"
        else:
            last = min(file.hole_from(page), end)
            for user in users:
                pages = user.granted[ino]
                if page in pages:
                    names.append(user.name)
                last = _run_end(pages, page, last)
            state = "mapped" if names else "allocated"
        rows.append(
            {"start": page * PAGE_SIZE, "end": last * PAGE_SIZE, "state": state, "users": names}
        )
        page = last
    return {"size": file.size, "rows": rows, "next": page if page < end else None}


def _run_end(pages: Any, page: int, limit: int) -> int:
    """Return where the run of pages in the same state as ``page`` ends, at most ``limit``."""
    inside = page in pages
    low, high = page + 1, limit
    while low < high:
        middle = (low + high) // 2
        count = pages.range_cardinality(page, middle + 1)
        if count == (middle + 1 - page if inside else 0):
            low = middle + 1
        else:
            high = middle
    return low


def file_stat(owner: Owner, ino: int) -> dict[str, Any]:
    """Return the counts of one file.

    ``mapped_by`` is what each user was granted and has not given up, in the order of ``users``;
    ``exclusive`` the session that alone may have the file, if one may, registered or about to be.
    """
    file = owner.files[ino]
    holder = owner.exclusive.holder(ino)
    users = [owner.sessions[sid] for sid in sorted(owner.users[ino])]
    return {
        "inode": ino,
        "personality": file.personality.name,
        "size": file.size,
        "allocated": file.allocated * PAGE_SIZE,
        "mapped": _mapped(owner, ino, file) * PAGE_SIZE,
        "extents": len(file.instances),
        "users": [user.name for user in users],
        "mapped_by": [
            {
                "user": user.name,
                "mapped": user.granted[ino].intersection_cardinality(file.pages) * PAGE_SIZE,
            }
            for user in users
        ],
        "exclusive": owner.sessions[holder].name if holder is not None else None,
        "seals": seals.names(file.seals),
        "purpose": seals.names(file.purpose or seals.Purpose.USER_INACCESSIBLE),
        "operations": [
            {"step": step, "start": start * PAGE_SIZE, "end": end * PAGE_SIZE}
            for _, step, start, end in file.operations()
        ],
    }


def _mapped(owner: Owner, ino: int, file: MemFile) -> int:
    granted = [owner.sessions[sid].granted[ino] for sid in owner.users[ino]]
    if not granted:
        return 0
    union = granted[0].copy()
    for pages in granted[1:]:
        union |= pages
    return union.intersection_cardinality(file.pages)


def sessions(
    owner: Owner, waited: Callable[[int, OpId], float] = lambda ino, op: 0.0
) -> list[dict[str, Any]]:
    """Return one row a user: name, state, fence, files, invalidations it has not acknowledged.

    ``exclusive`` are the files that no other session may have.
    ``waited`` gives the seconds since an invalidation began.
    """
    return [
        {
            "session": session.sid,
            "user": session.name,
            "pid": session.pid,
            "state": session.state.value,
            "fence": session.fence.text,
            "files": sorted(session.files),
            "exclusive": sorted(owner.exclusive.of(session.sid)),
            "unacknowledged": len(session.sent),
            "outstanding": [
                {
                    "seq": seq,
                    "inode": ino,
                    "seconds": waited(ino, op),
                    "start": start * PAGE_SIZE,
                    "end": end * PAGE_SIZE,
                }
                for seq, ino, op, start, end in owner.outstanding(session.sid)
            ],
            "granted": sum(len(pages) for pages in session.granted.values()) * PAGE_SIZE,
        }
        for session in owner.sessions.values()
    ]


def meminfo(owner: Owner) -> dict[str, int]:
    """Return the budget in bytes.

    ``private`` is the memory of all files, ``reserved`` what operations under way may still take,
    ``available`` what could be allocated now: of what is free, as much as the machine can spare.
    Where memory is given back on its users' word alone, ``given_up`` is what those that are still
    there gave up: as much they could still hold, and nobody could see it.
    """
    budget = owner.budget
    allocated = sum(file.allocated for file in owner.files.values())
    counts = {
        "total": budget.total,
        "used": budget.used,
        "free": max(budget.total - budget.used, 0),
        "available": budget.available,
        "private": allocated,
        "reserved": budget.used - allocated,
    }
    if owner.personality.layout.whole:
        counts["given_up"] = sum(session.given_up for session in owner.sessions.values())
    return {name: pages * PAGE_SIZE for name, pages in counts.items()}


def meminfo_text(owner: Owner) -> str:
    """Return the budget as /proc/meminfo writes it."""
    info = meminfo(owner)
    names = {
        "PrivTotal": "total", "PrivFree": "free", "PrivAvailable": "available",
        "PrivUsed": "used", "Private": "private", "PrivReserved": "reserved",
        "PrivGivenUp": "given_up",
    }  # fmt: skip
    lines = [(name, info[key]) for name, key in names.items() if key in info]
    return "".join(f"{name + ':':<16}{count // 1024:>12} kB\n" for name, count in lines)


def sessions_text(owner: Owner) -> str:
    """Return one line a user."""
    lines = [f"{'SESSION':>7} {'USER':<28} {'STATE':<9} {'FENCE':<8} {'UNACKED':>7} FILES\n"]
    for row in sessions(owner):
        files = ",".join([
            f"{ino}:exclusive" if ino in row["exclusive"] else str(ino) for ino in row["files"]
        ]) or "-"  # fmt: skip
        lines.append(
            f"{row['session']:>7} {row['user']:<28} {row['state']:<9} "
            f"{row['fence']:<8} {row['unacknowledged']:>7} {files}\n"
        )
    return "".join(lines)
