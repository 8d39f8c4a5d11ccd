# SPDX-License-Identifier: GPL-2.0-or-later
"""Probes that change what the file holds: fallocate, truncate, lseek.

An outcome is "0" or an errno name, followed by what else became visible: ``size=`` in bytes if
the size changed, "but ..." if a refused call changed something.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterable

from privfs.testing.conformance.row import PAGE
from privfs.testing.conformance.subject import Subject
from privfs.testing.conformance.syscalls import Argument, Nr, call, errno_name


def _observed(f: Subject, number: Nr, *arguments: Argument) -> str:
    before = os.fstat(f.fd)
    try:
        call(number, *arguments)
        outcome = "0"
    except OSError as error:
        outcome = errno_name(error.errno or 0)
    after = os.fstat(f.fd)
    if outcome != "0" and after.st_blocks != before.st_blocks:
        return f"{outcome} but st_blocks changed"
    if after.st_size != before.st_size:
        but = "" if outcome == "0" else " but"
        return f"{outcome}{but} size={after.st_size}"
    return outcome


def fallocate(f: Subject, mode: int, offset: int, length: int) -> str:
    """fallocate(2)."""
    return _observed(f, Nr.FALLOCATE, f.fd, mode, offset, length)


def fallocate_twice(f: Subject, mode: int, offset: int, length: int) -> str:
    """fallocate(2) of the same range again: a retry is idempotent."""
    first = fallocate(f, mode, offset, length)
    return f"{first}, {fallocate(f, mode, offset, length)}"


def modes(f: Subject, first: int, last: int) -> str:
    """Every mode in [first, last] on a page inside the file."""
    return grouped((mode, fallocate(f, mode, PAGE, PAGE)) for mode in range(first, last + 1))


def grouped(found: Iterable[tuple[int, str]]) -> str:
    """Write (mode, outcome) pairs by outcome, the most frequent one last and without modes."""
    by_outcome: dict[str, list[str]] = {}
    for mode, outcome in found:
        by_outcome.setdefault(outcome, []).append(f"{mode:#x}")
    rest = max(by_outcome, key=lambda outcome: len(by_outcome[outcome]))
    named = [f"{one}: {' '.join(which)}" for one, which in by_outcome.items() if one != rest]
    return "; ".join([*named, f"else {rest}"])


def high_bits(f: Subject, extra: int) -> str:
    """Each mode bit from 8 to 31 alone, together with ``extra``."""
    found = {fallocate(f, extra | 1 << bit, PAGE, PAGE) for bit in range(8, 32)}
    return " ".join(sorted(found))


def limited(f: Subject, limit: int, number: str, *arguments: int) -> str:
    """A growing call beyond RLIMIT_FSIZE; SIGXFSZ is shown."""
    heard: list[int] = []
    signal.signal(signal.SIGXFSZ, lambda number, frame: heard.append(number))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    outcome = _observed(f, Nr[number], f.fd, *arguments)
    return outcome + (" SIGXFSZ" if heard else "")


def ftruncate(f: Subject, *sizes: int) -> str:
    """ftruncate(2), once for each size."""
    return ", ".join(_observed(f, Nr.FTRUNCATE, f.fd, size) for size in sizes)


def truncate(f: Subject, size: int) -> str:
    """truncate(2) by the path of the open file."""
    return _observed(f, Nr.TRUNCATE, os.fsencode(f.proc), size)


def allocated(f: Subject, *operations: tuple[int, int, int]) -> str:
    """fallocate(2) of each (mode, offset, length); the pages that st_blocks shows then."""
    for mode, offset, length in operations:
        call(Nr.FALLOCATE, f.fd, mode, offset, length)
    return f"{os.fstat(f.fd).st_blocks * 512 // PAGE} pages"


def shrink_and_grow(f: Subject, small: int, large: int) -> str:
    """Shrink and grow: the pages that st_blocks shows then."""
    call(Nr.FTRUNCATE, f.fd, small)
    call(Nr.FTRUNCATE, f.fd, large)
    return f"{os.fstat(f.fd).st_blocks * 512 // PAGE} pages"


def lseek(f: Subject, offset: int, whence: int) -> int:
    """lseek(2)."""
    return call(Nr.LSEEK, f.fd, offset, whence)


def seek_after(f: Subject, punched: tuple[int, int], offset: int, whence: int) -> int:
    """Punch (offset, length), then lseek(2): is the allocation map visible?"""
    call(Nr.FALLOCATE, f.fd, 3, *punched)
    return call(Nr.LSEEK, f.fd, offset, whence)
