# SPDX-License-Identifier: GPL-2.0-or-later
"""Move a file's memory, extent by extent: what ``privfs compact`` asks a mount for (trio).

An extent at a time, so that room for one of them is enough, and the file is in use meanwhile but
for the extent that moves.  One that holds nothing ends; its descriptor is given back.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import trio

from privfs.operation import MAX_PAGES, Migrate
from privfs.personality import PAGE_SIZE, Refused
from privfs.service import Call, Service

#: Seconds between two words on an extent that takes long.
BEAT: Final = 0.5

Tell = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(slots=True)
class Progress:
    """What was done so far, of ``total`` bytes in ``extents``; ``ended`` ones were empty."""

    extents: int = 0
    total: int = 0
    moved: int = 0
    ended: int = 0
    bytes: int = 0
    began: float = 0.0

    def view(self, copied: int = 0) -> dict[str, Any]:
        """Return it as people and scripts see it; ``copied`` pages are of the next extent."""
        return {
            "extents": self.extents,
            "moved": self.moved,
            "ended": self.ended,
            "bytes": self.bytes + copied * PAGE_SIZE,
            "total": self.total,
            "seconds": time.monotonic() - self.began,
        }


async def compact(service: Service, ino: int, start: int, end: int, tell: Tell) -> Progress:
    """Move the extents that have pages of ``[start, end)``; ``tell`` is told how far it is.

    Raises Refused, with what was done until then in its words: EOPNOTSUPP for memory that is to
    stay where it is, ENOSPC where there is no room for a second copy of an extent, EIO where a user
    did not let go of one, ENOENT if the file ends meanwhile.  What could not be moved stays as it
    is.  Cancelled, it leaves the extent under way where it is, too.
    """
    file = service.owner.files[ino]
    fixed = service.backing.store.fixed
    if fixed:
        raise Refused(errno.EOPNOTSUPP, f"{service.backing.store.name} stays where it is: {fixed}")
    layout = file.personality.layout
    progress = Progress(began=time.monotonic())
    ranges = {index: layout.extent_range(index) for index in sorted(file.instances)}
    ranges = {i: (low, high) for i, (low, high) in ranges.items() if low < end and start < high}
    progress.extents = len(ranges)
    progress.total = PAGE_SIZE * sum(file.pages.range_cardinality(*r) for r in ranges.values())
    for index in ranges:
        if service.owner.files.get(ino) is not file:
            raise Refused(errno.ENOENT, f"the file ended {_after(progress)}")
        if index not in file.instances:
            progress.ended += 1  # somebody else did
            continue
        call = service.begin(ino, Migrate(index))
        await _end(service, call, progress, tell)
        assert call.outcome is not None
        if call.outcome.errno:
            raise Refused(call.outcome.errno, f"{_why(service, ino, call)} {_after(progress)}")
        if call.moved is None:
            progress.ended += 1
        else:
            progress.moved += 1
            progress.bytes += call.moved.pages * PAGE_SIZE
        await tell(progress.view())
    return progress


async def _end(service: Service, call: Call, progress: Progress, tell: Tell) -> None:
    """Wait for the end of a move, and say how far it is; leave it to its end if cancelled."""
    try:
        while call.outcome is None:
            with trio.move_on_after(BEAT):
                await service.settled(call)
            if call.outcome is None:
                await tell(progress.view(call.copied))
    except BaseException:
        if call.outcome is None:
            service.interrupt(call)
        raise


def _why(service: Service, ino: int, call: Call) -> str:
    """Say why an extent was not moved, and who wanted it so."""
    assert call.outcome is not None
    why = call.trouble or call.outcome.why
    file = service.owner.files.get(ino)
    if call.outcome.errno == errno.EOPNOTSUPP and file is not None and not file.shared:
        users = service.owner.users.get(ino, set())
        names = sorted(service.owner.sessions[sid].name for sid in users)
        why += f", as {', '.join(names)} asked" if names else ""
    return why


def _after(progress: Progress) -> str:
    return f"(moved before: {progress.moved} of {progress.extents} extents)"


async def serve(service: Service, stream: trio.SocketStream, line: bytes) -> None:
    """Answer the question ``compact``: lines of progress, then the result or an error.

    ``{"ask": "compact", "ino": N, "start": page, "end": page}``; whoever asks may leave, then the
    extent under way stays where it is.
    """
    async with trio.open_nursery() as nursery:

        async def say(reply: dict[str, Any]) -> None:
            try:
                await stream.send_all(json.dumps(reply).encode() + b"\n")
            except trio.BrokenResourceError:  # the asker has left
                nursery.cancel_scope.cancel()
                await trio.lowlevel.checkpoint()

        async def tell(progress: dict[str, Any]) -> None:
            await say({"progress": progress})

        nursery.start_soon(_until_it_leaves, stream, nursery.cancel_scope)
        try:
            ask = json.loads(line)
            ino, start, end = (_number(ask, *field) for field in _FIELDS)
            if ino not in service.owner.files:
                raise Refused(errno.ENOENT, f"inode {ino} is no private file of this mount")
            if start >= end:
                raise Refused(errno.EINVAL, f"no pages in [{start:#x}, {end:#x})")
            progress = await compact(service, ino, start, end, tell)
            reply: dict[str, Any] = {"ok": progress.view()}
        except Refused as refused:
            reply = {"errno": refused.errno, "error": str(refused)}
        await say(reply)
        nursery.cancel_scope.cancel()


_FIELDS: Final = (("ino", -1), ("start", 0), ("end", MAX_PAGES))


def _number(ask: dict[str, Any], name: str, default: int) -> int:
    value = ask.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refused(errno.EINVAL, f"compact: {name} must be a number, is {value!r}")
    return value


async def _until_it_leaves(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        pass
    scope.cancel()
