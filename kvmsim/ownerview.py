# SPDX-License-Identifier: GPL-2.0-or-later
"""What the owner of a mount says of a private file, asked over its control socket.

The channel that pages come over tells what this process has been granted; what the file holds,
and who else uses it, is the owner's to say.  Never asked by a lane or a runner: the answer may
take as long as the owner is busy.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from typing import Any, Final

from kvmsim.uapi import PAGE_SIZE
from privfs.notifier.lane import LinkError, connect

_CONTROL: Final = "control"
_TIMEOUT: Final = 5.0
_CHUNK: Final = 1 << 16


class OwnerView:
    """The owner behind the session socket at ``path``; asked from any thread that may wait.

    Connects at once and keeps the connection: a path in the mount cannot be looked up while its
    owner hangs.
    """

    def __init__(self, path: str) -> None:
        self._place = os.path.join(os.path.dirname(path), _CONTROL)
        self._lock = threading.Lock()
        self._owed = 0  #: answers to questions that were given up
        self._buffer = bytearray()
        self._why = ""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(_TIMEOUT)
        try:
            connect(self._sock, self._place)
        except LinkError as error:  # without it all goes on; only nothing can be asked
            self._why = error.strerror or str(error)

    def close(self) -> None:
        """Ask no more."""
        self._sock.close()

    def runs(self, ino: int, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """Return the allocated pages of a file in [start, end), as runs, in order and apart.

        LinkError if the owner does not answer.
        """
        found: list[tuple[int, int]] = []
        page: int | None = start
        while page is not None and page < end:
            part = self._ask("map", ino=ino, start=page)
            for row in part["rows"]:
                first = max(start, row["start"] // PAGE_SIZE)
                last = min(end, row["end"] // PAGE_SIZE)
                if first >= last or row["state"] == "hole":
                    continue
                if found and found[-1][1] == first:
                    found[-1] = (found[-1][0], last)
                else:
                    found.append((first, last))
            page = part["next"]
        return tuple(found)

    def users(self, ino: int) -> tuple[str, ...]:
        """Return the names of a file's users; LinkError if the owner does not answer."""
        return tuple(self._ask("stat", ino=ino)["users"])

    def exclusive(self, ino: int) -> str | None:
        """Return the name of the session that alone may have a file, None if any may; LinkError."""
        holder: str | None = self._ask("stat", ino=ino).get("exclusive")
        return holder

    def host_mappable(self) -> bool:
        """Return whether files of the mount can be made that the host may map; LinkError."""
        return bool(self._ask("status").get("host_mappable"))

    def map_by_host(self, ino: int, shared: bool) -> None:
        """Let the host map a new file, with its pages if ``shared``; LinkError."""
        self._ask("map_by_host", ino=ino, shared=shared)

    def _ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        if self._why:
            raise LinkError(errno.ENOTCONN, self._why)
        with self._lock:
            try:
                self._sock.sendall(json.dumps({"ask": question, **arguments}).encode() + b"\n")
                self._owed += 1
                while self._owed:
                    line = self._line()
                    self._owed -= 1
            except OSError as error:
                why = error.strerror or str(error)
                raise LinkError(
                    error.errno or errno.ETIMEDOUT, f"{self._place}: no answer: {why}"
                ) from error
        reply = json.loads(line)
        if "ok" not in reply:
            raise LinkError(reply["errno"], f"{self._place}: {reply['error']}")
        found: dict[str, Any] = reply["ok"]
        return found

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            data = self._sock.recv(_CHUNK)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the owner has ended")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line
