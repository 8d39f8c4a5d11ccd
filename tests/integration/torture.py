# SPDX-License-Identifier: GPL-2.0-or-later
"""Punch a guest's private pages while its vCPUs use them, and let the guest judge what it reads.

The guest's ``stamp`` command (docs/guest.md) writes a value with a generation and an epoch into
every page that it visits, and knows from the epochs, which this harness keeps in shared memory,
when a value that it reads back was punched away before.  So a stale translation, a missing flush
or memory freed too early is a read that the guest itself reports.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvmsim.emulator import Emulator, MemoryBackend, VmConfig
from kvmsim.hostmem import HostMemory
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SIZE
from kvmsim.vmm.loader import LOW_SIZE
from kvmsim.vmm.stamplog import StampLog

_PUNCH = 0x03
_READS = 200  # of a vCPU between two punches: it has refilled what was punched
_PROGRESS = 0.1  # seconds to wait for them
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Console:
    """The console of a guest in this process: send a line, wait for an answer."""

    def __init__(self) -> None:
        self.text = ""
        self.emulator: Emulator | None = None
        self._seen = 0
        self._more = threading.Condition()

    def output(self, data: bytes) -> None:
        with self._more:
            self.text += data.decode(errors="replace")
            self._more.notify_all()

    def expect(self, pattern: str, timeout: float = 60.0) -> re.Match[str]:
        """Wait for a match behind the last one."""
        deadline = time.monotonic() + timeout
        with self._more:
            while True:
                match = re.compile(pattern, re.MULTILINE).search(self.text, self._seen)
                if match:
                    self._seen = match.end()
                    return match
                left = deadline - time.monotonic()
                if left <= 0 or not self._more.wait(left):
                    raise AssertionError(f"no {pattern!r} in {self.text[self._seen :]!r}")

    def command(self, line: str) -> str:
        """Send a command and return its answer, which must be ``ok``."""
        assert self.emulator is not None
        self.emulator.feed(line.encode() + b"\n")
        answer = self.expect(r"(ok|error) .*\n").group(0)
        assert answer.startswith("ok"), f"{line}: {answer}"
        return answer


@dataclass
class Guest:
    """A booted guest in this process."""

    emulator: Emulator
    console: Console
    log: StampLog

    def close(self) -> None:
        self.emulator.close()


def boot(
    host: HostMemory,
    image: bytes,
    *paths: Path,
    vcpus: int = 2,
    label: str = "vm0",
    running: type[RunningVm] = RunningVm,
) -> Guest:
    """Boot the guest kernel on private files, one above the other, and wait for its prompt."""
    console = Console()
    config = VmConfig(tuple(MemoryBackend(str(path)) for path in paths), vcpus, label)
    emulator = Emulator(host, config, console.output, running=running)
    console.emulator = emulator
    try:
        emulator.boot(image)
        console.expect(r"^> ")
        return Guest(emulator, console, StampLog(emulator.memory))
    except BaseException:
        emulator.close()
        raise


@dataclass
class Result:
    """What a run found."""

    punches: int = 0
    hot: int = 0  #: punches of a page that a vCPU had read within the last moment
    stale: int = 0
    lost: int = 0
    mismatches: int = 0
    decisive: int = 0
    reads: int = 0
    slowest: float = 0.0

    @property
    def bad(self) -> int:
        return self.stale + self.lost + self.mismatches


class Torture:
    """Random punches of a guest's private file under two stamping vCPUs."""

    #: Pages of the file that are punched; they lie behind the guest kernel.
    PAGES = 64

    def __init__(self, guest: Guest, path: Path, seed: int) -> None:
        self.guest = guest
        self.random = random.Random(seed)
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        info = guest.console.command("info")
        free = re.search(r"free=(0x[0-9a-f]+)", info)
        assert free is not None, info
        kernel_end = int(free[1], 16)
        self.first_gfn = kernel_end // PAGE_SIZE + 16
        self.result = Result()
        self._heads = [0] * len(guest.emulator.running.vcpus)

    def start(self) -> None:
        gpa = self.first_gfn * PAGE_SIZE
        for vcpu in range(len(self.guest.emulator.running.vcpus)):
            self.guest.console.command(f"stamp {vcpu} {gpa:#x} {self.PAGES} {vcpu + 1}")

    def stop(self) -> Result:
        for vcpu in range(len(self.guest.emulator.running.vcpus)):
            self.guest.console.command(f"stop {vcpu}")
        os.close(self.fd)
        self._count()
        return self.result

    def leave(self) -> Result:
        """Ask the guest nothing more: without memory that a mount refuses it has ended."""
        os.close(self.fd)
        return self.result

    def _count(self) -> None:
        stats = [self.guest.log.stats(v) for v in range(len(self.guest.emulator.running.vcpus))]
        self.result.stale = sum(s.stale for s in stats)
        self.result.lost = sum(s.lost for s in stats)
        self.result.mismatches = sum(s.mismatches for s in stats)
        self.result.decisive = sum(s.decisive for s in stats)
        self.result.reads = sum(s.reads for s in stats)

    def punch(self, count: int, bad: Callable[[], bool] | None = None) -> Result:
        """Punch ``count`` random ranges, three of four around a page that was read just now.

        Every 25 punches, stop if the guest has found a bad read or ``bad`` something else.
        """
        for i in range(count):
            gfn, pages = self._pick()
            log = self.guest.log
            log.begin_punch(gfn, pages)
            began = time.perf_counter()
            self._fallocate(gfn, pages)
            self.result.slowest = max(self.result.slowest, time.perf_counter() - began)
            log.end_punch(gfn, pages)
            self.result.punches += 1
            if bad is not None and i % 25 == 24:
                self._count()
                if self.result.bad or bad():
                    break
        return self.result

    def _pick(self) -> tuple[int, int]:
        pages = self.random.choice((1, 1, 1, 2, 4, 16))
        if self.random.random() < 0.75:
            page = self._page_read_just_now()
            if page is not None:
                self.result.hot += 1
                gfn = self.guest.log.window_gfn + page
                return min(gfn, self.first_gfn + self.PAGES - pages), pages
        return self.first_gfn + self.random.randrange(self.PAGES - pages), pages

    def _page_read_just_now(self) -> int | None:
        """Let a vCPU get on since the last punch, and return the page that it read last."""
        log = self.guest.log
        deadline = time.monotonic() + _PROGRESS
        while time.monotonic() < deadline:
            for vcpu in self.random.sample(range(len(self._heads)), len(self._heads)):
                head = log.stats(vcpu).head
                if head >= self._heads[vcpu] + _READS:
                    self._heads[vcpu] = head
                    record = log.latest(vcpu)
                    if record is not None:
                        return record.page
            time.sleep(0)  # the guest has this processor's core too
        return None

    def _fallocate(self, gfn: int, pages: int) -> None:
        offset = gfn * PAGE_SIZE - LOW_SIZE
        if _libc.fallocate(self.fd, _PUNCH, offset, pages * PAGE_SIZE) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"punch of gfn {gfn:#x}+{pages}: {os.strerror(code)}")
