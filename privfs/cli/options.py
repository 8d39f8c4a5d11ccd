# SPDX-License-Identifier: GPL-2.0-or-later
"""Mount options as mount(8) writes them: ``-o size=1G,personality=guest_memfd``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from privfs.backing.choice import STORES
from privfs.cli.exitcodes import Exit
from privfs.cli.failure import Failure
from privfs.personality import PAGE_SIZE, PERSONALITIES

if TYPE_CHECKING:
    from privfs.fuse.mount import MountOptions

_SUFFIXES: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

#: Options of mount(8) and fstab(5) that mean nothing here, or that mount(8) itself obeys.
#: dev, suid and exec cannot be had; a mount helper takes them silently, since mount.fuse3 always
#: passes dev and suid.
IGNORED: Final = frozenset({
    "rw", "dev", "nodev", "suid", "nosuid", "exec", "noexec", "auto", "noauto", "user", "users",
    "nouser", "owner", "group", "defaults", "_netdev", "nofail", "async", "atime", "noatime",
    "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "lazytime", "nolazytime",
    "default_permissions",
})  # fmt: skip
#: Options that everybody knows and that cannot be had → what to do instead.
_REFUSED: Final = {
    "remount": "a mount keeps its options: unmount it and mount it again",
    "ro": "there is no read-only mount; who may change what is decided by mode= and chmod",
}
_IGNORED_PREFIXES: Final = ("x-", "X-", "comment=", "subtype=", "setuid=")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the options ask for, sizes in bytes; 0 is half of the memory, no quota, 4K pages."""

    personality: str = "resizable"
    size: int = 0
    mode: int = 0o755
    t_ack: float | None = None
    allow_other: bool = False
    direct_io: bool = False
    fsname: str = "privfs"
    backing: str = "shmem"
    pagesize: int = 0
    quota: int = 0

    def mount_options(self) -> MountOptions:
        """Return them as the mount takes them (loads pyfuse3)."""
        from privfs.fuse.mount import MountOptions
        from privfs.ladder import Ladder

        return MountOptions(
            personality=self.personality,
            size=self.size,
            mode=self.mode,
            ladder=Ladder() if self.t_ack is None else Ladder(ack=self.t_ack),
            passthrough=not self.direct_io,
            allow_other=self.allow_other,
            fsname=self.fsname,
            backing=self.backing,
            pagesize=self.pagesize,
            quota=self.quota,
        )

    def text(self) -> str:
        """Return the options that differ from the defaults, to be parsed again."""
        plain = Wishes()
        found = []
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if value != getattr(plain, name):
                found.append(f"{name}={option.write(value)}" if option.value else name)
        return ",".join(found)


@dataclass(frozen=True, slots=True)
class Option:
    """One option: the name of its value (empty for a flag), meaning, from text, to text."""

    value: str
    help: str
    read: Callable[[str], Any]
    write: Callable[[Any], str] = str


def parse_size(text: str, memory: int | None = None) -> int:
    """Return ``text`` (bytes, ``512M``, ``50%`` of ``memory``) in bytes, rounded up to pages.

    Rounded as tmpfs does (shmem_parse_one).  Raises ValueError.
    """
    if text.endswith("%"):
        memory = memory or os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE
        size = memory * _positive(text[:-1]) // 100
    else:
        suffix = text[-1:].upper() if text[-1:].isalpha() else ""
        if suffix not in _SUFFIXES:
            raise ValueError
        size = _positive(text[: len(text) - len(suffix)]) * _SUFFIXES[suffix]
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise ValueError
    return int(text)


def _personality(text: str) -> str:
    if text not in PERSONALITIES:
        raise ValueError
    return text


def _backing(text: str) -> str:
    if text not in STORES:
        raise ValueError
    return text


def _mode(text: str) -> int:
    mode = int(text, 8)
    if not 0 <= mode <= 0o7777:
        raise ValueError
    return mode


def _seconds(text: str) -> float:
    seconds = float(text)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError
    return seconds


def _fsname(text: str) -> str:
    if not text or "\\" in text:
        raise ValueError
    return text


def _page_size(text: str) -> int:
    size = parse_size(text)
    if text.endswith("%") or size & (size - 1):
        raise ValueError
    return size


#: Our options, under the names of their fields in :class:`Wishes`.
OPTIONS: Final[dict[str, Option]] = {
    "personality": Option("|".join(PERSONALITIES), "what files answer", _personality),
    "size": Option(
        "BYTES", "budget of all files: bytes, with K, M, G or T, or N% of RAM (50%)", parse_size
    ),
    "quota": Option(
        "BYTES", "memory that one file may hold, written as size (no limit)", parse_size
    ),
    "mode": Option("OCTAL", "permissions of the root directory (755)", _mode, lambda v: f"{v:o}"),
    "t_ack": Option(
        "SECONDS", "kill a user that does not acknowledge for so long (2); 0: never", _seconds
    ),
    "allow_other": Option("", "let other users in", bool),
    "direct_io": Option("", "refuse in the daemon even where the kernel could", bool),
    "backing": Option("|".join(STORES), "kind of memory (shmem)", _backing),
    "pagesize": Option(
        "BYTES", "memory comes and goes in so many (4K; hugetlb and secretmem: 2M)", _page_size
    ),
    "fsname": Option("NAME", "source in the mount table (privfs)", _fsname),
}


def parse(texts: Iterable[str], wishes: Wishes | None = None) -> Wishes:
    """Return what ``-o`` options ask for, on top of ``wishes``; raises Failure."""
    wishes = wishes or Wishes()
    for part in (part for text in texts for part in text.split(",") if part):
        name, given, value = part.partition("=")
        option = OPTIONS.get(name)
        if option is None:
            if name in IGNORED or part.startswith(_IGNORED_PREFIXES):
                continue
            if part in _REFUSED:
                raise Failure(Exit.USAGE, f"mount option {part!r}: {_REFUSED[part]}")
            raise Failure(Exit.USAGE, f"unknown mount option {part!r}; known: {_known()}")
        if bool(given) != bool(option.value):
            raise Failure(Exit.USAGE, f"mount option {part!r}: write {_form(name)}")
        try:
            found: Any = option.read(value) if option.value else True
        except ValueError:
            raise Failure(
                Exit.USAGE, f"mount option {part!r}: write {_form(name)}: {option.help}"
            ) from None
        wishes = replace(wishes, **{name: found})
    return wishes


def _form(name: str) -> str:
    option = OPTIONS[name]
    return f"{name}={option.value}" if option.value else name


def _known() -> str:
    return ", ".join(_form(name) for name in OPTIONS)


def help_text() -> str:
    """Return the options as a block for ``--help``."""
    width = max(len(_form(name)) for name in OPTIONS)
    rows = [f"  {_form(name):<{width}}  {option.help}" for name, option in OPTIONS.items()]
    return "Mount options (-o a,b=c):\n\n\b\n" + "\n".join(rows)
