# SPDX-License-Identifier: GPL-2.0-or-later
"""Give back what an allocation got before it ran out of memory or descriptors.

``shmem_undo_range()`` does the same in ``shmem_fallocate()``; here an allocation may lie in many
memfds, each of which undoes only what failed within it.
"""

from __future__ import annotations

from privfs.backing.memory import Backing
from privfs.memfile import MemFile
from privfs.operation import OpId, Perform


def undo(backing: Backing, file: MemFile, ino: int, perform: Perform, upto: int) -> int:
    """Free the pages of ``[start, upto)`` that the file does not have; return what is left of it.

    To be called before the allocation is reported, by the thread that changes the file.  Pages
    that another allocation under way may have got stay, all of them, and so does an extent that it
    may be in.
    """
    op, start, end = perform.op, perform.start, perform.end
    if _shared(file, op, start, end):
        return upto
    for first, last in file.holes(start, upto):
        backing.punch(ino, first, last)
    layout = backing.layout(ino)
    for index, _, _ in layout.split(start, end):
        if index not in file.instances and not _shared(file, op, *layout.extent_range(index)):
            backing.kill(ino, index)
    return start


def _shared(file: MemFile, op: OpId, start: int, end: int) -> bool:
    return any(
        other != op and low < end and start < high for other, _, low, high in file.operations()
    )
