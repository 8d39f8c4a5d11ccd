# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens between an owner and its users, as it happens, for whoever listens.

Events are made from the effects and records that pass through the service, so that watching
changes nothing; while nobody listens they cost one look at a list.  They name ranges, users and
numbers, never the content of a page.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Final

import trio

from privfs.notifier import effects as core
from privfs.notifier.owner import Owner
from privfs.notifier.wire import Op, Reason, Record
from privfs.personality import PAGE_SIZE

#: Events that may wait for a slow listener; more are counted and left out.
MAX_WAITING: Final = 4096


class Listener:
    """One who watches."""

    def __init__(self, *, faults: bool) -> None:
        self.faults = faults
        self.waiting: deque[dict[str, Any]] = deque()
        self.dropped = 0
        self.wake = trio.Event()

    def take(self) -> list[dict[str, Any]]:
        """Return what has happened since the last call."""
        found = list(self.waiting)
        self.waiting.clear()
        if self.dropped:
            found.append({"event": "dropped", "count": self.dropped})
            self.dropped = 0
        self.wake = trio.Event()
        return found


class Events:
    """The listeners of a mount."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._listeners: list[Listener] = []

    @property
    def wanted(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    def listen(self, *, faults: bool = False) -> Listener:
        """Begin to listen; ``faults`` also to every grant."""
        listener = Listener(faults=faults)
        self._listeners.append(listener)
        return listener

    def leave(self, listener: Listener) -> None:
        """Stop listening."""
        self._listeners.remove(listener)

    def received(self, sid: int, record: Record) -> None:
        """A record came from a user."""
        if record.op == Op.ACK:
            self._tell({"event": "ack", "user": self._name(sid), "seq": record.seq})
        elif record.op == Op.UNREGISTER:
            self._tell({"event": "unregister", "user": self._name(sid), "inode": record.obj})

    def effect(self, effect: core.Effect) -> None:
        """The owner decided something."""
        match effect:
            case core.Send(sid, record):
                self._sent(sid, record)
            case core.Work(ino, perform):
                self._tell({
                    "event": perform.step.value, "inode": ino, "operation": perform.kind.value,
                    **_bytes(perform.start, perform.end),
                })  # fmt: skip
            case core.Migrated(ino, moved):
                self._tell({
                    "event": "move", "inode": ino, "extent": moved.extent, "from": moved.old,
                    "to": moved.new, "pages": moved.pages, **_bytes(moved.start, moved.end),
                })  # fmt: skip
            case core.Answer(op, code, why):
                self._tell({"event": "answer", "call": str(op), "errno": code, "why": why})
            case core.Drop(sid, why):
                self._tell({"event": "drop", "user": self._name(sid), "why": why})
            case core.Kill(sid):
                self._tell({"event": "kill", "user": self._name(sid)})
            case core.Forget(sid):
                self._tell({"event": "gone", "session": sid})
            case core.Expire(ino):
                self._tell({"event": "expire", "inode": ino})
            case core.Stray(ino, start, end, what, holders):
                self._tell({
                    "event": "stray", "inode": ino, "users": ",".join(holders), "why": what,
                    **_bytes(start, end),
                })  # fmt: skip
            case core.Note(text):
                self._tell({"event": "note", "why": text})

    def _sent(self, sid: int, record: Record) -> None:
        user = self._name(sid)
        match Op(record.op):
            case Op.WELCOME:
                self._tell({
                    "event": "hello", "user": user, "session": sid, "errno": record.status
                })  # fmt: skip
            case Op.REGISTERED:
                self._tell({
                    "event": "register", "user": user, "inode": record.obj, "errno": record.status
                })  # fmt: skip
            case Op.INVALIDATE:
                self._tell({
                    "event": "invalidate", "user": user, "inode": record.obj, "seq": record.seq,
                    "reason": Reason(record.status).name.lower(),
                    **_bytes(record.start, record.end),
                })  # fmt: skip
            case Op.PAGE:
                event = {"event": "grant", "user": user, "errno": record.status}
                self._tell(event | _bytes(record.start, record.end), fault=True)

    def _name(self, sid: int) -> str:
        session = self._owner.sessions.get(sid)
        return session.name if session else f"session {sid}"

    def _tell(self, event: dict[str, Any], *, fault: bool = False) -> None:
        event = {"time": time.time(), **event}
        for listener in self._listeners:
            if fault and not listener.faults:
                continue
            if len(listener.waiting) >= MAX_WAITING:
                listener.dropped += 1
                continue
            listener.waiting.append(event)
            listener.wake.set()


def _bytes(start: int, end: int) -> dict[str, int]:
    return {"start": start * PAGE_SIZE, "end": end * PAGE_SIZE}
