# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a mount answers otherwise than the file that it stands for.

Every key that a row's :class:`~privfs.testing.conformance.row.Differs` names is here, and every
key here is named by a row (tests/conformance/test_rows.py).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final


class Cause(enum.Enum):
    """Who decides a difference."""

    KERNEL = "The kernel answers by itself; the daemon is not asked, or cannot refuse so."
    FILES = "A mount has files with names, and shows how much memory they hold."
    REPAIRED = "What the original got wrong, or could not promise, is not repeated."
    CALLER = "The caller, not the file: whoever may less is refused earlier."


@dataclass(frozen=True, slots=True)
class Reason:
    """A cause and the sentence for it."""

    cause: Cause
    text: str


def _kernel(text: str) -> Reason:
    return Reason(Cause.KERNEL, text)


REASONS: Final[dict[str, Reason]] = {
    "zero-bytes": _kernel(
        "An I/O of no bytes returns 0 before it is a request (fuse_file_read_iter and its like); "
        "without ->read_iter vfs_read() refuses it."
    ),
    "read-iter": _kernel(
        "A FUSE file has ->read_iter, so the pointer (access_ok) is looked at before the refusal, "
        "and io_submit(2) takes a request whose event then tells the refusal."
    ),
    "rw-flags": _kernel(
        "Flags that FUSE does not know (RWF_NOWAIT, RWF_ATOMIC, RWF_DONTCACHE) are looked at by "
        "kiocb_set_rw_flags(), which a file without ->read_iter never reaches."
    ),
    "pins-first": _kernel(
        "fuse_get_user_pages() pins the caller's buffer before READ or WRITE is sent to the daemon."
    ),
    "seekable": _kernel(
        "A FUSE file has ->llseek. Files without it lack FMODE_PREAD, and pread is ESPIPE before "
        "anything else. Without passthrough FOPEN_NONSEEKABLE and FOPEN_STREAM say so; together "
        "with passthrough the kernel fails such an open with EIO (FOPEN_PASSTHROUGH_MASK). "
        "SEEK_SET and SEEK_CUR then never leave the kernel, SEEK_END asks for the size."
    ),
    "readahead": _kernel(
        "ksys_readahead() wants address_space operations, which FUSE has; it starts no READ that "
        "anybody could see, and no data move."
    ),
    "regular-file": _kernel(
        "do_vfs_ioctl() answers these for regular files that are not anonymous inodes "
        "(file_ioctl). FS_IOC_RESVSP, UNRESVSP and ZERO_RANGE become a fallocate, which obeys the "
        "table of the personality."
    ),
    "rlimit-fsize": _kernel(
        "inode_newsize_ok() comes before the request: beyond RLIMIT_FSIZE the caller gets EFBIG "
        "and SIGXFSZ. Nothing is changed in either case."
    ),
    "set-direct": _kernel(
        "F_SETFL of O_DIRECT is not a request; FUSE files have FMODE_CAN_ODIRECT. Reads and "
        "writes are refused with it as without."
    ),
    "writer-count": _kernel(
        "A lease counts who has the file open for writing (check_conflicting_open). open(2) counts "
        "its own (i_writecount), alloc_file_pseudo() does not."
    ),
    "epoll": _kernel("FUSE files have ->poll, so epoll takes them; they are always ready."),
    "acl": _kernel(
        "An ACL is read by fuse_get_acl() before any request: ENODATA on a mount of the initial "
        "user namespace, EOPNOTSUPP on any other."
    ),
    "file-system": _kernel(
        "The superblock is FUSE's: its magic number, its file handles, its nosuid, nodev, noexec. "
        "`stat -f` shows the type as fuseblk, /proc/mounts as fuse.privfs."
    ),
    "other-mount": _kernel(
        "Copies and clones between two file systems are refused before either file is asked; v7 "
        "was a memfd and shared its file system with other memfds."
    ),
    "no-xattr": _kernel(
        "getxattr and setxattr answer ENOSYS once and for all: otherwise the kernel would ask for "
        "security.capability before every fallocate and truncate."
    ),
    "seals": _kernel("fcntl seals exist on shmem and hugetlbfs alone (memfd_file_seals_ptr)."),
    "v7-mmap": _kernel(
        "A mount refuses mappings by having no ->mmap: ENODEV. v7 refused them in shmem_mmap()."
    ),
    "noexec": _kernel("The mount is noexec, as later kernels make such files; v7's were not."),
    "swap-header": _kernel(
        "swapon reads the file's first page; v7's page cache could not be read that way."
    ),
    "private-mapping": _kernel(
        "Without passthrough a file that is readable can be mapped privately: FUSE installs the "
        "mapping, and the first touch is a READ that is refused: SIGBUS. No byte is seen."
    ),
    "populate": _kernel(
        "As above, but populate_vma_page_range() repeats the refused READ until a fatal signal "
        "comes. The daemon lets 50 a second through, so that it costs nobody else anything."
    ),
    "page-cache-splice": _kernel(
        "fuse_splice_read() goes by the page cache and ends at the end of the file by itself; a "
        "file that is not seekable is refused before."
    ),
    "named": Reason(
        Cause.FILES,
        "The file was created with a name in a directory, and has an owner and a mode; it is no "
        "pseudo file, so that inotify, fanotify and Landlock know it, and may have more names and "
        "bind mounts.",
    ),
    "reopens": Reason(
        Cause.FILES,
        "open(2) of /proc/self/fd/N is an open of a file that has a name, with the rights of its "
        "mode; anonymous files have no_open(). The new descriptor is held to the same table.",
    ),
    "st-blocks": Reason(
        Cause.FILES,
        "`du` shows the private memory that a file holds, `df` the budget; guest_memfd shows 0.",
    ),
    "daemon-pages": Reason(
        Cause.FILES,
        "The pages are those of memfds of the daemon, in whose page cache they count; the file has "
        "no page cache of its own.",
    ),
    "allocated-is-data": Reason(
        Cause.FILES,
        "SEEK_DATA and SEEK_HOLE show which pages are allocated. shmem calls pages that were "
        "allocated but never touched holes; nobody can touch ours through the file.",
    ),
    "growth-hole": Reason(
        Cause.REPAIRED,
        "A plain fallocate past the end grew a file whose size was said to be fixed "
        "(shmem_fallocate does not know of the rule in shmem_setattr).",
    ),
    "whole-pages": Reason(
        Cause.REPAIRED, "A fallocate from size 0 could leave a size that is no multiple of a page."
    ),
    "page-numbers": Reason(
        Cause.REPAIRED, "The largest file is 16 TiB: page numbers have 32 bits."
    ),
    "unprivileged": Reason(
        Cause.CALLER,
        "CAP_SYS_ADMIN or CAP_SYS_RAWIO in the initial user namespace is asked for first. The "
        "reference was measured by root.",
    ),
}
