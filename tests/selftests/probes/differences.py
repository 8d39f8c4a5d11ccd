# SPDX-License-Identifier: GPL-2.0-or-later
"""What the probes must see: answers.json, measured by ``scripts/selftests --measure``.

On Linux 6.18 without a second stage (guests in ring 3). The simulator answers the same but for
:data:`DIFFERENCES`, each with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

ANSWERS: Final = Path(__file__).with_name("answers.json")


class Difference(NamedTuple):
    """What the simulator answers instead."""

    answer: str
    reason: str


_ADDRESSES: Final = "a simulated processor has 40 address bits (KVM_CAP_VM_GPA_BITS says so)"
_SIZES: Final = "a private file has 32-bit page numbers: 16 TiB at most"
_LOCAL: Final = (
    "a descriptor of the device in this process is a memfd, only so that it has a number"
)
_MIXED: Final = (
    "registers that are set while an access waits are mixed with its result, how is left open "
    "(api.rst, KVM_RUN): this kernel's emulator drops the answer, complete_fast_pio_in() of VMX "
    "and SVM puts it into RAX, and so does the simulator"
)
_EFER: Final = (
    "kvm_is_valid_sregs() does not look at reserved bits of EFER; the simulated processor refuses "
    "what it has not"
)

DIFFERENCES: Final[Mapping[str, Mapping[str, Difference]]] = {
    "the_top_of_the_guests_addresses": {
        "at 2^40": Difference("EINVAL", _ADDRESSES),
        "to 2^52": Difference("EINVAL", _ADDRESSES),
    },
    "the_shape_of_a_file": {
        "16 TiB + page": Difference("EFBIG", _SIZES),
        "2^62": Difference("EFBIG", _SIZES),
        "last": Difference("EFBIG", _SIZES),
    },
    "mappings_of_descriptors": {
        "/dev/kvm": Difference("0", _LOCAL),
        "the VM": Difference("0", _LOCAL),
    },
    "registers_between_exit_and_completion": {
        "out": Difference("IO out 0x80 1*1 5a", _MIXED),
        "rax": Difference("0x225a", _MIXED),
        "after RIP was set": Difference("IO out 0x80 1*1 5b", _MIXED),
    },
    "control_registers_that_cannot_be": {
        "unknown bit of efer": Difference("EINVAL", _EFER),
    },
}


def measured() -> dict[str, dict[str, str]]:
    """What the kernel answered, by probe."""
    found: dict[str, dict[str, str]] = json.loads(ANSWERS.read_text())
    return found


def expected(target: str, name: str) -> dict[str, str]:
    """What probe ``name`` must see on ``target``: "real" or "simulated"."""
    answers = measured()[name]
    if target == "simulated":
        answers |= {what: one.answer for what, one in DIFFERENCES.get(name, {}).items()}
    return answers
