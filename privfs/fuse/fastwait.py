# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for FUSE requests without a pass of trio's scheduler for each.

Waking an idle virtual CPU and two scheduler passes cost more than a request itself; so while
requests follow each other closely, pyfuse3's main loop looks at /dev/fuse before it sleeps.
"""

from __future__ import annotations

from time import monotonic

import trio

from privfs.fuse import _lowlevel


class Load:
    """Handlers under way in this process: while one waits, spinning would delay what it awaits."""

    __slots__ = ("handlers",)

    def __init__(self) -> None:
        self.handlers = 0


LOAD = Load()


class _FastLock:
    """A lock without trio's checkpoint when nobody holds it."""

    def __init__(self) -> None:
        self._held = False
        self._waiters = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiters.park()
        self._held = True

    async def __aexit__(self, *exc: object) -> None:
        self._held = False
        self._waiters.unpark()


class _FastWait:
    """trio.lowlevel for pyfuse3: look at /dev/fuse before going to sleep in epoll.

    Requests that follow each other closely are taken without a pass of trio's scheduler, but never
    for longer than ``_BURST`` seconds: then every other task has its turn.
    """

    _BURST = 0.001
    _ARRIVING = 0.0005

    def __init__(self, spin_us: int) -> None:
        vars(self).update(vars(trio.lowlevel))  # found at once, where __getattr__ is a call
        self._spin_us = spin_us
        self._yielded = self._served = float("-inf")
        vars(self).pop("wait_readable")  # ours

    async def wait_readable(self, fd: int) -> None:
        now = monotonic()
        if not LOAD.handlers and now - self._yielded < self._BURST:
            arriving = now - self._served < self._ARRIVING
            if _lowlevel.spin_readable(self._spin_us if arriving else 0):
                self._served = monotonic()
                return
        await trio.lowlevel.wait_readable(fd)
        self._yielded = self._served = monotonic()


class FastTrio:
    """What pyfuse3 takes for the module trio, in the manner of pyfuse3.asyncio."""

    Lock = _FastLock

    def __init__(self, spin_us: int) -> None:
        vars(self).update(vars(trio))
        vars(self).pop("Lock")  # ours
        self.lowlevel = _FastWait(spin_us)
