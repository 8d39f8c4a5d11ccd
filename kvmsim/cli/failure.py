# SPDX-License-Identifier: GPL-2.0-or-later
"""From what goes wrong when a VM is made to one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Final

import click

from kvmsim.cli import tables
from kvmsim.cli.exitcodes import Exit
from kvmsim.console import End, Ending
from kvmsim.guard import GuardRefusal
from kvmsim.images import NoImage
from kvmsim.scriptvalues import Memory
from kvmsim.uapi import PAGE_SIZE, KvmError
from kvmsim.vmm.bootparams import UNIT_SIZE, Technology
from kvmsim.vmm.elf import ImageError
from kvmsim.vmm.loader import PayloadError
from kvmsim.vmm.prealloc import PreallocError
from privfs.notifier.lane import LinkError, NoMountAbove, find_socket


class Failure(Exception):
    """A command failed; ``str()`` is the line for the person, empty if it has been printed."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(text)
        self.code = code


def usage(error: click.UsageError) -> Failure:
    """Explain what was typed wrong, in one line whatever click makes of it."""
    where = error.ctx.command_path if error.ctx else "kvmsim"
    text = " ".join(error.format_message().split())
    return Failure(Exit.USAGE, f"{text}{'' if text[-1:] in '.?' else '.'} See: {where} --help")


#: What to do about an end that nobody asked for.
_NEXT: Final = {
    End.CRASHED: "`privfs map FILE` shows what its memory holds; boot it again",
    End.OWNER_LOST: "what the guest had in memory is lost; mount again, then boot again",
    End.FAILED: "run again with --debug and report it",
}


def ended_badly(ending: Ending) -> str:
    """Return the line about an end that nobody asked for, "" for any other."""
    following = _NEXT.get(ending.end)
    return f"{ending.message}; {following}" if following else ""


def check_memory(memory: Memory, kind: str) -> None:
    """Refuse what cannot be a guest's memory, before any request; raises Failure."""
    path = memory.path
    try:
        status = os.stat(path)
    except OSError as error:
        remedy = ""
        if error.errno == errno.ENOENT:
            remedy = f"; make it in a privfs mount with: truncate -s 1G {path}"
        elif error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            remedy = "; the mount is dead, clear it with: privfs umount DIR"
        raise Failure(Exit.MEMORY, f"{path}: {error.strerror}{remedy}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise Failure(Exit.MEMORY, f"{path} is {kind}; name a file in a privfs mount")
    with explained():
        find_socket(path)
    if status.st_size == 0:
        raise Failure(
            Exit.MEMORY, f"{path} is empty; give it the guest's size with: truncate -s 1G {path}"
        )
    if memory.offset + memory.size > status.st_size or memory.offset >= status.st_size:
        raise Failure(
            Exit.MEMORY,
            f"{path} has {status.st_size} bytes, less than offset {memory.offset} and size "
            f"{memory.size} need; make it longer with truncate -s",
        )
    if Technology[kind.upper().replace("-", "_")].accepts:
        _check_units(memory, memory.size or status.st_size - memory.offset, kind)


def _check_units(memory: Memory, size: int, kind: str) -> None:
    """A guest that accepts its memory does so by 2 MiB, so it has no piece of that."""
    if size >= UNIT_SIZE and size % UNIT_SIZE == 0:
        return
    more, less = -(-size // UNIT_SIZE) * UNIT_SIZE, size // UNIT_SIZE * UNIT_SIZE
    remedies = [] if memory.size else [
        f"make it longer with: truncate -s {memory.offset + more >> 10}K {memory.path}"
    ]  # fmt: skip
    remedies += [f"give size={less >> 20}M"] if less else []
    raise Failure(
        Exit.MEMORY,
        f"{memory.path}: a {kind} guest accepts memory by 2 MiB, and {size} bytes are no multiple "
        f"of that; {', or '.join(remedies) or 'give size=32M'}",
    )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn what a VM's birth may raise into a Failure."""
    try:
        yield
    except PreallocError as error:
        raise Failure(Exit.MEMORY, _prealloc_text(error)) from error
    except GuardRefusal as error:
        name = errno.errorcode.get(error.errno, str(error.errno))
        raise Failure(Exit.MEMORY, f"the guest cannot be launched: {name}: {error}") from error
    except KvmError as error:
        raise Failure(Exit.MEMORY, str(error)) from error
    except LinkError as error:
        raise Failure(Exit.MEMORY, _link_text(error)) from error
    except NoImage as error:
        raise Failure(Exit.IMAGE, str(error)) from error
    except PayloadError as error:
        raise Failure(Exit.IMAGE, str(error)) from error
    except ImageError as error:
        raise Failure(Exit.IMAGE, f"guest kernel: {error}; build it with scripts/setup") from error
    except OSError as error:
        if error.filename is None:
            raise
        raise Failure(Exit.MEMORY, f"{os.fsdecode(error.filename)}: {error.strerror}") from error
    except ValueError as error:  # sizes and slots that cannot be
        raise Failure(Exit.MEMORY, str(error)) from error


def _prealloc_text(error: PreallocError) -> str:
    done, total = (tables.size(pages * PAGE_SIZE) for pages in (error.done, error.total))
    what = f"{os.fsdecode(error.filename)}: prealloc=on: {os.strerror(error.errno or errno.EIO)}"
    if error.left:
        return f"{what} after {done} of {total}, which the file keeps; see: privfs stat"
    return f"{what} after {done} of {total}, which were given back; see: privfs status"


def _link_text(error: LinkError) -> str:
    text = error.strerror or str(error)
    if isinstance(error, NoMountAbove):
        return text
    match error.errno:
        case errno.ECONNREFUSED | errno.ENOENT | errno.ENOTCONN | errno.ECONNRESET:
            return f"{text}; is the mount alive? See: privfs status"
    return f"{text}; see: privfs status"
