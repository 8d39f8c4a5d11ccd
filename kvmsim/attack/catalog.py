# SPDX-License-Identifier: GPL-2.0-or-later
"""Every attack by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import Final

from kvmsim.attack import files, frames, life, pages
from kvmsim.attack.lab import Lab
from kvmsim.attack.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    ``spoils``: the guest is not to be used again; ``whole``: on a page that lies in a large one.
    """

    name: str
    group: str
    what: str
    run: Callable[[Lab], Outcome]
    _: KW_ONLY
    whole: bool = False
    spoils: bool = False


_ALL: Final = (
    Attack("read-file", "programs", "read(2) of the private file", files.read_file),
    Attack("write-file", "programs", "write(2) to the private file", files.write_file),
    Attack("map-file", "programs", "mmap(2) of the private file", files.map_file),
    Attack("read-hva", "programs", "the VMM reads its own memory for the gpa", files.read_hva),
    Attack("bind-twice", "programs", "a second memslot over the same pages", files.bind_twice),
    Attack("bind-other", "programs", "the file as RAM of another VM", files.bind_other,
           spoils=True),
    Attack("read-frame", "frames", "the host's kernel reads the frame", frames.read_frame),
    Attack("write-frame", "frames", "the host's kernel writes the frame", frames.write_frame),
    Attack("replay", "frames", "old content is put back into the frame", frames.replay_frame),
    Attack("dma-frame", "frames", "a device writes the frame", frames.dma_frame),
    Attack("alias", "frames", "one frame at two gpas", frames.alias),
    Attack("claim", "frames", "one frame in two guests", frames.claim),
    Attack("other-side", "frames", "the frame on the shared side", frames.other_side),
    Attack("split", "frames", "4 KiB out of a page of 2 MiB, without a flush", frames.split,
           whole=True),
    Attack("accept-again", "pages", "the guest accepts a page that it has", pages.accept_again),
    Attack("convert-dma", "pages", "the buffer becomes private under a device",
           pages.convert_dma),
    Attack("wrong-bit", "pages", "the guest is misled about its bit", pages.wrong_bit),
    Attack("convert", "pages", "a private page is converted unasked, and written", pages.convert),
    Attack("punch-refill", "pages", "a page in use is punched, and allocated anew",
           pages.punch_refill),
    Attack("punch-part", "pages", "4 KiB of 2 MiB in use are punched", pages.punch_part,
           whole=True, spoils=True),
    Attack("remap", "pages", "another page under the gpa", pages.remap, spoils=True),
    Attack("accept-twice", "pages", "another page under the gpa, to be accepted as well",
           pages.accept_twice, spoils=True),
    Attack("hung-vmm", "life", "the VMM is stopped, its guest's page punched", life.hung_vmm),
    Attack("tampered-image", "life", "a kernel with one byte changed", life.tampered_image),
)  # fmt: skip
ATTACKS: Final[Mapping[str, Attack]] = MappingProxyType({attack.name: attack for attack in _ALL})


def run(attack: Attack, lab: Lab) -> Outcome:
    """Try one; a guest that it spoils or ends is not used again."""
    lab.turn(whole=attack.whole)
    try:
        return attack.run(lab)
    finally:
        if attack.spoils or lab.over:
            lab.spend()
