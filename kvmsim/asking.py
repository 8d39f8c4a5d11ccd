# SPDX-License-Identifier: GPL-2.0-or-later
"""Asking the owner of private memory for a page, and waiting for the answer."""

from __future__ import annotations

import errno
import threading
from typing import Final

from kvmsim.effect import NeedPage, PageGrant
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE, KvmError

#: Seconds between two looks at whether the owner is still there.
_LOOK: Final = 0.2


class Asking:
    """Asks on behalf of ``operation``, from any thread that may wait for the owner."""

    def __init__(self, running: RunningVm, operation: str) -> None:
        self._running = running
        self._operation = operation
        self._answered = threading.Condition(running.lock)

    def page(self, need: NeedPage, *, again: bool = False) -> PageGrant:
        """The owner's answer (no lock held); whether it still holds is for the caller to see.

        ``again``: the extent was granted before and is not here. KvmError: EIO if the VM ends
        meanwhile, EBADF if the file is used no more.
        """
        answers: list[PageGrant] = []

        def arrived(grant: PageGrant) -> None:
            answers.append(grant)
            self._answered.notify_all()

        with self._running.lock:
            self._require_running(need)
            send = self._running.ask_page(need, arrived, again=again)
        if send is None:
            raise self._refused(errno.EBADF, "the file is not used any more", need)
        send()
        with self._running.lock:
            while not answers:
                self._require_running(need)
                self._answered.wait(_LOOK)
        return answers[0]

    def _require_running(self, need: NeedPage) -> None:
        if self._running.stopping:
            raise self._refused(errno.EIO, self._running.stop_reason, need)

    def _refused(self, number: int, reason: str, need: NeedPage) -> KvmError:
        size = (need.end - need.start) * PAGE_SIZE
        return KvmError(
            number, self._operation, f"file {need.file:#x}: {reason}",
            start=need.start << PAGE_SHIFT, size=size,
        )  # fmt: skip
