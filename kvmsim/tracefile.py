# SPDX-License-Identifier: GPL-2.0-or-later
"""A trace on its way to a file: events are queued where they happen, written by one thread."""

from __future__ import annotations

import logging
import queue
import threading
import time
from types import TracebackType
from typing import Final, Self, TextIO

from kvmsim.trace import FORMATS, Event, Value, format_of

log = logging.getLogger(__name__)

#: Events that may wait to be written; what comes on top is lost, and the trace says how many.
QUEUE_LIMIT: Final = 200_000


class TraceFile:
    """Writes events to ``path``; OSError if it cannot be made.

    ``tell`` never waits and may be called under any lock. What goes wrong later ends the trace
    with a warning, and nothing else.
    """

    def __init__(self, path: str, format: str = "", *, limit: int = QUEUE_LIMIT) -> None:
        self.path = path
        self._format = FORMATS[format or format_of(path)]()
        self._limit = limit
        self._lost = 0
        self._failed = False
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._file: TextIO = open(path, "w", encoding="utf-8", buffering=1 << 16)  # noqa: SIM115
        self._writer = threading.Thread(target=self._write, name="trace", daemon=True)
        self._writer.start()

    def tell(self, name: str, vm: str, vcpu: int | None, fields: dict[str, Value]) -> None:
        """Queue an event of now, of this thread."""
        if self._failed:
            return
        if self._queue.qsize() >= self._limit:
            self._lost += 1  # two threads may lose a count: it says "at least"
            return
        thread = threading.current_thread()
        self._queue.put(
            Event(time.monotonic_ns(), name, vm, vcpu, thread.name, thread.native_id or 0, fields)
        )

    def close(self) -> None:
        """Write what waits, and the end of the file. Idempotent."""
        if self._writer.is_alive():
            self._queue.put(None)
            self._writer.join()

    def _write(self) -> None:
        try:
            with self._file as file:
                file.write(self._format.begin())
                while (event := self._queue.get()) is not None:
                    file.write(self._format.event(event))
                    if self._lost and self._queue.empty():
                        file.write(self._say_lost())
                file.write(self._say_lost() + self._format.end())
        except OSError as error:
            self._failed = True
            log.warning("trace %s: %s; it ends here", self.path, error.strerror)

    def _say_lost(self) -> str:
        lost, self._lost = self._lost, 0
        return self._format.lost(lost) if lost else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
