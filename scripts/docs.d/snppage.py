# SPDX-License-Identifier: GPL-2.0-or-later
"""Draw docs/snp.md."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from hwemu.snp import access, guestops, hostops, outcome
from hwemu.snp.asids import ASIDS, REFUSED
from hwemu.snp.check import Check, Fault
from hwemu.snp.firmware import Firmware
from hwemu.snp.fwrules import COMMANDS, MOVES
from hwemu.snp.fwstatus import FirmwareRefused, FwStatus
from hwemu.snp.ghcb import NEEDS, SNP_ONLY
from hwemu.snp.ghcbmsr import ANSWERS, FIELDS, Info
from hwemu.snp.guestcontext import TRANSITIONS, Policy
from hwemu.snp.guestops import Leaf, Vcpu
from hwemu.snp.hostops import NewState
from hwemu.snp.launch import TYPES, PageType
from hwemu.snp.psc import MAX_ENTRIES, ORDER, PscError
from hwemu.snp.report import OFFSETS
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import FIELDS as ENTRY
from hwemu.snp.rmpentry import PAGE_SIZE, STATES, Entry
from hwemu.snp.rmpfault import Remedy
from hwemu.snp.sev import SEV_TRANSITIONS

Table = Callable[[list[str], list[list[str]]], str]

INSTRUCTIONS: list[tuple[str, str, Sequence[Check[Any]]]] = [
    ("RMPUPDATE", "host; success clears Validated, VMSA and permissions", hostops.RMPUPDATE),
    ("PSMASH", "host; 2M becomes 512 × 4K, all else is kept", hostops.PSMASH),
    ("RMPREAD", "host; changes nothing", hostops.RMPREAD),
    ("PVALIDATE", "guest; sets or clears Validated", guestops.PVALIDATE),
    ("RMPADJUST", "guest; a lesser VMPL's mask, and at VMPL0 the VMSA bit", guestops.RMPADJUST),
    ("RMPQUERY", "guest; changes nothing", guestops.RMPQUERY),
]
ACCESSES: list[tuple[str, str, Sequence[Check[Any]]]] = [
    ("Writes of the host", "data and page tables", access.HOST_WRITE),
    ("Shared writes of a guest", "C-bit 0, and every write without SNP", access.SHARED_WRITE),
    ("Private accesses of an SNP guest", "C-bit 1, fetches, page tables", access.PRIVATE),
]
LIMITS = [
    ["the reverse map table, pages of 4K and 2M", "segmented tables; 1G is mapped as 2M"],
    [
        "RMPUPDATE, PSMASH, RMPREAD, PVALIDATE, RMPADJUST, RMPQUERY",
        "two processors at one entry at once; frames can be held as in use",
    ],
    ["VMPL masks, VMSA pages", "shadow stacks, virtual top of memory, interrupt injection"],
    [
        "launch, its digest, secrets and CPUID pages, attestation reports",
        "swapping out and in, migration agents, VLEKs, derived keys, the ID block's signature",
    ],
    ["who sees ciphertext", "ciphers: messages and reports carry HMACs, and say so (algorithm 0)"],
    ["the GHCB: MSR words, page, events, page state changes", "the emulation behind the events"],
]
_CONTEXT, _PAGE, _ASID = 0, 2, 1


class _Nothing:
    """A memory whose contents nobody looks at."""

    def read(self, pfn: int) -> bytes:
        return bytes(PAGE_SIZE)

    def write(self, pfn: int, contents: bytes) -> None: ...

    def zero(self, pfn: int) -> None: ...

    def copy(self, source: int, target: int) -> None: ...


def _machine() -> Firmware:
    """A machine with a guest that is being launched."""
    firmware = Firmware(Rmp(4, group=2, max_asid=1), _Nothing())
    firmware.init()
    hostops.rmpupdate(firmware.rmp, _CONTEXT, NewState(True, immutable=True))
    firmware.gctx_create(_CONTEXT)
    firmware.launch_start(_CONTEXT, int(Policy.MUST_BE_ONE | Policy.SMT))
    firmware.activate(_CONTEXT, _ASID)
    return firmware


def _update(new: NewState) -> Callable[[Firmware], object]:
    return lambda firmware: hostops.rmpupdate(firmware.rmp, _PAGE, new)


def _validate(validate: bool) -> Callable[[Firmware], object]:
    return lambda firmware: guestops.pvalidate(
        firmware.rmp, Vcpu(_ASID), Leaf(0, _PAGE), 0, validate=validate
    )


def _adjust(vmsa: bool) -> Callable[[Firmware], object]:
    return lambda firmware: guestops.rmpadjust(
        firmware.rmp, Vcpu(_ASID), Leaf(0, _PAGE), 0, target=1, permissions=0, vmsa=vmsa
    )


def _launch(kind: PageType) -> Callable[[Firmware], object]:
    return lambda firmware: firmware.launch_update(_CONTEXT, _PAGE, kind)


LEND = "RMPUPDATE immutable"
#: What can happen to a page, and under which name the diagram has it.
DEEDS: list[tuple[str, Callable[[Firmware], object]]] = [
    ("RMPUPDATE", _update(NewState())),
    ("RMPUPDATE", _update(NewState(True, asid=_ASID))),
    (LEND, _update(NewState(True, immutable=True, asid=_ASID))),
    ("RMPUPDATE immutable, ASID 0", _update(NewState(True, immutable=True))),
    ("PVALIDATE", _validate(True)),
    ("PVALIDATE", _validate(False)),
    ("RMPADJUST", _adjust(True)),
    ("RMPADJUST", _adjust(False)),
    ("SNP_LAUNCH_UPDATE", _launch(PageType.NORMAL)),
    ("SNP_LAUNCH_UPDATE, VMSA", _launch(PageType.VMSA)),
    ("SNP_GCTX_CREATE", lambda firmware: firmware.gctx_create(_PAGE)),
    ("SNP_MD_INIT", lambda firmware: firmware.md_init(_CONTEXT, _PAGE)),
    ("SNP_PAGE_RECLAIM", lambda firmware: firmware.page_reclaim(_PAGE)),
]


def _page_moves() -> list[tuple[str, str, str]]:
    """Do everything to a page in every state; what changes its state, for the diagram.

    RMPUPDATE of an assigned page is shown to Hypervisor only, and where it lends a guest's page
    (gpa and ASID stay): what else it makes of one, it makes of a page of the hypervisor.
    """
    found = []
    for row in STATES:
        entry = Entry(
            row.assigned, 0, row.immutable, PAGE_SIZE if row.gpa else 0, int(row.guest),
            bool(row.vmsa), row.validated, (15, 0, 0, 0) if row.guest else (0, 0, 0, 0),
        )  # fmt: skip
        for name, deed in DEEDS:
            firmware = _machine()
            firmware.rmp.store(_PAGE, entry)
            with contextlib.suppress(FirmwareRefused):
                deed(firmware)
            new = firmware.rmp.state(_PAGE)
            again = row.assigned and name.startswith("RMPUPDATE") and new.value != "Hypervisor"
            again &= not (row.guest and name == LEND)
            if new is not row.state and not again:
                found.append((str(row.state), name, str(new)))
    firmware = _machine()
    firmware.decommission(_CONTEXT)
    after = str(firmware.rmp.state(_CONTEXT))
    return [*found, ("Context", "SNP_DECOMMISSION", after)]


def _answer(check: Check[Any]) -> str:
    if isinstance(check.answer, Fault):
        return check.answer.value
    return f"{check.answer.name} {check.status}"


def _checks(table: Table, of: list[tuple[str, str, Sequence[Check[Any]]]]) -> str:
    parts = []
    for name, what, checks in of:
        rows = [
            [str(number), check.must, _answer(check), check.source]
            for number, check in enumerate(checks, 1)
        ]
        head = ["", "must hold", "else", "source"]
        parts.append(f"### {name}\n\n{what[0].upper()}{what[1:]}.\n\n{table(head, rows)}")
        if checks is hostops.RMPUPDATE:
            parts.append(_kept(table))
    return "\n".join(parts)


def _kept(table: Table) -> str:
    rows = [[row.must, row.source] for row in hostops.KEPT]
    return f"""It clears nothing when nothing but Immutable changes, which is so if

