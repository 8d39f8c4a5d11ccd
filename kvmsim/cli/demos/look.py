# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host's own software meets where a guest's private bytes are."""

from __future__ import annotations

from typing import Final

from hwemu.encryptedaccess import Outcome
from kvmsim.cli.demos.stage import Stage
from kvmsim.confidential.hostview import hpa_of
from kvmsim.console import ConsoleVm
from kvmsim.uapi import PAGE_SIZE

_SHOWN: Final = 24


def look(stage: Stage, wanted: Outcome, vm: ConsoleVm, gpa: int, word: bytes) -> None:
    """Read the two pages at ``gpa``, which ``word`` fills, as the host's kernel would."""
    with vm.running.lock:
        hpa = hpa_of(vm.running, gpa)
    stage.say(f"The host's kernel reads its memory at {hpa:#x}, where that page is.")
    met = [vm.host_read(gpa + index * PAGE_SIZE, PAGE_SIZE) for index in range(2)]
    for one in met:
        if one.data is not None:
            stage.shown(f"{one.data[:_SHOWN].hex(' ')} …")
    outcomes = {one.outcome for one in met}
    stage.claim(outcomes == {wanted}, f"it meets: {wanted.value}", outcomes)
    plain, data = word * (PAGE_SIZE // len(word)), [one.data for one in met]
    if wanted is Outcome.CIPHERTEXT:
        text = "of two pages with the same bytes it is different, and neither has them"
        stage.claim(plain not in data and None not in data and data[0] != data[1], text)
        return
    expected = {Outcome.DONE: plain, Outcome.ZEROS: bytes(PAGE_SIZE)}.get(wanted)
    stage.claim(data == [expected] * 2, "and gets no byte" if expected is None else
                "and nothing else, in two pages")  # fmt: skip
