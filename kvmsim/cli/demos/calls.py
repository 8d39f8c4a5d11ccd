# SPDX-License-Identifier: GPL-2.0-or-later
"""What the modelled hardware is asked: leaves of SEAMCALL, commands of the AMD-SP, calls to EL2."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from hwemu.snp.fwstatus import Command
from hwemu.tdx import TdxModule
from hwemu.tdx.leaves import leaf_of
from kvmsim.confidential.pkvmhost import PkvmHost
from kvmsim.confidential.platform import Platform
from kvmsim.confidential.snphost import SnpHost, make_host
from kvmsim.confidential.tdxhost import make_module

#: What comes with every slice of a vCPU, and what a look at a guest itself asks.
_FREQUENT: Final = frozenset(("TDH.VP.ENTER", "SNP_GUEST_STATUS"))
_PKVM: Final = (
    "create_vm", "host_donate_guest", "host_split_guest", "guest_share_host",
    "guest_unshare_host", "guest_relinquish", "teardown",
)  # fmt: skip


class Calls:
    """Names of calls that were not refused, in order; from any thread."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._lock = threading.Lock()

    def told(self, name: str) -> None:
        """One more."""
        if name not in _FREQUENT:
            with self._lock:
                self._names.append(name)

    def take(self, last: str | None = None) -> dict[str, int]:
        """How often each was made since the last time, in order of its first; up to the first
        ``last`` if that is given: what follows comes the next time.
        """
        with self._lock:
            end = self._names.index(last) + 1 if last in self._names else len(self._names)
            taken, self._names = self._names[:end], self._names[end:]
        counts: dict[str, int] = {}
        for name in taken:
            counts[name] = counts.get(name, 0) + 1
        return counts


def _tell(of: object, method: str, name_of: Callable[..., str], calls: Calls) -> None:
    """Let a method of one piece of hardware tell of itself when it has succeeded."""
    plain = getattr(of, method)

    def told_of(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        calls.told(name_of(*args, **kwargs))
        return result

    setattr(of, method, told_of)


def _tdx(platform: Platform, calls: Calls) -> None:
    def leaf(rax: int, **registers: int) -> str:
        return leaf_of(rax)[0].name

    _tell(platform.hardware(TdxModule, make_module), "call", leaf, calls)


def _snp(platform: Platform, calls: Calls) -> None:
    def command(of: Command, **operands: Any) -> str:
        return of.name

    _tell(platform.hardware(SnpHost, make_host).firmware, "_ask", command, calls)


def _pkvm(platform: Platform, calls: Calls) -> None:
    def named(method: str) -> Callable[..., str]:
        return lambda *args, **kwargs: method

    hypervisor = platform.hardware(PkvmHost, PkvmHost).hypervisor
    for method in _PKVM:
        _tell(hypervisor, method, named(method), calls)


_WATCHED: Final[Mapping[str, Callable[[Platform, Calls], None]]] = MappingProxyType(
    {"tdx": _tdx, "snp": _snp, "pkvm": _pkvm}
)


def watch(platform: Platform, kind: str) -> Calls:
    """Make the hardware of ``kind`` tell of its calls from now on."""
    calls = Calls()
    if kind in _WATCHED:
        _WATCHED[kind](platform, calls)
    return calls