{table(["holds", "source"], rows)}
We know of no sentence in the manuals that says that this update keeps Validated. It is implied by
the states of the firmware ABI: there is no other way to Pre-Swap, which SNP_PAGE_MOVE and
SNP_PAGE_SWAP_OUT take. Published tools for attacks on SNP's encryption move pages of running guests
so: RMPUPDATE, immutable, of the source with its gpa and of the target with any, then SNP_PAGE_MOVE.
The guest goes on, and nobody reclaims the target: it is Guest-Valid at once.
"""


def _diagram(steps: Sequence[tuple[str, str, str]]) -> str:
    def word(state: str) -> str:
        return state.replace("-", "_")

    lines = [f"    {word(old)} --> {word(new)}: {what}" for old, what, new in steps]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```", ""])


def _flag(value: bool | None) -> str:
    return "–" if value is None else str(int(value))


def _status(names: type[outcome.RmpupdateStatus] | Any) -> str:
    return ", ".join(f"{status.name} {status.value}" for status in names)


def snp(mark: str, table: Table) -> str:
    """Draw docs/snp.md."""
    states = [
        [
            str(row.state), _flag(row.assigned), "> 0" if row.guest else "0",
            _flag(row.immutable), _flag(row.validated),
            "–" if row.gpa is None else "> 0" if row.gpa else "0", _flag(row.vmsa), row.meaning,
        ]
        for row in STATES
    ]  # fmt: skip
    bits = [[name, f"{bit + width - 1}:{bit}"] for name, (bit, width) in ENTRY.items()]
    pages = _diagram(_page_moves())
    guests = _diagram(
        [
            (str(old), command.name, str(new) if new else "[*]")
            for (old, command), new in TRANSITIONS.items()
            if new is not old
        ]
    )
    asids = _diagram([(str(old), str(event), str(new)) for (old, event), new in ASIDS.items()])
    taken = ", ".join(f"{state} {status.name}" for state, status in REFUSED.items())
    types = [
        [f"{kind.name} {kind.value}", "yes" if row.hashed else "no", row.leaves,
         "4K, 2M" if row.large else "4K"]
        for kind, row in TYPES.items()
    ]  # fmt: skip
    commands = [
        (f"{command.name} {command.value:#05x}", "the AMD-SP", checks)
        for command, checks in COMMANDS.items()
    ]
    moves = [[*map(str, before), *map(str, after)] for before, after in MOVES.items()]
    report = [[f"{at:#05x}", str(size), name] for name, (at, size) in OFFSETS.items()]
    words = [
        [f"{info.name} {info.value:#05x}",
         ", ".join(f"{name} {bit + width - 1}:{bit}" for name, (bit, width) in FIELDS[info].items())
         or "–",
         ANSWERS[info].name if info in ANSWERS else "–"]
        for info in Info
    ]  # fmt: skip
    events = [
        [f"{event.name} {event.value:#x}", ", ".join(needs) or "–",
         "SNP" if event in SNP_ONLY else "SEV-ES, SNP"]
        for event, needs in NEEDS.items()
    ]  # fmt: skip
    errors = ", ".join(f"{error.name} {error.value:#x}" for error in PscError)
    orders = "; ".join(
        f"to {op.name.lower()}: {', then '.join(step.value for step in steps)}"
        for op, steps in ORDER.items()
    )
    remedies = "\n".join(f"- {one.name}: {one.value}" for one in Remedy)
    sev = _diagram(
        [
            (str(old), command, str(new) if new else "[*]")
            for (old, command), new in SEV_TRANSITIONS.items()
            if new is not old
        ]
    )
    used = sorted({FwStatus(check.status) for rows in COMMANDS.values() for check in rows})
    statuses = ", ".join(f"{status.name} {status.value:#x}" for status in used)
    return f"""# SEV-SNP

