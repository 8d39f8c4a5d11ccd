# SPDX-License-Identifier: GPL-2.0-or-later
"""The console's two ends for a person: standard streams, or a Unix socket.

The main thread moves all bytes; the runner thread puts output into an :class:`Outlet` and waits
there when nobody reads, so that a slow reader holds up its guest and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.failure import Failure
from kvmsim.console import ConsoleVm, Lines

_CHUNK: Final = 4096  # PIPE_BUF: what a pipe that polls as writable takes at once
_LIMIT: Final = 1 << 20
_BACKLOG: Final = 64 << 10
_RETRY: Final = 0.1


class Outlet:
    """Bytes on their way out; ``wake`` is readable when the main thread should look."""

    def __init__(self) -> None:
        self.wake, self._bell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._data = bytearray()
        self._closed = False

    def put(self, data: bytes) -> None:
        """Add output; waits while there is more than enough of it."""
        with self._lock:
            self._changed.wait_for(lambda: self._closed or len(self._data) < _LIMIT)
            self._data += data
        self.ring()

    def ring(self) -> None:
        """Let the main thread look."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._bell, b"!")

    def answer(self) -> None:
        """Take notice of every ring so far."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.wake, _CHUNK):
                pass

    def peek(self) -> bytes:
        """Return what to write next."""
        with self._lock:
            return bytes(self._data[:_CHUNK])

    def written(self, count: int) -> None:
        """Forget what has been written."""
        with self._lock:
            del self._data[:count]
            self._changed.notify_all()

    def trim(self, count: int) -> None:
        """Keep only the last ``count`` bytes."""
        with self._lock:
            del self._data[: max(0, len(self._data) - count)]
            self._changed.notify_all()

    def give_up(self) -> None:
        """Never make anyone wait again."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Close the bell; nobody may ring any more."""
        os.close(self.wake)
        os.close(self._bell)


class JsonLines:
    """Console output as JSON lines ``{"event": "console", "vm": NAME, "line": TEXT}``."""

    def __init__(self, put: Callable[[bytes], None], vm: str) -> None:
        self._put = put
        self._vm = vm
        self._lines = Lines()

    def output(self, data: bytes) -> None:
        """Take console output; whole lines go on."""
        for line in self._lines.feed(data):
            self._put(event("console", vm=self._vm, line=line))


def event(name: str, **values: object) -> bytes:
    """Return one JSON line."""
    return json.dumps({"event": name, **values}).encode() + b"\n"


class Place(Protocol):
    """Where the person at the console is."""

    def polled(self, *, has_output: bool) -> dict[int, int]:
        """Return poll events by descriptor."""

    def ready(self, fd: int, vm: ConsoleVm, outlet: Outlet) -> None:
        """Move what can be moved on ``fd``."""

    def idle(self, outlet: Outlet) -> bool:
        """Whether nothing more needs to be written."""


class Standard:
    """Standard input and output.  The end of input ends the VM's input."""

    def __init__(self) -> None:
        self._reading = True
        self._last = b"\n"

    def polled(self, *, has_output: bool) -> dict[int, int]:
        """Return poll events by descriptor."""
        found = {0: select.POLLIN} if self._reading else {}
        return found | ({1: select.POLLOUT} if has_output else {})

    def ready(self, fd: int, vm: ConsoleVm, outlet: Outlet) -> None:
        """Move what can be moved; BrokenPipeError if nobody reads any more."""
        if fd == 1:
            data = outlet.peek()
            count = os.write(1, data)
            self._last = data[:count][-1:]
            outlet.written(count)
            return
        try:
            data = os.read(0, _CHUNK)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EBADF):  # terminal hung up, none at all
                raise
            data = b""
        if data:
            vm.feed(data)
        else:
            self._reading = False
            vm.end_input()

    def idle(self, outlet: Outlet) -> bool:
        """Whether nothing more needs to be written."""
        return not outlet.peek()

    def end_line(self) -> None:
        """Let what a terminal shows next begin a line."""
        if self._last != b"\n" and os.isatty(1):
            os.write(1, b"\n")


class Socket:
    """A listening Unix socket, one client at a time; the VM does not depend on there being one.

    A client that comes late gets the last 64 KiB.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._client: socket.socket | None = None

    def polled(self, *, has_output: bool) -> dict[int, int]:
        """Return poll events by descriptor."""
        if self._client is None:
            return {self._listener.fileno(): select.POLLIN}
        events = select.POLLIN | (select.POLLOUT if has_output else 0)
        return {self._client.fileno(): events}

    def ready(self, fd: int, vm: ConsoleVm, outlet: Outlet) -> None:
        """Move what can be moved, or meet a client."""
        if self._client is None:
            self._client, _ = self._listener.accept()
            self._client.setblocking(False)
            return
        try:
            with contextlib.suppress(BlockingIOError):
                outlet.written(self._client.send(outlet.peek()))
            with contextlib.suppress(BlockingIOError):
                data = self._client.recv(_CHUNK)
                if not data:
                    raise ConnectionResetError
                vm.feed(data)
        except ConnectionError:
            self._client.close()
            self._client = None

    def idle(self, outlet: Outlet) -> bool:
        """Whether nothing more needs to be written; without a client there is only a memory."""
        if self._client is None:
            outlet.trim(_BACKLOG)
            return True
        return not outlet.peek()

    def close(self) -> None:
        """Leave the client."""
        if self._client is not None:
            self._client.close()


@contextlib.contextmanager
def listening(path: str) -> Iterator[Socket]:
    """Listen at ``path``; the socket is gone afterwards.  Raises Failure."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(path)
        except OSError as error:
            why = error.strerror or str(error)
            if error.errno == errno.EADDRINUSE:
                why = "exists already; end its kvmsim, or remove it"
            raise Failure(Exit.USAGE, f"--console unix:{path}: {why}") from error
        try:
            listener.listen(1)
            place = Socket(listener)
            try:
                yield place
            finally:
                place.close()
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def attend(vm: ConsoleVm, place: Place, outlet: Outlet, deadline: float) -> bool:
    """Move bytes until the VM has ended and its last words are out; False at ``deadline``.

    ``deadline`` is of time.monotonic(); infinity for none.
    """
    while True:
        ended = vm.ending(0) is not None
        done = place.idle(outlet)
        if ended and done:
            return True
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        full = vm.machine.serial.pending_input > _LIMIT
        poll = select.poll()
        poll.register(outlet.wake, select.POLLIN)
        for fd, events in place.polled(has_output=not done).items():
            wanted = events & ~select.POLLIN if full or ended else events
            if wanted:  # even without any, poll would report a hang-up again and again
                poll.register(fd, wanted)
        wait = min(left, _RETRY) if full else left
        for fd, _ in poll.poll(None if wait == float("inf") else wait * 1000):
            if fd == outlet.wake:
                outlet.answer()
            elif not ended or fd != 0:
                place.ready(fd, vm, outlet)
