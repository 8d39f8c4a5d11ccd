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
from dataclasses import dataclass
from typing import Any, Final

from kvmsim.uapi import PAGE_SIZE
from privfs.notifier.lane import LinkError, connect

_CONTROL: Final = "control"
_TIMEOUT: Final = 5.0


@dataclass(frozen=True, slots=True)
class OwnerView:
    """The owner behind the session socket at ``socket``."""

    socket: str

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

    def _ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        place = os.path.join(os.path.dirname(self.socket), _CONTROL)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(_TIMEOUT)
                connect(sock, place)
                sock.sendall(json.dumps({"ask": question, **arguments}).encode() + b"\n")
                with sock.makefile("rb") as stream:
                    line = stream.readline()
            reply = json.loads(line)
        except LinkError:
            raise
        except OSError as error:
            why = error.strerror or str(error)
            raise LinkError(
                error.errno or errno.ETIMEDOUT, f"{place}: the owner does not answer: {why}"
            ) from error
        except ValueError:
            raise LinkError(errno.ECONNRESET, f"{place}: the owner ended meanwhile") from None
        if "ok" not in reply:
            raise LinkError(reply["errno"], f"{place}: {reply['error']}")
        found: dict[str, Any] = reply["ok"]
        return found