{mark}

`hwemu.snp` says, for every physical page of a host, whose it is and at which address of its guest,
what each instruction and command of the AMD-SP may change about that, and what every access meets.
It is a model of rules:

{table(["modelled", "not modelled"], LIMITS)}
The table of checks of each operation is asked from the top; the first row that does not hold
answers, and nothing has changed then. Only SNP_LAUNCH_UPDATE changes something when it refuses a
CPUID page: the page then holds what would be accepted.

## Entries

{table(["field", "bits of the first word"], bits)}
The second word has the permission masks, a byte each for VMPL0 to VMPL3: read 1, write 2, execute
as user 4, execute as supervisor 8. The entry of a page of 2M is that of its first frame; the frames
behind it are only marked as assigned.

{table(["state", "assigned", "ASID", "immutable", "validated", "gpa", "VMSA", "meaning"], states)}
{pages}
## Instructions

Statuses of RMPUPDATE: {_status(outcome.RmpupdateStatus)}.
Of PSMASH: {_status(outcome.PsmashStatus)}. Of RMPREAD: {_status(outcome.RmpreadStatus)}.
Of a guest's: {_status(outcome.GuestStatus)}; the last is EAX 0 with CF.

{_checks(table, INSTRUCTIONS)}
## Accesses

What these do not stop is granted: the contents, or ciphertext for who has not the key of the guest
that owns the page. Reads of the host and shared reads are never stopped.

