# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows: mmap, and what can be done with a mapping of a guest_memfd that allows one.

``do_mmap()`` looks at length, offset and flags, then at the file: without ->mmap ENODEV, on a
noexec file system PROT_EXEC is EPERM.  guest_memfd with GUEST_MEMFD_FLAG_MMAP maps shared; its
faults end with SIGBUS unless the pages are shared with the host from the start (INIT_SHARED).
"""

from __future__ import annotations

from typing import Any, Final

from privfs.testing.conformance import probes_map as probe
from privfs.testing.conformance.probes_map import (
    GROWSDOWN,
    HUGETLB,
    LOCKED,
    NONBLOCK,
    NONE,
    NORESERVE,
    POPULATE,
    PRIVATE,
    SHARED,
    SHARED_VALIDATE,
    SYNC,
    R,
    W,
    X,
)
from privfs.testing.conformance.row import PAGE, SIZE, Outcome, Row, fuse, row

_PROTS: Final = {"none": NONE, "r": R, "w": W, "rw": R | W, "x": X, "rx": R | X,
                 "rwx": R | W | X}  # fmt: skip
_V7: Final = fuse("v7-mmap", "ENODEV", only=("v7",))
#: In direct_io a private mapping cannot be refused: fuse_file_mmap() has generic_file_mmap().
_COPIES: Final = fuse("private-mapping", direct_io="maps")


def _mmap(name: str, prot: int, flags: int, **more: Any) -> Row:
    return row(f"mmap.{name}", probe.maps, prot, flags, source="do_mmap", **more)


def _kinds() -> list[Row]:
    rows = []
    kinds = {"shared": SHARED, "private": PRIVATE, "validate": SHARED_VALIDATE}
    for kind, flags in kinds.items():
        for name, prot in _PROTS.items():
            if prot & X:
                rows.append(
                    _mmap(f"{kind}.{name}", prot, flags, gm="EPERM", memfd="maps", v7="EPERM")
                )
            elif flags == PRIVATE:
                rows.append(
                    _mmap(f"{kind}.{name}", prot, flags, gm="ENODEV", gm1="EINVAL", gm3="EINVAL",
                          memfd="maps", v7="EPERM", fuse=_COPIES + _V7)
                )  # fmt: skip
            else:
                rows.append(
                    _mmap(f"{kind}.{name}", prot, flags, gm="ENODEV", gm1="maps", gm3="maps",
                          memfd="maps", v7="EPERM", fuse=_V7)
                )  # fmt: skip
    return rows


def _shared(name: str, flags: int, prot: int = R | W, **more: Any) -> Row:
    more = {"gm": "ENODEV", "gm1": "maps", "gm3": "maps", "memfd": "maps", "v7": "EPERM",
            "fuse": _V7} | more  # fmt: skip
    return _mmap(name, prot, flags, **more)


_FLAGS: Final = [
    _shared("shared.populate", SHARED | POPULATE),
    _shared("shared.populate-nonblock", SHARED | POPULATE | NONBLOCK),
    _shared("shared.locked", SHARED | LOCKED),
    _shared("shared.noreserve", SHARED | NORESERVE),
    _mmap("private.populate", R, PRIVATE | POPULATE, gm="ENODEV", gm1="EINVAL", gm3="EINVAL",
          memfd="maps", v7="EPERM", fuse=fuse("populate", direct_io="hangs") + _V7),
    _mmap("private.locked", R, PRIVATE | LOCKED, gm="ENODEV", gm1="EINVAL", gm3="EINVAL",
          memfd="maps", v7="EPERM", fuse=fuse("populate", direct_io="hangs") + _V7),
    _mmap("no-kind", R, 0, gm="EINVAL", memfd="EINVAL"),
    _mmap("hugetlb", R, SHARED | HUGETLB, gm="EINVAL", memfd="EINVAL"),
    _mmap("growsdown", R, SHARED | GROWSDOWN, gm="EINVAL", memfd="EINVAL"),
    _mmap("growsdown-private", R, PRIVATE | GROWSDOWN, gm="EINVAL", memfd="EINVAL"),
    _mmap("sync", R, SHARED_VALIDATE | SYNC, gm="EOPNOTSUPP", memfd="EOPNOTSUPP"),
    _mmap("sync-shared", R, SHARED | SYNC, gm="ENODEV", gm1="maps", gm3="maps", memfd="maps",
          v7="EPERM", fuse=_V7),
    _mmap("unknown-flag", R, SHARED_VALIDATE | 1 << 21, gm="EOPNOTSUPP", memfd="EOPNOTSUPP"),
]  # fmt: skip


def _span(name: str, prot: int, flags: int, length: int, offset: int, **more: Any) -> Row:
    return row(f"mmap.{name}", probe.maps, prot, flags, length, offset, source="do_mmap", **more)


_ALLOWED: Final[dict[str, Any]] = {
    "gm": "ENODEV", "gm1": "maps", "gm3": "maps", "memfd": "maps", "v7": "EPERM", "fuse": _V7,
}  # fmt: skip
_SPANS: Final = [
    _span("length-zero", R, SHARED, 0, 0, gm="EINVAL", memfd="EINVAL"),
    _span("length-one", R, SHARED, 1, 0, **_ALLOWED),
    _span("longer-than-file", R, SHARED, 4 * SIZE, 0, **_ALLOWED),
    _span("offset-page", R, SHARED, PAGE, PAGE, **_ALLOWED),
    _span("offset-at-eof", R, SHARED, PAGE, SIZE, **_ALLOWED),
    _span("offset-unaligned", R, SHARED, PAGE, 100, gm="EINVAL", memfd="EINVAL"),
    _span("offset-negative", R, SHARED, PAGE, -PAGE, gm="EOVERFLOW", memfd="EOVERFLOW"),
    _span("offset-wraps", R, SHARED, 4 * PAGE, -2 * PAGE, gm="EOVERFLOW", memfd="EOVERFLOW"),
    _span("length-huge", R, SHARED, 1 << 62, 0, gm="ENOMEM", memfd="ENOMEM"),
]


def _touch(name: str, prot: int, flags: int, length: int, at: int, **more: Any) -> Row:
    return row(f"mmap.{name}", probe.touch, prot, flags, length, at, source="the fault handler",
               **more)  # fmt: skip


_NO_MAP: Final = "ENODEV"
_SIGBUS: Final = "maps; SIGBUS"
_COPY_SIGBUS: Final = fuse("private-mapping", direct_io=_SIGBUS)
_TOUCHES: Final = [
    _touch("load", R, SHARED, SIZE, 0, gm=_NO_MAP, gm1=_SIGBUS, gm3="maps; reads 0x0",
           memfd="maps; reads 0x0", v7="EPERM", fuse=_V7),
    _touch("store", R | W, SHARED, SIZE, 0, gm=_NO_MAP, gm1=_SIGBUS, gm3="maps; reads 0x5a",
           memfd="maps; reads 0x5a", v7="EPERM", fuse=_V7),
    _touch("load-past-eof", R, SHARED, 4 * SIZE, SIZE, gm=_NO_MAP, gm1=_SIGBUS, gm3=_SIGBUS,
           memfd=_SIGBUS, v7="EPERM", fuse=_V7),
    _touch("load-private", R, PRIVATE, SIZE, 0, gm=_NO_MAP, gm1="EINVAL", gm3="EINVAL",
           memfd="maps; reads 0x0", v7="EPERM", fuse=_COPY_SIGBUS + _V7),
    _touch("store-private", R | W, PRIVATE, SIZE, 0, gm=_NO_MAP, gm1="EINVAL", gm3="EINVAL",
           memfd="maps; reads 0x5a", v7="EPERM", fuse=_COPY_SIGBUS + _V7),
]  # fmt: skip


def _mapped(name: str, call: Any, *arguments: Any, gm1: Outcome, gm3: Outcome,
            memfd: Outcome, **more: Any) -> Row:  # fmt: skip
    """A row that needs a shared mapping: where there is none its outcome is that of mmap."""
    more.setdefault("source", "measured on Linux 6.18")
    return row(f"mapping.{name}", call, *arguments, gm=_NO_MAP, gm1=gm1, gm3=gm3, memfd=memfd,
               v7=None, **more)  # fmt: skip


#: include/uapi/asm-generic/mman-common.h.  HWPOISON and SOFT_OFFLINE would hurt the machine.
_ADVICE: Final[dict[str, tuple[int, Outcome, Outcome, Outcome]]] = {
    # name: (advice, flags 1, flags 3, memfd)
    "willneed": (3, "0", "0", "0"),
    "dontneed": (4, "0", "0", "0"),
    "free": (8, "EINVAL", "EINVAL", "EINVAL"),
    "remove": (9, "0", "0", "0"),
    "mergeable": (12, "0", "0", "0"),
    "hugepage": (14, "0", "0", "0"),
    "dontdump": (16, "0", "0", "0"),
    "wipeonfork": (18, "EINVAL", "EINVAL", "EINVAL"),
    "cold": (20, "0", "0", "0"),
    "pageout": (21, "0", "0", "0"),
    "populate-read": (22, "EFAULT", "0", "0"),
    "populate-write": (23, "EFAULT", "0", "0"),
    "dontneed-locked": (24, "0", "0", "0"),
    "collapse": (25, "EINVAL", "EINVAL", "EINVAL"),
}
_MAPPINGS: Final = [
    *(
        _mapped(f"madvise.{name}", probe.advise, advice, gm1=gm1, gm3=gm3, memfd=memfd)
        for name, (advice, gm1, gm3, memfd) in _ADVICE.items()
    ),
    _mapped("dontneed-keeps", probe.store_and_advise, 4, gm1="SIGBUS", gm3="reads 0x5a",
            memfd="reads 0x5a"),
    _mapped("remove-punches", probe.store_and_advise, 9, gm1="SIGBUS", gm3="reads 0x0",
            memfd="reads 0x0"),
    _mapped("punch-zeroes", probe.store_and_punch, gm1="SIGBUS", gm3="reads 0x0 0x5a",
            memfd="reads 0x0 0x5a"),
    _mapped("allocate-keeps", probe.store_and_allocate, gm1="SIGBUS", gm3="reads 0x5a",
            memfd="reads 0x5a"),
    _mapped("outlives-descriptor", probe.keeps_file, gm1="SIGBUS", gm3="reads 0x5a",
            memfd="reads 0x5a"),
    _mapped("mlock", probe.lock, gm1="ENOMEM", gm3="0", memfd="0"),
    _mapped("msync", probe.sync, gm1="EINVAL", gm3="EINVAL", memfd="0"),
    _mapped("mprotect-none", probe.protect, NONE, gm1="0", gm3="0", memfd="0"),
    _mapped("mprotect-exec", probe.protect, R | X, gm1="EACCES", gm3="EACCES", memfd="0"),
    _mapped("mincore", probe.core, gm1="0", gm3="0", memfd="0"),
    _mapped("mbind", probe.bind, gm1="0", gm3="0", memfd="0"),
    _mapped("copy-from-user", probe.copy_in, gm1="EFAULT", gm3="8", memfd="8"),
    _mapped("vmsplice", probe.gup, gm1="EFAULT", gm3=str(PAGE), memfd=str(PAGE)),
    _mapped("process_vm_readv", probe.remote_read, gm1="EFAULT", gm3="8", memfd="8"),
    _mapped("proc-mem", probe.proc_mem, gm1="EIO", gm3="8", memfd="8"),
    _mapped("userfaultfd-missing", probe.register_userfaultfd, 1, gm1="EINVAL", gm3="EINVAL",
            memfd="0"),
    _mapped("userfaultfd-minor", probe.register_userfaultfd, 4, gm1="EINVAL", gm3="EINVAL",
            memfd="0"),
    _mapped("remap_file_pages", probe.remap_pages, gm1="0", gm3="0", memfd="0"),
    _mapped("mremap-grow", probe.grow, gm1="0", gm3="0", memfd="0"),
    _mapped("python", probe.python_mmap, gm1="maps", gm3="maps", memfd="maps"),
]  # fmt: skip

ROWS: Final = [*_kinds(), *_FLAGS, *_SPANS, *_TOUCHES, *_MAPPINGS]
