# SPDX-License-Identifier: GPL-2.0-or-later
"""Private memory of a process comes under a slot, and so becomes shared with us.

The ioctl that is the reason for it has its answer before the memory is replaced, but its thread
does not see that: it is stopped by then.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable, Sequence

from kvmsim.device.gmemfile import GmemFile
from kvmsim.device.results import DeviceObject
from kvmsim.exec.notification import Listener, Notification
from kvmsim.exec.process import Process, Repeating, Thread
from kvmsim.exec.remap import Remapper, Replacement
from kvmsim.exec.waiting import Waiting, WaitingCalls
from kvmsim.exec.watcher import Watcher
from kvmsim.uapi import KVM_SET_USER_MEMORY_REGION, PAGE_SHIFT, USERSPACE_MEMORY_REGION

log = logging.getLogger(__name__)


class Sharing:
    """For one supervisor; its own thread calls."""

    def __init__(self, listener: Listener, watcher: Watcher, calls: WaitingCalls) -> None:
        self._listener = listener
        self._watcher = watcher
        self._calls = calls

    def for_slot(
        self,
        call: Notification,
        thread: Thread,
        device: DeviceObject | GmemFile,
        plan: list[Replacement],
    ) -> None:
        """Put memfds in the place of private memory, then let the ioctl return; or let it fail."""

        def failed(code: int) -> None:
            log.warning(
                "process %d gets %s for a slot, since %d pages of it would stay private",
                thread.process.pid, errno.errorcode.get(code, str(code)), _pages(plan),
            )  # fmt: skip
            number = thread.said[:4]  # of the slot, in the region that was read
            nothing = number + bytes(USERSPACE_MEMORY_REGION.size - len(number))
            device.ioctl(KVM_SET_USER_MEMORY_REGION, 0, Repeating(thread, nothing))

        self._share(call, thread.process, plan, failed)

    def for_guest(self, one: Waiting, ranges: Iterable[tuple[int, int]]) -> None:
        """A guest met private memory that came after its slot: share it, and run it again.

        ``ranges`` are the bytes [start, end) of slots.
        """
        process = one.thread.process
        plan = process.slots.wanted(ranges)

        def failed(code: int) -> None:
            log.warning(
                "process %d: %d pages under a slot are private memory that came after the slot, "
                "and %s keeps them from being shared: the guest finds nothing there; make the "
                "slot anew", process.pid, _pages(plan), errno.errorcode.get(code, str(code)),
            )  # fmt: skip

        self._share(one.call, process, plan, failed, again=True)

    def _share(
        self,
        call: Notification,
        process: Process,
        plan: list[Replacement],
        failed: Callable[[int], None],
        *,
        again: bool = False,
    ) -> None:
        """Replace what is planned, then let the call return 0; or let it fail.

        ``again``: the call has failed with EFAULT, and is made again if all is well now.
        """
        replaced: list[Replacement] = []
        try:
            with self._calls.held() as waiting, Remapper(process.pid, call.tid) as remapper:
                code = self._replace(remapper, call, plan, waiting, replaced, again)
                if code:
                    failed(code)
                else:
                    self._tell_of_changes(remapper, process, replaced)
                process.slots.done(replaced, failed=bool(code))
        finally:
            for one in plan:
                if one not in replaced:
                    os.close(one.fd)

    def _replace(
        self,
        remapper: Remapper,
        call: Notification,
        plan: list[Replacement],
        waiting: frozenset[int],
        replaced: list[Replacement],
        again: bool,
    ) -> int:
        """Answer the call and replace; return the errno of what went wrong, or 0.

        Every thread is stopped then.
        """
        otherwise = errno.EFAULT if again else 0
        try:
            remapper.seize()
        except OSError as error:  # somebody else traces it
            log.warning("process %d cannot be stopped: %s", remapper.pid, error)
            code = error.errno or errno.EPERM
            self._listener.answer(call.id, -(otherwise or code))
            return code
        numbers: list[int] = []
        code = 0
        try:
            for one in plan:
                numbers.append(self._listener.give(call.id, one.fd, cloexec=True, answer=False))
        except OSError as error:  # no number is left, say
            log.warning("process %d takes no descriptors: %s", remapper.pid, error)
            code = error.errno or errno.EMFILE
        self._listener.answer(call.id, -(otherwise or code))
        remapper.stop()
        try:
            if not code:
                remapper.stop_others(waiting)
                for one, number in zip(plan, numbers, strict=True):
                    remapper.replace(one, number)
                    replaced.append(one)
        except OSError as error:
            log.warning("memory of process %d: %s", remapper.pid, error)
            code = error.errno or errno.EIO
        for number in numbers:
            remapper.close(number)
        if again and not code:
            remapper.call_again(call.nr)
        elif code and not again:
            remapper.answer(code)
        return code

    def _tell_of_changes(
        self, remapper: Remapper, process: Process, replaced: Sequence[Replacement]
    ) -> None:
        """Hear of what the process does to its new mappings."""
        slots = process.slots
        try:
            if slots.events is None:
                slots.events = remapper.open_events(process.pidfd)
            for one in replaced:
                slots.events.register(one.start, one.length)
        except OSError as error:
            log.info("process %d: changes of its memory are seen late: %s", process.pid, error)
        self._watcher.add(process)


def _pages(plan: Sequence[Replacement]) -> int:
    return sum(one.length for one in plan) >> PAGE_SHIFT
