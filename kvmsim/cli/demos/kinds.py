# SPDX-License-Identifier: GPL-2.0-or-later
"""What differs between the kinds of guests that are demonstrated, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from hwemu.encryptedaccess import Outcome

_NEXT: Final = "The guest's next use finds another page."


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where a report has what is compared: byte offsets; ``key`` is that of `describe`."""

    size: int
    data: int
    measurement: int
    name: str
    key: str


@dataclass(frozen=True, slots=True)
class Shown:
    """A kind as it is demonstrated."""

    kind: str
    about: str
    launch: str
    """What is called to launch it."""
    page_call: str
    """What each page that it is loaded with is called for; "" if nothing is loaded."""
    last_call: str | None
    """The last call of the launch."""
    comes: str
    """How memory becomes the guest's."""
    refused: str
    """How a private page answers that the guest has not accepted, "" where none is accepted."""
    seen: Outcome
    """What the host's own software meets at a private page."""
    converted: str
    """What a conversion does."""
    keeps: bool
    """Whether a page that is converted keeps its bytes."""
    none: str
    """Why there is no measurement; "" where there is."""
    evidence: Evidence | None
    counted: tuple[str, ...]
    """Where in `describe` the guest's private pages are counted; () if nothing counts them."""
    taken: str
    """What a punch is to a running guest."""
    gives: str
    """What the guest says first where nothing is taken from it that it does not give; else ""."""
    end: str
    """What its teardown is."""


SHOWN: Final[Mapping[str, Shown]] = MappingProxyType({
    shown.kind: shown for shown in (
        Shown(
            "tdx", "a TD on the model of the TDX module",
            "KVM makes a TD and its vCPUs (TDH.MNG.*, TDH.VP.*), adds each page of the image "
            "(TDH.MEM.PAGE.ADD) and extends MRTD with its bytes, 256 at a time (TDH.MR.EXTEND). "
            "TDH.MR.FINALIZE ends that: what comes later is not measured, and empty.",
            "TDH.MEM.PAGE.ADD", "TDH.MR.FINALIZE",
            "A page that KVM adds to a running TD is PENDING (TDH.MEM.PAGE.AUG): an access is a "
            "#VE until the guest takes the page by TDG.MEM.PAGE.ACCEPT, which clears it.",
            "#VE virtualization, error 0x30", Outcome.ZEROS,
            "The guest calls TDVMCALL<MapGPA>; the VMM changes the attributes and frees the "
            "private pages: TDH.MEM.RANGE.BLOCK, TDH.MEM.TRACK, every vCPU leaves, "
            "TDH.MEM.PAGE.REMOVE. Of a leaf of 2 MiB the page is split off first (DEMOTE).",
            keeps=False, none="",
            evidence=Evidence(1024, 0x80, 0x210, "MRTD", "mrtd"), counted=("pamt_pages", "REG"),
            taken=f"The same calls as for a conversion, before the system call returns. "
            f"{_NEXT} That it is PENDING tells the guest that its host has taken the old one.",
            gives="",
            end="Every vCPU is flushed, the key's caches are written back and its HKID freed; "
            "then each page is reclaimed (TDH.PHYMEM.PAGE.RECLAIM), the root last.",
        ),
        Shown(
            "snp", "an SEV-SNP guest on the models of the RMP and the AMD-SP",
            "KVM makes a guest context and begins the launch. Each page of the image is the "
            "guest's in the RMP (RMPUPDATE, immutable) before the AMD-SP measures and encrypts it "
            "(SNP_LAUNCH_UPDATE); vCPUs' save areas too. SNP_LAUNCH_FINISH ends that.",
            "SNP_LAUNCH_UPDATE", "SNP_LAUNCH_FINISH",
            "A page that KVM assigns to a running guest (RMPUPDATE) is not validated: an access "
            "is a #VC until the guest executes PVALIDATE.",
            "#VC VMM communication, error 0x404", Outcome.CIPHERTEXT,
            "The guest rescinds its validation (PVALIDATE) and asks by its GHCB (page state "
            "change); the VMM changes the attributes and frees the private pages, which are the "
            "hypervisor's in the RMP before anyone else gets them.",
            keeps=False, none="",
            evidence=Evidence(1184, 0x50, 0x90, "the launch digest", "measurement"),
            counted=("frames",),
            taken=f"Every vCPU has left and flushed, and the page is the hypervisor's in the RMP, "
            f"before the system call returns. {_NEXT} That it is not validated tells the guest "
            "that its host has taken the old one.",
            gives="",
            end="SNP_DECOMMISSION: the AMD-SP forgets the guest and its key. Context page and "
            "save areas go back, and every frame of the guest is the hypervisor's again.",
        ),
        Shown(
            "pkvm", "a protected VM under the model of pKVM's hypervisor",
            "The host fills pages while they are its own and donates each to the guest. What is "
            "donated the host cannot read any more.",
            "host_donate_guest", None,
            "There is nothing to accept: a stage-2 fault of the guest makes the host donate the "
            "pages it has there.",
            "", Outcome.STAGE2_ABORT,
            "In place: the guest itself opens a page of its own to the host (MEM_SHARE), and the "
            "host then learns that the page is shared; MEM_UNSHARE closes it, contents and all.",
            keeps=True,
            none="pKVM measures nothing: that is left to firmware in the guest (pvmfw), which is "
            "not modelled. So there is no report.",
            evidence=None, counted=("pages", "OWNED"),
            taken="EL2 takes nothing from a guest that lives: a VM dies of a punch in a page that "
            "it has. So the guest gives the page back first (MEM_RELINQUISH), and EL2 wipes it. "
            "The next use finds another page, zeroed.",
            gives="relinquish",
            end="The host reclaims every page of the dying VM, wiped unless it was shared.",
        ),
        Shown(
            "sw", "KVM_X86_SW_PROTECTED_VM: attributes and private files, no hardware",
            "Nothing is loaded into private memory: the guest starts in shared memory, converts "
            "its RAM with KVM_HC_MAP_GPA_RANGE and moves there.",
            "", None,
            "There is nothing to accept: a private access asks the owner of the file for a page.",
            "", Outcome.DONE,
            "The guest calls KVM_HC_MAP_GPA_RANGE; the VMM changes the attributes and frees the "
            "private pages, and the shared ones on the way back.",
            keeps=False,
            none="Nothing measures a software-protected VM; it is for development. So there is no "
            "report.",
            evidence=None, counted=(),
            taken="Zapped, every vCPU flushed, then freed. The next use finds an empty page.",
            gives="",
            end="Slots and attributes go, and the owner learns that nobody uses the file.",
        ),
    )
})  # fmt: skip
