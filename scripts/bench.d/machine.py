# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the numbers come from: processor, kernel, versions, and how busy the machine is."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from privfs.doctor import versions

_WATCH_SECONDS = 0.5
_BUSY_SHARE = 0.1
_BUSY_LOAD = 0.5
# Fields of /proc/stat (proc(5)) that are not work: idle, iowait; guest time is in user already.
_IDLE = (3, 4)
_FIELDS = 8


@dataclass(frozen=True, slots=True)
class Facts:
    """The head of a report."""

    date: str
    processor: str
    cpus: int
    virtual: bool
    memory_gib: float
    load: tuple[float, float, float]
    busy: float  #: share of the processors' time that others used just now
    versions: dict[str, str]

    def warnings(self) -> list[str]:
        """Say what speaks against trusting the numbers."""
        found = []
        if self.busy > _BUSY_SHARE or self.load[0] > _BUSY_LOAD:
            found.append(
                f"the machine is not idle (load {self.load[0]:.2f}, {self.busy:.0%} of its time "
                "in use before the first case): trust ratios, not times"
            )
        if self.virtual:
            found.append(
                "this is a virtual machine: waking an idle CPU leaves the guest, which can cost "
                "more than all the rest; compare within a placement only"
            )
        return found


def look() -> Facts:
    """Find out; watches the machine for half a second."""
    model, flags = "unknown", ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        elif name.strip() == "flags":
            flags = value
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Facts(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        processor=model,
        cpus=os.cpu_count() or 1,
        virtual=" hypervisor" in flags,
        memory_gib=round(pages / (1 << 30), 1),
        load=os.getloadavg(),
        busy=_busy_share(),
        versions=versions() | {"libc": " ".join(platform.libc_ver()), "gcc": _compiler()},
    )


def _times() -> tuple[int, int]:
    with open("/proc/stat") as stat:
        fields = [int(field) for field in stat.readline().split()[1 : 1 + _FIELDS]]
    return sum(fields), sum(fields[i] for i in _IDLE)


def _busy_share() -> float:
    total, idle = _times()
    time.sleep(_WATCH_SECONDS)
    later_total, later_idle = _times()
    passed = later_total - total
    return 1 - (later_idle - idle) / passed if passed else 0.0


def _compiler() -> str:
    try:
        done = subprocess.run(["cc", "-dumpfullversion"], capture_output=True, text=True, timeout=5)
    except OSError:
        return "missing"
    return done.stdout.strip() or "unknown"
