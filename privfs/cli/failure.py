# SPDX-License-Identifier: GPL-2.0-or-later
"""From an exception to one line and an exit code."""

from __future__ import annotations

import errno
import os
from typing import Final

import click

from privfs.cli.exitcodes import Exit

#: An errno that a mount point or a mount answers with → exit code.
_MOUNT: Final = {
    errno.EINVAL: Exit.USAGE,
    errno.EIO: Exit.FUSE,
    errno.ENODEV: Exit.FUSE,
}
#: An errno of any path in a mount → nobody serves it.
_GONE: Final = frozenset({
    errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT,
})  # fmt: skip
#: What to do about a path that could not be looked at.
_NEXT: Final = {
    errno.ENOENT: "; name a file in one of the mounts that privfs status shows",
    errno.ENOTDIR: "; name a file in one of the mounts that privfs status shows",
    errno.EACCES: "; ask as its owner, or as root",
}


class Failure(Exception):
    """A command failed; ``str()`` is the line for the person, empty if it has been printed."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(text)
        self.code = code


def mount_failed(error: OSError) -> Failure:
    """Explain why a mount could not be made or ended (a MountError)."""
    code = _MOUNT.get(error.errno or 0, Exit.MOUNTPOINT)
    return Failure(code, _text(error))


def no_answer(error: OSError) -> Failure:
    """Explain why a question about a path in a mount was not answered (a ControlError too)."""
    code = Exit.NO_MOUNT if error.errno in _GONE else Exit.FAILED
    if code is Exit.NO_MOUNT and error.filename is not None:
        return Failure(
            code,
            f"{os.fsdecode(error.filename)}: its privfs was killed; "
            "clear the dead mount with: privfs umount DIR",
        )
    following = _NEXT.get(error.errno or 0, "") if error.filename is not None else ""
    return Failure(code, _text(error) + following)


def usage(error: click.UsageError) -> Failure:
    """Explain what was typed wrong, in one line whatever click makes of it."""
    where = error.ctx.command_path if error.ctx else "privfs"
    text = " ".join(error.format_message().split())
    return Failure(Exit.USAGE, f"{text}{'' if text[-1:] in '.?' else '.'} See: {where} --help")


def _text(error: OSError) -> str:
    text = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {text}" if error.filename is not None else text