{_checks(table, ACCESSES)}
A hypervisor that gets #NPF with the RMP bit has one of these remedies (`rmpfault`):

{remedies}

## The AMD-SP

A guest's life, and that of its ASID. ACTIVATE of an ASID that is not free: {taken}.

{guests}
{asids}
Page types of SNP_LAUNCH_UPDATE; what is not hashed counts as a digest of zeroes.

{table(["type", "hashed", "leaves", "size"], types)}
Pages that SNP_PAGE_MOVE takes:

{table(["source", "target", "source afterwards", "target afterwards"], moves)}
Statuses that the tables give: {statuses}.

{_checks(table, commands)}
## Attestation reports

{table(["offset", "bytes", "field"], report)}
The signature is an HMAC-SHA-384 with a key of the machine, and SIGNATURE_ALGO is 0: no verifier
takes such a report for one of a real machine.

## GHCB

Words of the MSR protocol, bits 11:0 and fields:

{table(["message", "fields", "answer"], words)}
Events of the page, and what must be valid besides exit code and infos:

{table(["event", "needs", "guests"], events)}
IOIO needs RAX for OUT and a scratch area for strings, MSR needs RAX and RDX for WRMSR, CPUID needs
XCR0 for leaf 0xd, AP_CREATE needs RAX but for DESTROY.

A list of page state changes has up to {MAX_ENTRIES} entries. Neighbours that ask for the same
become one range; SMASH and UNSMASH are passed over. Its errors, in SW_EXITINFO2: {errors}.
A guest converts in this order: {orders}.

## Plain SEV

Without a reverse map table, memory is encrypted but anybody's: a write of the host goes through and
leaves garbage. KVM pins the regions that user space registers, by host-virtual addresses.

{sev}
## How it is tested

`tests/exhaustive/snp_predictor.py` and `snp_fwpredictor.py` say the same a second time, from the
manuals' prose; every operation is asked in every state of a small table, and random sequences must
agree (100,000 steps each with `scripts/test --slow`). `test_snp_world.py` explores what a host can
do to two guests, and that each rule is needed. Where the manuals leave an answer open, the source
column says *ours*: towards a refusal."""
