# SPDX-License-Identifier: GPL-2.0-or-later
"""The records between the owner of a file and its users: 40 bytes, fixed offsets.

A frame is one ``SOCK_SEQPACKET`` packet of 1 to :data:`MAX_RECORDS` records, with at most
:data:`MAX_FDS` file descriptors beside it; a record with ``F_FD`` takes the next one.
Units are pages in half-open ranges; ``seq`` counts a session's registrations and
invalidations from 1.
:data:`LAYOUT` says for every op who may send it and which fields it uses; :func:`parse` refuses
everything else, because a peer that sends nonsense cannot be trusted to have unmapped anything.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

VERSION: Final = 1
RECORD: Final = struct.Struct("<BBHIQQQQ")
MAX_RECORDS: Final = 1024
MAX_FDS: Final = 8
MAX_FRAME: Final = MAX_RECORDS * RECORD.size
#: Pages that one GET may ask for.
MAX_GRANT: Final = 512
#: Page numbers are 32 bits wide; an open-ended range ends here.
MAX_PAGES: Final = 1 << 32


class Op(enum.IntEnum):
    """What a record says."""

    HELLO = 1
    WELCOME = 2
    REGISTER = 3
    REGISTERED = 4
    UNREGISTER = 5
    GET = 6
    PAGE = 7
    INVALIDATE = 8
    ACK = 9
    ALLOCATE = 10
    PUNCH = 11
    REPLY = 12
    EXTENT = 13
    BYE = 14


class Flag(enum.IntFlag):
    """Flags of a record."""

    NONE = 0
    FD = 1  #: takes the next file descriptor of the frame
    WRITE = 2  #: GET: the access is a store
    EXTENT = 4  #: GET: send the extent's descriptor again; INVALIDATE: extents die with the range
    EXCLUSIVE = 8  #: REGISTER: no other session may have the file


#: Flag.FD as a plain number: the operators of an IntFlag cost more than the rest of a record.
FD: Final = int(Flag.FD)


class Reason(enum.IntEnum):
    """Why pages go away (``status`` of INVALIDATE)."""

    PUNCH = 1
    TRUNCATE = 2
    MOVE = 3
    REVOKE = 4


class Fence(enum.IntEnum):
    """What keeps a process that should not from touching pages (``status`` of HELLO)."""

    NONE = 0
    MPROTECT = 1  #: PROT_NONE where nothing is granted: it dies of its own mistakes
    UFFD = 2  #: userfaultfd(2), a copy of which comes along: also where it hangs

    @property
    def text(self) -> str:
        """What people call it."""
        return self.name.lower()


class Record(NamedTuple):
    """One record.  ``obj`` is an inode number unless :data:`LAYOUT` says otherwise."""

    op: int
    flags: int = 0
    status: int = 0
    req: int = 0
    obj: int = 0
    start: int = 0
    end: int = 0
    seq: int = 0


class WireError(Exception):
    """The peer sent something that no correct peer sends; the session ends."""


class To(enum.Enum):
    """Which side may receive an op."""

    OWNER = "user → owner"
    USER = "owner → user"
    BOTH = "both ways"


@dataclass(frozen=True, slots=True)
class Fields:
    """The contract of one op.

    ``uses`` names the fields with a meaning; all others must be zero.  ``ranged`` demands
    ``start < end <= 2**32``, ``reasoned`` a :class:`Reason` in ``status``, ``fenced`` a
    :class:`Fence` there, with its descriptor if it is one.  ``meaning`` goes into the protocol
    page.
    """

    to: To
    uses: dict[str, str]
    meaning: str
    flags: Flag = Flag.NONE
    needs_fd: bool = False
    ranged: bool = False
    reasoned: bool = False
    fenced: bool = False


_RANGE = {"start": "first page", "end": "page after the last"}

LAYOUT: Final[dict[Op, Fields]] = {
    Op.HELLO: Fields(
        To.OWNER,
        {"req": "request", "start": "version", "end": "id of the session that it replaces, or 0",
         "status": "fence", "obj": "label, bytes 0–7", "seq": "label, bytes 8–15"},
        "first record of a session; promises that nothing is mapped for it, nor any more for the "
        "session of the same process that it replaces",
        flags=Flag.FD, fenced=True,
    ),
    Op.WELCOME: Fields(
        To.USER,
        {"req": "request", "status": "errno", "start": "version", "seq": "session id"},
        "answer to HELLO",
    ),
    Op.REGISTER: Fields(
        To.OWNER, {"req": "request", "start": "purpose"},
        "become a user of the file whose descriptor comes along, with EXCLUSIVE its only one",
        flags=Flag.FD | Flag.EXCLUSIVE, needs_fd=True,
    ),
    Op.REGISTERED: Fields(
        To.USER,
        {"req": "request", "status": "errno", "obj": "inode", "start": "1 if stores are granted",
         "end": "pages in the file", "seq": "a seq of its own; older grants are void"},
        "answer to REGISTER",
    ),
    Op.UNREGISTER: Fields(
        To.OWNER, {"req": "request", "obj": "inode"},
        "every mapping is gone and every access has left; counts as ack of what is in flight",
    ),
    Op.GET: Fields(
        To.OWNER,
        {"req": "request", "obj": "inode", "seq": "the page that faulted", **_RANGE},
        "a fault: allocate that page if it is a hole; the range is the window for fault-around",
        flags=Flag.WRITE | Flag.EXTENT, ranged=True,
    ),
    Op.PAGE: Fields(
        To.USER,
        {"req": "request", "status": "errno", "obj": "extent instance",
         "seq": "last seq sent to this session", **_RANGE},
        "the granted range; install only what no newer processed invalidation overlaps",
    ),
    Op.INVALIDATE: Fields(
        To.USER,
        {"obj": "inode", "status": "reason", "seq": "its own seq", **_RANGE},
        "zap the range and acknowledge; also after UNREGISTER has crossed it",
        flags=Flag.EXTENT, ranged=True, reasoned=True,
    ),
    Op.ACK: Fields(
        To.OWNER, {"seq": "the seq acknowledged"},
        "no thread can reach the range, no stale translation, no access inside",
    ),
    Op.ALLOCATE: Fields(
        To.OWNER, {"req": "request", "obj": "inode", **_RANGE}, "as fallocate(KEEP_SIZE)",
        ranged=True,
    ),
    Op.PUNCH: Fields(
        To.OWNER, {"req": "request", "obj": "inode", **_RANGE},
        "as fallocate(PUNCH_HOLE|KEEP_SIZE); a user must not call the mount from its ack path",
        ranged=True,
    ),
    Op.REPLY: Fields(
        To.USER, {"req": "request", "status": "errno"}, "answer to UNREGISTER, ALLOCATE, PUNCH",
    ),
    Op.EXTENT: Fields(
        To.USER,
        {"obj": "inode", "seq": "extent instance", **_RANGE},
        "the memfd behind a range of the file; page p lies at offset (p - start) × 4096",
        flags=Flag.FD, needs_fd=True, ranged=True,
    ),
    Op.BYE: Fields(
        To.BOTH, {"status": "errno"}, "orderly end; without it the end of a session is a failure",
    ),
}  # fmt: skip


def label_words(label: str) -> tuple[int, int]:
    """Pack a label of at most 16 bytes of UTF-8 into HELLO's ``obj`` and ``seq``."""
    raw = label.encode()
    if len(raw) > 16:
        raise ValueError(f"label {label!r}: at most 16 bytes, got {len(raw)}")
    raw = raw.ljust(16, b"\0")
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def words_label(low: int, high: int) -> str:
    """Unpack a label; unprintable characters become ``?``, since it goes to terminals."""
    raw = low.to_bytes(8, "little") + high.to_bytes(8, "little")
    text = raw.rstrip(b"\0").decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)


