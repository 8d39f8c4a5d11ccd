# SPDX-License-Identifier: GPL-2.0-or-later
"""A privfs mount for the guest_memfds of one program, in a process of its own that ends with us."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_READY_SECONDS = 30.0
_END_SECONDS = 15.0
_PRIVFS = (sys.executable, "-m", "privfs")
OPTIONS = "personality=guest_memfd"


class NoMount(Exception):
    """There is no mount; ``str()`` says why, as far as privfs has not."""


@contextlib.contextmanager
def temporary_mount(options: str = OPTIONS) -> Iterator[Path]:
    """Mount in a new folder, wait until it answers, take both away at the end; NoMount.

    They also go if we are killed: the mount ends with us, and removes its folder.  ``options`` are
    those of ``privfs mount -o``.
    """
    place = tempfile.mkdtemp(prefix="kvmsim-exec.")
    ready, theirs = os.pipe()
    life_theirs, life = os.pipe()
    command = [
        *_PRIVFS, "mount", "-q", "--remove", f"--ready-fd={theirs}", f"--life-fd={life_theirs}",
        "-o", options, "--", place,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        pass_fds=[theirs, life_theirs], start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    os.close(life_theirs)
    try:
        answered = select.select([ready], [], [], _READY_SECONDS)[0] and os.read(ready, 1)
        if not answered:
            raise NoMount("privfs does not mount; see: privfs doctor, or give --memory DIR")
        yield Path(place)
    finally:
        os.close(ready)
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(life)
        _clear(place)


def _clear(place: str) -> None:
    """Take away what is left of a mount: nothing, if it ended in order."""
    try:
        os.rmdir(place)
    except FileNotFoundError:
        return
    except OSError:  # it was killed
        subprocess.run([*_PRIVFS, "umount", "--lazy", "--", place], check=False)
        os.rmdir(place)
