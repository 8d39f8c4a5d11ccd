# SPDX-License-Identifier: GPL-2.0-or-later
"""Attacks before a guest runs, and when its VMM does not run any more."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from typing import Final

from kvmsim.attack.guest import LabGuest
from kvmsim.attack.lab import Lab
from kvmsim.attack.mounting import mounted
from kvmsim.attack.outcome import NONE, AttackError, Layer, Outcome, noticed, refused, succeeds
from kvmsim.fallocate import punch
from kvmsim.uapi import PAGE_SIZE

_SECONDS: Final = 60.0
_PATIENCE: Final = "0.3"
_WORD: Final = b"boot stage"
_MEASURES: Final = {"tdx": "mrtd", "snp": "measurement"}


def hung_vmm(lab: Lab) -> Outcome:
    """Stop the VMM with SIGSTOP and punch what its guest uses: nobody acknowledges."""
    if lab.technology is None:
        return NONE
    with mounted(f"t_ack={_PATIENCE}") as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvmsim.attack.victim", lab.kind, os.fspath(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            said = process.stdout.readline().split()
            if len(said) != 2:
                raise AttackError(f"the victim said {said!r}")
            process.send_signal(signal.SIGSTOP)
            fd = os.open(os.fsdecode(said[0]), os.O_RDWR | os.O_CLOEXEC)
            try:
                punch(fd, int(said[1]), PAGE_SIZE)
            except OSError as error:
                return succeeds(errno.errorcode[error.errno or errno.EIO])
            finally:
                os.close(fd)
            status = process.wait(_SECONDS)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
    if status != -signal.SIGKILL:
        return succeeds(f"the VMM goes on: {status}")
    return refused(Layer.MOUNT, "SIGKILL")


def tampered_image(lab: Lab) -> Outcome:
    """Load a kernel with one byte changed."""
    changed = lab.image.replace(_WORD, _WORD[:-1] + b"E")
    if changed == lab.image:
        raise AttackError(f"the image says {_WORD!r} nowhere")
    if lab.technology is None:
        good, bad = (lab.sev().measured(image).hex() for image in (lab.image, changed))
    elif (name := _MEASURES.get(lab.kind)) is None:
        return succeeds("nothing is measured")
    else:
        good = _measured(lab.guest(), name)
        with lab.beside("ram-", "victim-", image=changed) as other:
            bad = _measured(other, name)
    return noticed(Layer.OWNER, "another measurement") if good != bad else succeeds("the same")


def _measured(guest: LabGuest, name: str) -> str:
    """What the hardware says of what a guest was loaded with."""
    assert guest.guard is not None
    return str(guest.guard.describe()[name])