def pack(records: Iterable[Record]) -> bytes:
    """Serialise records into the bytes of a frame."""
    return b"".join([RECORD.pack(*r) for r in records])


def parse(frame: bytes, to: To) -> list[Record]:
    """Parse and check a frame received by side ``to``; raise :class:`WireError`."""
    if not frame or len(frame) % RECORD.size or len(frame) > MAX_FRAME:
        raise WireError(f"frame of {len(frame)} bytes: not 1 to {MAX_RECORDS} records of 40 bytes")
    records = [Record(*fields) for fields in RECORD.iter_unpack(frame)]
    for record in records:
        _check(record, to)
    return records


def _check(record: Record, to: To) -> None:
    fields = _LAYOUT_BY_NUMBER.get(record.op)
    if fields is None:
        raise WireError(f"record with unknown op {record.op}")
    flags = record.flags
    if fields.to is not to and fields.to is not To.BOTH:
        raise _error(record, f"may only be sent {fields.to.value}")
    if flags and flags & ~int(fields.flags):  # of an IntFlag, ~ is only what the enum knows
        raise _error(record, f"flags {flags:#x}, allowed {int(fields.flags):#x}")
    if fields.needs_fd and not flags & FD:
        raise _error(record, "comes without a file descriptor")
    for index in _UNUSED[record.op]:
        if record[index]:
            raise _error(record, f"field {Record._fields[index]} must be 0, is {record[index]}")
    if fields.ranged and not record.start < record.end <= MAX_PAGES:
        raise _error(record, f"bad range [{record.start:#x}, {record.end:#x})")
    if fields.reasoned and record.status not in _REASONS:
        raise _error(record, f"unknown reason {record.status}")
    if fields.fenced:
        if record.status not in _FENCES:
            raise _error(record, f"unknown fence {record.status}")
        if bool(flags & FD) != (record.status == Fence.UFFD):
            raise _error(record, "a userfaultfd comes with its fence, and with no other")


def _error(record: Record, why: str) -> WireError:
    return WireError(f"{Op(record.op).name}: {why}")


_VALUES = ("status", "req", "obj", "start", "end", "seq")
_REASONS: Final = frozenset(int(reason) for reason in Reason)
_FENCES: Final = frozenset(int(fence) for fence in Fence)
_LAYOUT_BY_NUMBER: Final = {int(op): fields for op, fields in LAYOUT.items()}
_UNUSED: Final = {
    int(op): tuple(Record._fields.index(v) for v in _VALUES if v not in fields.uses)
    for op, fields in LAYOUT.items()
}
