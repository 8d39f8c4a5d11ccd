# SPDX-License-Identifier: GPL-2.0-or-later
"""The sans-IO core as a target: what privfs.memfile answers with no kernel around it.

Only rows about memory and metadata concern it; :data:`ANSWERS` maps their probes to the model's
own.  Steps are performed at once and always succeed, as if no user had registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from privfs.budget import Budget
from privfs.memfile import MemFile
from privfs.operation import Done, Effect, Fallocate, Perform, Request, Resize
from privfs.personality import PERSONALITIES, Personality, Refused, metadata_rule
from privfs.testing.conformance import probes_io, probes_memory, probes_meta
from privfs.testing.conformance.row import PAGE, SIZE, Mode, Outcome, Probe, Row, Start
from privfs.testing.conformance.syscalls import errno_name

_KEEP_SIZE: Final = 1
#: Pages of the mount that the model stands for.
_BUDGET: Final = 1 << 20


class ModelFile:
    """One private file of a personality and the calls that rows make of it."""

    def __init__(self, who: Personality, start: Start) -> None:
        self.who = who
        self.file = MemFile(who, Budget(_BUDGET))
        self._calls = 0
        if start is not Start.EMPTY:
            self.call(Resize(SIZE))
        if start is Start.FILLED:
            self.call(Fallocate(_KEEP_SIZE, 0, SIZE))

    def call(self, request: Request) -> int:
        """Perform a request to its end and return its errno."""
        self._calls += 1
        op = self._calls
        waiting: list[Effect] = list(self.file.submit(op, request))
        while waiting:
            effect = waiting.pop(0)
            if isinstance(effect, Done) and effect.op == op:
                return effect.errno
            if isinstance(effect, Perform):
                waiting += self.file.step_done(effect.op)
        raise AssertionError(f"{request}: never answered")

    def observed(self, request: Request) -> Outcome:
        """Perform a request; its outcome as the probes of the kernel write it."""
        size, pages = self.file.size, self.file.allocated
        code = self.call(request)
        outcome = errno_name(code) if code else "0"
        if code and self.file.allocated != pages:
            return f"{outcome} but st_blocks changed"
        if self.file.size != size:
            return f"{outcome}{' but' if code else ''} size={self.file.size}"
        return outcome

    def fallocate(self, mode: int, offset: int, length: int) -> Outcome:
        """fallocate(2)."""
        return self.observed(Fallocate(mode, offset, length))

    def twice(self, mode: int, offset: int, length: int) -> Outcome:
        """fallocate(2) of the same range again."""
        request = Fallocate(mode, offset, length)
        return f"{self.observed(request)}, {self.observed(request)}"

    def modes(self, first: int, last: int) -> Outcome:
        """Every mode in [first, last]."""
        return probes_memory.grouped(
            (mode, self.fallocate(mode, PAGE, PAGE)) for mode in range(first, last + 1)
        )

    def high_bits(self, extra: int) -> Outcome:
        """Each mode bit from 8 to 31."""
        found = {self.fallocate(extra | 1 << bit, PAGE, PAGE) for bit in range(8, 32)}
        return " ".join(sorted(found))

    def ftruncate(self, *sizes: int) -> Outcome:
        """ftruncate(2), once for each size."""
        return ", ".join(self.observed(Resize(size)) for size in sizes)

    def allocated(self, *operations: tuple[int, int, int]) -> Outcome:
        """The pages after fallocate(2) of each (mode, offset, length)."""
        for operation in operations:
            code = self.call(Fallocate(*operation))
            if code:
                return errno_name(code)
        return f"{self.file.allocated} pages"

    def shrink_and_grow(self, small: int, large: int) -> Outcome:
        """The pages after shrinking and growing."""
        self.call(Resize(small))
        self.call(Resize(large))
        return f"{self.file.allocated} pages"

    def metadata(self, operation: str) -> Outcome:
        """What the personality's table says of an operation on metadata."""
        try:
            metadata_rule(self.who, operation)
        except Refused as refused:
            return errno_name(refused.errno)
        return "0"


def _metadata(operation: str) -> Callable[..., Outcome]:
    return lambda file, *arguments: file.metadata(operation)


#: Probe of a row → what the model answers instead.
ANSWERS: Final[dict[Probe, Callable[..., Outcome]]] = {
    probes_memory.fallocate: ModelFile.fallocate,
    probes_memory.fallocate_twice: ModelFile.twice,
    probes_memory.modes: ModelFile.modes,
    probes_memory.high_bits: ModelFile.high_bits,
    probes_memory.ftruncate: ModelFile.ftruncate,
    probes_memory.truncate: ModelFile.ftruncate,
    probes_memory.allocated: ModelFile.allocated,
    probes_memory.shrink_and_grow: ModelFile.shrink_and_grow,
    probes_meta.fsync: _metadata("fsync"),
    probes_meta.fdatasync: _metadata("fsync"),
    probes_meta.fchmod: _metadata("chmod"),
    probes_meta.chmod: _metadata("chmod"),
    probes_meta.fchown: _metadata("chown"),
    probes_io.read: lambda file, length: errno_name(file.who.read_errno),
    probes_io.write: lambda file, length: errno_name(file.who.write_errno),
}


def expected(personality: str, row: Row) -> Outcome | None:
    """Return what the model must answer, None if the row does not concern it.

    What a mount answers: its differences in memory are the model's own choices; the kernel's
    rows (a read of nothing) never reach it.
    """
    if row.probe not in ANSWERS or row.name.endswith(".zero-bytes"):
        return None
    return row.answer(personality, Mode.PASSTHROUGH)


def run(personality: str, rows: Iterable[Row]) -> Iterator[tuple[Row, Outcome]]:
    """Yield every row that concerns the model of a personality, with its outcome."""
    for row in rows:
        if expected(personality, row) is not None:
            file = ModelFile(PERSONALITIES[personality], row.start)
            yield row, _answer(row)(file, *row.arguments)


def _answer(row: Row) -> Any:
    return ANSWERS[row.probe]
