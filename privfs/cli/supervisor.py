# SPDX-License-Identifier: GPL-2.0-or-later
"""What a service manager is told: the datagrams of sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import socket


class Supervisor:
    """Whoever started us with $NOTIFY_SOCKET, if anybody; nobody that we start gets it.

    ``tied``: we serve another command of ours, which speaks for itself.
    """

    def __init__(self, *, tied: bool = False) -> None:
        place = os.environ.pop("NOTIFY_SOCKET", "")
        self._place = "" if tied else place

    def ready(self, status: str) -> None:
        """Say that the mount answers, and who serves it."""
        self._tell(f"READY=1\nMAINPID={os.getpid()}\nSTATUS={status}")

    def stopping(self) -> None:
        """Say that the mount ends; users of its memory may still have to give it back."""
        self._tell("STOPPING=1\nSTATUS=taking the memory back")

    def _tell(self, text: str) -> None:
        if self._place[:1] not in ("/", "@"):
            return
        place = "\0" + self._place[1:] if self._place[0] == "@" else self._place
        with (
            contextlib.suppress(OSError),  # a manager that does not listen is no error of ours
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
        ):
            sock.sendto(text.encode(), place)
