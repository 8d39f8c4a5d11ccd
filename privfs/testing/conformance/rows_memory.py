# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows: fallocate, truncate, lseek.

Sources: *vfs* is ``vfs_fallocate()`` and ``do_truncate()`` of ``fs/open.c``; *gmem* is
``virt/kvm/guest_memfd.c``; *shmem* is ``mm/shmem.c``; *v7* the MFD_INACCESSIBLE series on it.
"""

from __future__ import annotations

import os
from typing import Any, Final

from privfs.testing.conformance import probes_memory as probe
from privfs.testing.conformance.row import PAGE, SIZE, Differs, Outcome, Row, Start, fuse, row

KEEP, PUNCH, NO_HIDE, COLLAPSE, ZERO, INSERT, UNSHARE, WRITE_ZEROES = (
    0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80,
)  # fmt: skip
_LIMIT: Final = 1 << 63

#: (offset, length) by name.
RANGES: Final[dict[str, tuple[int, int]]] = {
    "page": (PAGE, PAGE),
    "whole": (0, SIZE),
    "unaligned-offset": (PAGE + 1, PAGE),
    "unaligned-length": (PAGE, 100),
    "unaligned-both": (1, 1),
    "last-page": (SIZE - PAGE, PAGE),
    "across-eof": (SIZE - PAGE, 2 * PAGE),
    "at-eof": (SIZE, PAGE),
    "beyond-eof": (SIZE + 4 * PAGE, PAGE),
    "unaligned-beyond-eof": (SIZE + 4 * PAGE, 100),
    "terabyte": (0, 1 << 40),
    "to-the-limit": (0, _LIMIT - PAGE),
    "end-overflows": (_LIMIT - PAGE, 2 * PAGE),
    "end-at-limit": (PAGE, _LIMIT - PAGE),
    "empty": (PAGE, 0),
    "negative-length": (PAGE, -PAGE),
    "negative-offset": (-PAGE, PAGE),
}
#: What vfs answers for any mode that it knows.
_VFS: Final = {
    "end-overflows": "EFBIG", "end-at-limit": "EFBIG",
    "empty": "EINVAL", "negative-length": "EINVAL", "negative-offset": "EINVAL",
}  # fmt: skip
_UNALIGNED: Final = dict.fromkeys(
    ("unaligned-offset", "unaligned-length", "unaligned-both", "unaligned-beyond-eof"), "EINVAL"
)
_PAST: Final = ("across-eof", "at-eof", "beyond-eof", "unaligned-beyond-eof", "terabyte",
                "to-the-limit")  # fmt: skip
_GROWN: Final = {
    "across-eof": f"0 size={SIZE + PAGE}",
    "at-eof": f"0 size={SIZE + PAGE}",
    "beyond-eof": f"0 size={SIZE + 5 * PAGE}",
}


def _all(default: Outcome, *exceptions: dict[str, Outcome]) -> dict[str, Outcome]:
    answers = dict.fromkeys(RANGES, default) | _VFS
    for exception in exceptions:
        answers |= exception
    return answers


_PUNCHES: Final = _all("0", _UNALIGNED)
#: An allocation of a terabyte would be tried by a memfd and by files without a fixed end.
_UNBOUNDED: Final = dict.fromkeys(("terabyte", "to-the-limit"), "")
_SHMEM_GROWS: Final = _all(
    "0", _GROWN, {"unaligned-beyond-eof": f"0 size={SIZE + 4 * PAGE + 100}"}, _UNBOUNDED
)

#: Answers of the modes that some kind of file supports: mode → column → range → outcome.
SUPPORTED: Final[dict[int, dict[str, dict[str, Outcome]]]] = {
    0: {
        "gm": _all("EOPNOTSUPP"),
        "memfd": _SHMEM_GROWS,
        "v7": _SHMEM_GROWS,
        "shim": _SHMEM_GROWS,
        "resizable": _all(
            "0", _GROWN,
            {"unaligned-beyond-eof": "EINVAL", "terabyte": "ENOSPC", "to-the-limit": "EFBIG"},
        ),
    },
    KEEP: {
        "gm": _all("0", _UNALIGNED, dict.fromkeys(_PAST, "EINVAL")),
        "memfd": _all("0", _UNBOUNDED),
        "v7": _all("0", _UNBOUNDED),
        "shim": _all("0", _UNBOUNDED),
        "resizable": _all("0", dict.fromkeys(_PAST, "EINVAL")),
    },
    PUNCH | KEEP: {
        "gm": _PUNCHES,
        "memfd": _all("0"),
        "v7": _PUNCHES,
        "shim": _PUNCHES,
        "resizable": _PUNCHES,
    },
    ZERO: {
        "gm": _all("EOPNOTSUPP"),
        "memfd": _all("EOPNOTSUPP"),
        "v7": _all("EOPNOTSUPP"),
        "shim": _all("EOPNOTSUPP"),
        "resizable": _all(
            "0", _GROWN, _UNALIGNED, {"terabyte": "ENOSPC", "to-the-limit": "EFBIG"}
        ),
    },
    ZERO | KEEP: {
        "gm": _all("EOPNOTSUPP"),
        "memfd": _all("EOPNOTSUPP"),
        "v7": _all("EOPNOTSUPP"),
        "shim": _all("EOPNOTSUPP"),
        "resizable": _all("0", _UNALIGNED, dict.fromkeys(_PAST, "EINVAL")),
    },
}  # fmt: skip
NAMES: Final = {0: "allocate", KEEP: "keep", PUNCH | KEEP: "punch", ZERO: "zero",
                ZERO | KEEP: "zero-keep"}  # fmt: skip
#: Modes that no file here supports; vfs refuses some, the file the others.
_REFUSED: Final = {
    "punch-without-keep": PUNCH, "no-hide-stale": NO_HIDE, "collapse": COLLAPSE,
    "insert": INSERT, "unshare": UNSHARE, "unshare-keep": UNSHARE | KEEP,
    "write-zeroes": WRITE_ZEROES, "punch-zero": PUNCH | ZERO | KEEP,
    "punch-collapse": PUNCH | COLLAPSE | KEEP, "unknown-bit": 0x100, "sign-bit": 1 << 31,
    "every-bit": 0xFFFF_FFFF,
}  # fmt: skip
#: Modes that vfs passes on, so that it looks at the end of the range first.
_KNOWN_TO_VFS: Final = frozenset({"collapse", "insert", "unshare", "unshare-keep", "write-zeroes"})


def _fallocate() -> list[Row]:
    rows = []
    for mode, columns in SUPPORTED.items():
        for name, (offset, length) in RANGES.items():
            want: dict[str, Any] = {
                column: answers[name] or None for column, answers in columns.items()
            }
            once: tuple[Differs, ...] = ()
            if mode == 0 and name in (*_GROWN, "unaligned-beyond-eof"):
                once = fuse("growth-hole", "EPERM", only=("v7", "shim"))
            rows.append(
                row(
                    f"fallocate.{NAMES[mode]}.{name}", probe.fallocate, mode, offset, length,
                    **want, start=Start.HOLES, source="vfs, then gmem, shmem or ours", fuse=once,
                    vast=mode != PUNCH | KEEP and name in _UNBOUNDED,
                )
            )  # fmt: skip
    for kind, mode in _REFUSED.items():
        for name in ("page", "unaligned-both", "end-overflows", "empty", "negative-offset"):
            answer = "EOPNOTSUPP"
            if name in ("empty", "negative-offset"):
                answer = "EINVAL"
            elif name == "end-overflows" and kind in _KNOWN_TO_VFS:
                answer = "EFBIG"
            since = (6, 17) if kind == "write-zeroes" else (0, 0)  # vfs learnt the mode then
            rows.append(
                row(
                    f"fallocate.{kind}.{name}", probe.fallocate, mode, *RANGES[name],
                    gm=answer, memfd=answer, start=Start.HOLES, source="vfs_fallocate",
                    since=since,
                )
            )  # fmt: skip
    return rows


_EVERY_MODE: Final[dict[str, Any]] = {
    "gm": "0: 0x1 0x3; else EOPNOTSUPP",
    "memfd": "0: 0x0 0x1 0x3; else EOPNOTSUPP",
    "v7": "0: 0x0 0x1 0x3; else EOPNOTSUPP",
    "shim": "0: 0x0 0x1 0x3; else EOPNOTSUPP",
    "resizable": "0: 0x0 0x1 0x3 0x10 0x11; else EOPNOTSUPP",
}
_HUGE: Final = 1 << 44  # 16 TiB, the largest file of a mount

_OTHERS: Final = [
    row("fallocate.every-combination", probe.modes, 0, 255, **_EVERY_MODE, source="vfs and gmem"),
    row("fallocate.high-bits", probe.high_bits, 0, gm="EOPNOTSUPP", memfd="EOPNOTSUPP",
        source="vfs: FALLOC_FL_MODE_MASK"),
    row("fallocate.high-bits-punch", probe.high_bits, PUNCH | KEEP, gm="EOPNOTSUPP",
        memfd="EOPNOTSUPP", source="vfs: FALLOC_FL_MODE_MASK"),
    row("fallocate.keep.twice", probe.fallocate_twice, KEEP, 0, SIZE, gm="0, 0", memfd="0, 0",
        source="a retry is idempotent"),
    row("fallocate.punch.twice", probe.fallocate_twice, PUNCH | KEEP, 0, SIZE, gm="0, 0",
        memfd="0, 0", source="a retry is idempotent"),
    row("fallocate.punch.from-empty", probe.fallocate, PUNCH | KEEP, 0, PAGE, gm=None, memfd="0",
        shim="0", start=Start.EMPTY, source="shmem_fallocate"),
    row("fallocate.allocate.from-empty", probe.fallocate, 0, 0, 2 * PAGE, gm=None,
        memfd=f"0 size={2 * PAGE}", shim=f"0 size={2 * PAGE}", start=Start.EMPTY,
        source="shmem_fallocate"),
    row("fallocate.allocate.from-empty-unaligned", probe.fallocate, 0, 0, 100, gm=None,
        memfd="0 size=100", shim="0 size=100", resizable="EINVAL", start=Start.EMPTY,
        source="shmem_fallocate; ours: sizes are whole pages",
        fuse=fuse("whole-pages", "EINVAL", only=("v7", "shim"))),
    row("fallocate.keep.from-empty", probe.fallocate, KEEP, 0, PAGE, gm=None, memfd="0", shim="0",
        resizable="EINVAL", start=Start.EMPTY, source="shmem_fallocate; ours: nothing past EOF"),
    row("fallocate.allocate.rlimit", probe.limited, SIZE, "FALLOCATE", 0, SIZE, PAGE,
        gm="EOPNOTSUPP", memfd="EFBIG SIGXFSZ", shim="EFBIG SIGXFSZ", start=Start.HOLES,
        source="inode_newsize_ok", fuse=fuse("rlimit-fsize", "EFBIG SIGXFSZ")),
    row("fallocate.keep.rlimit", probe.limited, PAGE, "FALLOCATE", KEEP, 0, SIZE, gm="0",
        memfd="0", start=Start.HOLES, source="only a growing size is limited"),
    row("ftruncate.rlimit", probe.limited, SIZE, "FTRUNCATE", 2 * SIZE, gm="EINVAL",
        memfd="EFBIG SIGXFSZ", v7="EPERM", shim="EPERM", resizable="EFBIG SIGXFSZ",
        start=Start.HOLES,
        source="inode_newsize_ok", fuse=fuse("rlimit-fsize", "EFBIG SIGXFSZ")),
]  # fmt: skip

#: size asked for → outcomes on a file of SIZE bytes.
_RESIZED: Final[dict[str, tuple[int, Outcome, Outcome]]] = {
    # name: (size, memfd, resizable)
    "same": (SIZE, "0", "0"),
    "up": (2 * SIZE, f"0 size={2 * SIZE}", f"0 size={2 * SIZE}"),
    "down": (PAGE, f"0 size={PAGE}", f"0 size={PAGE}"),
    "zero": (0, "0 size=0", "0 size=0"),
    "unaligned-up": (SIZE + 1, f"0 size={SIZE + 1}", "EINVAL"),
    "unaligned-down": (100, "0 size=100", "EINVAL"),
    "two-gib": (1 << 31, f"0 size={1 << 31}", f"0 size={1 << 31}"),
    "largest": (_HUGE, f"0 size={_HUGE}", f"0 size={_HUGE}"),
    "one-page-more": (_HUGE + PAGE, f"0 size={_HUGE + PAGE}", "EFBIG"),
    "limit-aligned": (_LIMIT - PAGE, f"0 size={_LIMIT - PAGE}", "EFBIG"),
    "limit": (_LIMIT - 1, f"0 size={_LIMIT - 1}", "EINVAL"),
}
_FIRST_SIZE: Final[dict[str, tuple[int, Outcome, Outcome]]] = {
    # name: (size, memfd, once): what the first truncate of an empty file answers
    "page": (PAGE, f"0 size={PAGE}", f"0 size={PAGE}"),
    "zero": (0, "0", "0"),
    "unaligned": (100, "0 size=100", "EINVAL"),
    "two-gib": (1 << 31, f"0 size={1 << 31}", f"0 size={1 << 31}"),
    "beyond-32-bits": ((1 << 32) + PAGE, f"0 size={(1 << 32) + PAGE}",
                       f"0 size={(1 << 32) + PAGE}"),
    "largest": (_HUGE, f"0 size={_HUGE}", f"0 size={_HUGE}"),
    "one-page-more": (_HUGE + PAGE, f"0 size={_HUGE + PAGE}", f"0 size={_HUGE + PAGE}"),
    "negative": (-PAGE, "EINVAL", "EINVAL"),
}  # fmt: skip


def _truncate() -> list[Row]:
    rows = []
    for name, (size, memfd, resizable) in _RESIZED.items():
        for how, resize in (("ftruncate", probe.ftruncate), ("truncate", probe.truncate)):
            rows.append(
                row(
                    f"{how}.{name}", resize, size, gm="EINVAL", memfd=memfd, v7="EPERM",
                    shim="EPERM", resizable=resizable, start=Start.HOLES,
                    source="kvm_gmem_setattr; v7 shmem_setattr: EPERM before EINVAL",
                )
            )  # fmt: skip
    for how, resize in (("ftruncate", probe.ftruncate), ("truncate", probe.truncate)):
        rows.append(
            row(f"{how}.negative", resize, -PAGE, gm="EINVAL", memfd="EINVAL",
                start=Start.HOLES, source="do_truncate")
        )  # fmt: skip
    for name, (size, memfd, once) in _FIRST_SIZE.items():
        too_large = size > _HUGE
        rows.append(
            row(
                f"ftruncate.first.{name}", probe.ftruncate, size, gm=None, memfd=memfd, v7=once,
                shim=once, resizable="EFBIG" if too_large else once, start=Start.EMPTY,
                source="v7 shmem_setattr",
                fuse=fuse("page-numbers", "EFBIG", only=("v7", "shim")) if too_large else (),
            )
        )  # fmt: skip
    return [
        *rows,
        row("ftruncate.first.twice", probe.ftruncate, PAGE, 2 * PAGE, gm=None,
            memfd=f"0 size={PAGE}, 0 size={2 * PAGE}", v7=f"0 size={PAGE}, EPERM",
            shim=f"0 size={PAGE}, EPERM", resizable=f"0 size={PAGE}, 0 size={2 * PAGE}",
            start=Start.EMPTY, source="v7: once from 0"),
        row("ftruncate.first.after-zero", probe.ftruncate, 0, PAGE, PAGE, gm=None,
            memfd=f"0, 0 size={PAGE}, 0", v7=f"0, 0 size={PAGE}, EPERM",
            shim=f"0, 0 size={PAGE}, EPERM", resizable=f"0, 0 size={PAGE}, 0", start=Start.EMPTY,
            source="v7: 'once' means until nonzero"),
        row("blocks.holes", probe.allocated, gm="0 pages", memfd="0 pages", start=Start.HOLES,
            source="st_blocks"),
        row("blocks.filled", probe.allocated, gm="0 pages", memfd="16 pages", shim="16 pages",
            source="st_blocks", fuse=fuse("st-blocks", "16 pages")),
        row("blocks.one-page", probe.allocated, (KEEP, PAGE, PAGE), gm="0 pages",
            memfd="1 pages", shim="1 pages", start=Start.HOLES, source="st_blocks",
            fuse=fuse("st-blocks", "1 pages")),
        row("blocks.punched", probe.allocated, (PUNCH | KEEP, PAGE, 4 * PAGE), gm="0 pages",
            memfd="12 pages", shim="12 pages", source="st_blocks",
            fuse=fuse("st-blocks", "12 pages")),
        row("blocks.punched-past-eof", probe.allocated, (PUNCH | KEEP, 0, _LIMIT - PAGE),
            gm="0 pages", memfd="0 pages", source="st_blocks"),
        row("blocks.rounded-out", probe.allocated, (KEEP, PAGE + 1, PAGE), gm=None,
            memfd="2 pages", shim="2 pages", start=Start.HOLES, source="shmem_fallocate"),
        row("blocks.beyond-eof", probe.allocated, (KEEP, 2 * SIZE, PAGE), gm=None,
            memfd="1 pages", shim="1 pages", resizable="EINVAL", start=Start.HOLES,
            source="shmem_fallocate"),
        row("blocks.shrunk", probe.shrink_and_grow, PAGE, SIZE, gm=None, memfd="1 pages",
            v7=None, shim=None, resizable="1 pages", source="what was cut off is gone"),
    ]  # fmt: skip


SET, CUR, END, DATA, HOLE = os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE


def _seek(name: str, offset: int, whence: int, answer: Outcome) -> Row:
    return row(
        f"lseek.{name}", probe.lseek, offset, whence, gm="ESPIPE", memfd=answer,
        resizable=answer, source="no ->llseek: vfs_llseek",
        fuse=fuse("seekable", passthrough=answer),
    )  # fmt: skip


_UNTOUCHED: Final = "shmem: pages that were allocated but not touched are holes"


def _map_of(name: str, call: Any, *arguments: Any, memfd: Outcome, mount: Outcome) -> Row:
    """Where data and holes are: a mount shows what is allocated."""
    return row(
        f"lseek.{name}", call, *arguments, gm="ESPIPE", memfd=memfd, resizable=mount,
        source=_UNTOUCHED,
        fuse=fuse("allocated-is-data", mount, only=("v7",)) if mount != memfd else (),
    )  # fmt: skip


_LSEEK: Final = [
    _seek("set", PAGE, SET, str(PAGE)),
    _seek("set-negative", -1, SET, "EINVAL"),
    _seek("set-beyond-eof", 2 * SIZE, SET, str(2 * SIZE)),
    _seek("current", 0, CUR, "0"),
    _seek("end", 0, END, str(SIZE)),
    row("lseek.bad-whence", probe.lseek, 0, 77, gm="EINVAL", memfd="EINVAL", source="ksys_lseek"),
    _map_of("data", probe.lseek, PAGE, DATA, memfd="ENXIO", mount=str(PAGE)),
    _map_of("data-at-eof", probe.lseek, SIZE, DATA, memfd="ENXIO", mount="ENXIO"),
    _map_of("data-negative", probe.lseek, -1, DATA, memfd="ENXIO", mount="ENXIO"),
    _map_of("hole", probe.lseek, 0, HOLE, memfd="0", mount=str(SIZE)),
    _map_of("hole-at-eof", probe.lseek, SIZE, HOLE, memfd="ENXIO", mount="ENXIO"),
    _map_of("hole-negative", probe.lseek, -1, HOLE, memfd="ENXIO", mount="ENXIO"),
    _map_of("data-after-punch", probe.seek_after, (0, 2 * PAGE), 0, DATA, memfd="ENXIO",
            mount=str(2 * PAGE)),
    _map_of("data-inside", probe.seek_after, (0, 2 * PAGE), 3 * PAGE + 5, DATA, memfd="ENXIO",
            mount=str(3 * PAGE + 5)),
    _map_of("hole-after-punch", probe.seek_after, (4 * PAGE, PAGE), 5, HOLE, memfd="5",
            mount=str(4 * PAGE)),
    _map_of("data-nothing-left", probe.seek_after, (0, SIZE), 0, DATA, memfd="ENXIO",
            mount="ENXIO"),
]  # fmt: skip

ROWS: Final = [*_fallocate(), *_OTHERS, *_truncate(), *_LSEEK]
