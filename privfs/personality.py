# SPDX-License-Identifier: GPL-2.0-or-later
"""What each operation answers, as data: one table a personality, a source a row.

Nothing here has state.  :mod:`privfs.claims` looks a request up with :func:`fallocate_rule`
and :func:`resize_rule`, which raise :class:`Refused` and change nothing; the FUSE adapter asks
:data:`METADATA` the same way.  All offsets and lengths are bytes.

Sources: *gmem* is ``virt/kvm/guest_memfd.c`` measured on Linux 6.18; *vfs* is ``vfs_fallocate()``
in ``fs/open.c``; *v7* is MFD_INACCESSIBLE of "KVM: mm: fd-based approach for supporting KVM guest
private memory" v7 (July 2022) on shmem of Linux 5.19; *shim* is the ``mm/inaccessible`` file that
followed in September 2022; *ours* marks the choices of the resizable personality, which has no
counterpart in a kernel and follows shmem (``mm/shmem.c``) wherever shmem has an answer.

Two holes of v7 and the shim are closed: a plain fallocate past the end grew a file whose size was
fixed, and a guest fault past the end allocated.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass
from typing import Final

from privfs.extents import GROWING, Layout

PAGE_SIZE: Final = 4096
#: 32-bit page numbers: 16 TiB, the largest file (``EFBIG`` beyond).
MAX_BYTES: Final = PAGE_SIZE << 32
#: ``s_maxbytes`` of a FUSE mount; ``vfs_fallocate()`` answers ``EFBIG`` beyond.
MAX_LFS_FILESIZE: Final = (1 << 63) - 1

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

#: The modes that ``vfs_fallocate()`` passes on to a file: it looks at the end of their ranges
#: before any file may refuse the mode.  COLLAPSE 0x08, INSERT 0x20, UNSHARE 0x40 (with and without
#: KEEP_SIZE) and WRITE_ZEROES 0x80 are known to it, not to any of our files.
_VFS_MODES: Final = frozenset(
    {0x00, 0x01, 0x03, 0x08, 0x10, 0x11, 0x20, 0x40, 0x41, 0x80}
)  # fmt: skip


class Refused(Exception):
    """A request that the personality refuses; nothing has changed.

    ``errno`` goes to the caller; ``str()`` names operation, range, file size and reason.
    """

    def __init__(self, code: int, what: str) -> None:
        self.errno = code
        super().__init__(f"{errno.errorcode.get(code, code)}: {what}")


class Action(enum.Enum):
    """What an accepted ``fallocate`` does to the pages of its range."""

    ALLOCATE = "allocate"
    PUNCH = "punch"
    ZERO = "zero"


class BeyondEof(enum.Enum):
    """What happens when the range ends past the end of the file."""

    GROW = "the file grows to the end of the range"
    REFUSE = "EINVAL"
    CLIP = "only pages inside the file are touched"
    KEEP = "pages past the end are allocated, the size stays"


@dataclass(frozen=True, slots=True)
class FallocateRow:
    """One supported mode of ``fallocate(2)``."""

    action: Action
    aligned: bool
    beyond_eof: BeyondEof
    source: str


class Resizing(enum.Enum):
    """When the size may be set."""

    FREELY = "up and down at will"
    ONCE = "once, from zero"


@dataclass(frozen=True, slots=True)
class Personality:
    """Every answer of one kind of file."""

    name: str
    resizing: Resizing
    resize_errno: int  #: where ``resizing`` refuses
    fallocate: dict[int, FallocateRow]
    metadata: dict[str, int]  #: operation → errno, 0 for allowed
    read_errno: int
    write_errno: int
    eof_reads_empty: bool  #: a read past the last page returns 0 instead of ``read_errno``
    pinned_by_users: bool  #: an unlinked file lives on while a user is registered
    seals: int | None  #: that a new file has; None where there are none (EINVAL)
    source: str
    #: Bytes that come and go together; a mount on a store of larger pages replaces it.
    page_size: int = PAGE_SIZE
    #: Where its extents lie and when they end; the mount's store decides.
    layout: Layout = GROWING
    #: Whether a user can be kept from storing: its descriptors of memory can be read-only.
    read_only_users: bool = True
    mappable: bool = False  #: whether a file can be made that the host may map


_KEEP = FALLOC_FL_KEEP_SIZE
_PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_ZERO = FALLOC_FL_ZERO_RANGE

RESIZABLE: Final = Personality(
    name="resizable",
    resizing=Resizing.FREELY,
    resize_errno=errno.EINVAL,
    fallocate={
        0: FallocateRow(Action.ALLOCATE, False, BeyondEof.GROW, "shmem_fallocate"),
        _KEEP: FallocateRow(Action.ALLOCATE, False, BeyondEof.REFUSE, "ours: nothing past EOF"),
        _PUNCH: FallocateRow(Action.PUNCH, True, BeyondEof.CLIP, "gmem punch_hole"),
        _ZERO: FallocateRow(Action.ZERO, True, BeyondEof.GROW, "ours: punch, then allocate"),
        _ZERO | _KEEP: FallocateRow(Action.ZERO, True, BeyondEof.REFUSE, "ours"),
    },
    metadata={"chmod": 0, "chown": 0, "utimens": 0, "fsync": 0, "lseek": 0},
    read_errno=errno.EINVAL,
    write_errno=errno.EINVAL,
    eof_reads_empty=False,
    pinned_by_users=True,
    seals=0,
    source="ours; sizes are whole pages, everything else as shmem",
)

V7: Final = Personality(
    name="v7",
    resizing=Resizing.ONCE,
    resize_errno=errno.EPERM,  # shmem_setattr: asked before the alignment
    fallocate={
        0: FallocateRow(Action.ALLOCATE, False, BeyondEof.GROW, "shmem_fallocate"),
        _KEEP: FallocateRow(Action.ALLOCATE, False, BeyondEof.KEEP, "shmem_fallocate"),
        _PUNCH: FallocateRow(Action.PUNCH, True, BeyondEof.CLIP, "v7 shmem_fallocate"),
    },
    metadata={"chmod": 0, "chown": 0, "utimens": 0, "fsync": 0, "lseek": 0},
    read_errno=errno.EPERM,
    write_errno=errno.EPERM,
    eof_reads_empty=True,  # shmem_file_read_iter looks at i_size first
    pinned_by_users=True,  # the memslot holds a reference to the file
    seals=0x01,  # F_SEAL_SEAL: MFD_INACCESSIBLE excludes MFD_ALLOW_SEALING
    source="memfd_create(MFD_INACCESSIBLE), v7",
)

SHIM: Final = Personality(
    name="shim",
    resizing=Resizing.ONCE,
    resize_errno=errno.EPERM,  # inaccessible_setattr
    fallocate={
        0: FallocateRow(Action.ALLOCATE, False, BeyondEof.GROW, "inaccessible_fallocate"),
        _KEEP: FallocateRow(Action.ALLOCATE, False, BeyondEof.KEEP, "inaccessible_fallocate"),
        _PUNCH: FallocateRow(Action.PUNCH, True, BeyondEof.CLIP, "inaccessible_fallocate"),
    },
    metadata={
        "chmod": 0,
        "chown": 0,
        "utimens": 0,
        "fsync": errno.EINVAL,  # its file_operations are release and fallocate
        "lseek": errno.ESPIPE,
    },
    read_errno=errno.EINVAL,
    write_errno=errno.EINVAL,
    eof_reads_empty=False,
    pinned_by_users=True,
    seals=None,  # memfd_file_seals_ptr knows shmem and hugetlb only
    source="memfd_mkinaccessible, September 2022",
)

GUEST_MEMFD: Final = Personality(
    name="guest_memfd",
    resizing=Resizing.ONCE,
    resize_errno=errno.EINVAL,
    fallocate={
        _KEEP: FallocateRow(Action.ALLOCATE, True, BeyondEof.REFUSE, "kvm_gmem_allocate"),
        _PUNCH: FallocateRow(Action.PUNCH, True, BeyondEof.CLIP, "kvm_gmem_punch_hole"),
    },
    metadata={
        "chmod": errno.EINVAL,  # kvm_gmem_setattr answers EINVAL to everything
        "chown": errno.EINVAL,
        "utimens": errno.EINVAL,
        "fsync": errno.EINVAL,  # no ->fsync: vfs_fsync_range
        "lseek": errno.ESPIPE,  # no ->llseek: vfs_llseek
    },
    read_errno=errno.EINVAL,  # no ->read_iter: vfs_read
    write_errno=errno.EINVAL,
    eof_reads_empty=False,
    pinned_by_users=False,
    seals=None,
    source="KVM_CREATE_GUEST_MEMFD, Linux 6.18; the size is given by the first truncate",
    mappable=True,  # GUEST_MEMFD_FLAG_MMAP
)

PERSONALITIES: Final = {p.name: p for p in (RESIZABLE, SHIM, V7, GUEST_MEMFD)}


def fallocate_rule(
    who: Personality, mode: int, offset: int, length: int, size: int
) -> FallocateRow:
    """Look up one ``fallocate``; return its row or raise :class:`Refused`.

    The order of the checks is the kernel's: vfs first (negative or empty range, modes that no
    file has, overflow), then the file's modes, then alignment, then the end of the file.
    """

    def refused(code: int, why: str) -> Refused:
        what = f"fallocate(mode={mode:#x}, offset={offset}, length={length}) on {size} bytes"
        return Refused(code, f"{what}: {why}")

    if offset < 0 or length <= 0:
        raise refused(errno.EINVAL, "offset must be >= 0 and length > 0")
    end = offset + length
    if mode in _VFS_MODES and end > MAX_LFS_FILESIZE:
        raise refused(errno.EFBIG, f"the range ends past {MAX_LFS_FILESIZE}")
    row = who.fallocate.get(mode)
    if row is None:
        raise refused(errno.EOPNOTSUPP, f"{who.name} files do not support this mode")
    page = who.page_size
    if row.aligned and (offset % page or length % page):
        raise refused(errno.EINVAL, f"offset and length must be multiples of {page}")
    grows = end > size and row.beyond_eof is BeyondEof.GROW
    if grows and who.resizing is Resizing.ONCE and size:
        raise refused(who.resize_errno, f"the size of a {who.name} file is set once")
    if end > size and row.beyond_eof is BeyondEof.REFUSE:
        raise refused(errno.EINVAL, "the range ends past the end of the file")
    if grows and end % page:
        raise refused(errno.EINVAL, f"the new size would not be a multiple of {page}")
    if end > MAX_BYTES and row.beyond_eof is BeyondEof.GROW:
        raise refused(errno.EFBIG, f"the largest file is {MAX_BYTES} bytes")
    return row


def resize_rule(who: Personality, new_size: int, size: int) -> None:
    """Raise :class:`Refused` unless the file may change from ``size`` to ``new_size`` bytes."""
    what = f"truncate to {new_size} of a file of {size} bytes"
    if new_size < 0:
        raise Refused(errno.EINVAL, f"{what}: a size is never negative")  # do_truncate
    if who.resizing is Resizing.ONCE and size:
        raise Refused(who.resize_errno, f"{what}: the size of a {who.name} file is set once")
    if new_size % who.page_size:
        raise Refused(errno.EINVAL, f"{what}: the size must be a multiple of {who.page_size}")
    if new_size > MAX_BYTES:
        raise Refused(errno.EFBIG, f"{what}: the largest file is {MAX_BYTES} bytes")


def metadata_rule(who: Personality, operation: str) -> None:
    """Raise :class:`Refused` unless ``operation``, a key of ``metadata``, is allowed."""
    code = who.metadata[operation]
    if code:
        raise Refused(code, f"{operation}: not supported by {who.name} files ({who.source})")
