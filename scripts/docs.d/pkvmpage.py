# SPDX-License-Identifier: GPL-2.0-or-later
"""Draw docs/pkvm.md and docs/encryption.md."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from hwemu.encryptedaccess import RULES, Actor, Operation, Technology
from hwemu.pkvm.access import HOST_ACCESS, Mode
from hwemu.pkvm.fillable import STEPS, Phase
from hwemu.pkvm.hypercall import (
    FEATURES,
    HYP_MEMINFO,
    MEM_RELINQUISH,
    MEM_SHARE,
    MEM_UNSHARE,
    HostTask,
)
from hwemu.pkvm.state import Component, PageState
from hwemu.pkvm.transition import TRANSITIONS, Deed, Side, Transition

Table = Callable[[list[str], list[list[str]]], str]

MEANINGS = {
    PageState.OWNED: "its own; nobody else reaches it",
    PageState.SHARED_OWNED: "its own, lent to another",
    PageState.SHARED_BORROWED: "another's, lent to it",
    PageState.NOPAGE: "out of its reach",
}
#: What a call answers; x1 is an ipa in bytes, x2 and x3 must be 0.
CALLS = [
    ["HYP_MEMINFO", HYP_MEMINFO, "x1 must be 0 as well; x0 is the granule, 4096"],
    ["MEM_SHARE", MEM_SHARE, "0; the host maps or splits first where no page is mapped"],
    ["MEM_UNSHARE", MEM_UNSHARE, "0"],
    ["MEM_RELINQUISH", MEM_RELINQUISH, "0, also if nothing was mapped (Android)"],
    ["FEATURES", FEATURES, "x0 has a bit for each of these"],
]


def _states(side: Side) -> str:
    before = "/".join(state.name for state in side.before)
    return f"{side.who.name.lower()} {before} → {side.after.name}"


def _errors(deed: Deed) -> str:
    row = TRANSITIONS[deed]
    guest = row.side(Component.GUEST)
    found = ["EPERM state", "EINVAL range"]
    if guest is not None:
        found += ["ENOENT no VM"]
        if PageState.NOPAGE not in guest.before:
            found += ["ENOENT no leaf", "E2BIG leaf of another size"]
    found += [guard.value for side in row.checked for guard in side.guards]
    return "; ".join(found)


def _contents(row: Transition) -> str:
    if row.replaced is not None:
        return f"those of the page before, which is zeroed; of that: {_states(row.replaced)}"
    return "zeroed" if row.zeroed else "kept"


def _diagram(one: Component, other: Component) -> str:
    """Both components' states of a page as one state."""
    lines = ["```mermaid", "stateDiagram-v2"]
    named: dict[str, str] = {}
    edges = []
    for deed, row in TRANSITIONS.items():
        first, second = row.side(one), row.side(other)
        if first is None or second is None or row.replaced is not None:
            continue
        for mine, theirs in itertools.product(first.before, second.before):
            ends = []
            for a, b in ((mine, theirs), (first.after, second.after)):
                name = f"{a.name}_{b.name}"
                named[name] = f"{one.name.lower()} {a.name}, {other.name.lower()} {b.name}"
                ends.append(name)
            edges.append(f"    {ends[0]} --> {ends[1]}: {deed.value}")
    lines += [f'    state "{text}" as {name}' for name, text in named.items()]
    return "\n".join([*lines, *dict.fromkeys(edges), "```"])


def pkvm(mark: str, table: Table) -> str:
    """The page of pKVM."""
    states = [[state.name, str(int(state)), MEANINGS[state]] for state in PageState]
    rows = [
        [
            deed.value,
            _states(row.initiator),
            _states(row.completer),
            _contents(row),
            row.vm.value,
            _errors(deed),
            f"`{row.source}`" if "," not in row.source and ";" not in row.source else row.source,
        ]
        for deed, row in TRANSITIONS.items()
    ]
    modes = [
        [state.name, *(HOST_ACCESS[state, mode].value for mode in Mode)] for state in PageState
    ]
    calls = [[name, f"`{number:#x}`", what] for name, number, what in CALLS]
    tasks = "; ".join(f"{task.name}: {task.value}" for task in HostTask)
    steps = [
        [phase.value, step.value, after.value if isinstance(after, Phase) else f"errno {after}"]
        for (phase, step), after in STEPS.items()
    ]
    return f"""# pKVM

{mark}

`hwemu.pkvm` is the part of the protected hypervisor of arm64 that decides who reaches a page:
nothing is encrypted, pages change hands, and the second stage of everybody else loses them. One
memory serves a guest's private and shared pages, so it is what conversion in place was made for.

```python
from hwemu.pkvm.hypervisor import Hypervisor

hyp = Hypervisor(machine, [(0, 1 << 20)], hyp=[(0, 64)])  # pfns; EL2 keeps the first 64
vm = hyp.create_vm(4096)  # gfns 0 to 4095
hyp.host_donate_guest(vm, 1000, 0, 16)  # pfn, gfn, pages
hyp.guest_share_host(vm, 3)  # as by hypercall(…, MEM_SHARE, 3 << 12)
hyp.teardown(vm)  # every page is the host's again
```

`machine` clears pages and flushes what is cached of a second stage, and is called in the order of
safety: an entry goes, then what was cached of it, then contents change, then the next owner's entry
comes. A refusal raises `PkvmError` with the errno of the hypercall and changes nothing, of a range
of pages neither.

## States

Each component has a state of each page: host and hypervisor in `struct hyp_page`, a guest in
software bits 55 and 56 of its leaf. Where the host has NOPAGE, its invalid entry names the owner.

{table(["state", "bits", "for the component that page is"], states)}
## Transitions

Each check is made of the whole range before the next; the first page that fails is named.

{table(["transition", "initiator", "completer", "contents", "VM", "errors", "source"], rows)}
"EINVAL range" is: not all memory, outside the guest, a block that is not aligned, or a VM of
another kind than the column says. A page may be lent to several guests; it is the host's alone
again with the last.

Upstream moves nothing. `host_move_guest(vm, pfn, gfn, pages)` is a call of this model alone: what
donation and reclaim do, as one, of a guest that lives. The guest's leaf goes, then every
translation of both pages; EL2 copies; the old page is zeroed and the host's; the guest's leaf comes
back with the state that it had. The host gains nothing by it: it neither reaches the contents nor
chooses them. Of a range in which the guest owns some pages and shares others each moves by its own
row; the diagrams leave both out, since no pair of states changes.

Host and guest:

{_diagram(Component.HOST, Component.GUEST)}

Host and hypervisor:

{_diagram(Component.HOST, Component.HYP)}

## An access of the host

{table(["the host's state", *(mode.value for mode in Mode)], modes)}
## Hypercalls

{table(["call", "x0", "answer"], calls)}
A bad argument, and a state from which there is no transition, is INVALID_PARAMETER (-3) in x0.
Otherwise the guest leaves to the host. {tasks}.

## Freed under its guest

EL2 takes no page from a guest that lives: the host has it back when the guest relinquishes it, or
when the VM is torn down. What if the owner of the memory frees it all the same, by a punch, a
shrink, the end of its mount? The guest's leaf goes as for every user; then `kvmsim` asks EL2 for
the page and is refused (EINVAL), and the VM dies of it: no vCPU enters guest code again, its
teardown begins, the page is reclaimed, zeroed, and only then the owner is answered. So the caller
never waits for more than the vCPUs to leave, and no guest finds an empty page where it had written.
The log names the VM, its pages and the refusal; `kvmsim boot` ends with it.

- A page that the guest has shared is its own still, and the VM dies of it as well. What was
  relinquished, or never donated, is the host's to free.
- Upstream pins such pages (`pkvm_mem_abort()`), so that nobody frees them before teardown. A file
  of privfs is the owner's, who was promised that nobody keeps it waiting.

## Filled, then inaccessible

`hwemu.pkvm.fillable` is the file that pKVM's authors asked for in 2022: a program maps it, fills
it, unmaps it and closes it for good; then guests get its pages with what is in them.

{table(["file", "asked", "then"], steps)}
EBUSY while an access of the host is open. The hypervisor would stop a mapping that was forgotten as
well, by killing the program at its next touch.

## How it is tested

```
scripts/test tests/unit/test_pkvm.py tests/exhaustive/test_pkvm.py    situations, random steps
scripts/test tests/exhaustive/test_pkvm_worlds.py -s                  small worlds, all of them
scripts/test --slow tests/exhaustive/test_pkvm_worlds.py -s -k larger    the larger ones
```

The model is held against a predictor that was written from prose. In every state of a world: one
owner a page, what is borrowed is lent by its owner, no TLB has what a table has not, no secret of a
guest is in anybody's reach, and every VM can still be torn down.

## What is not modelled

- Rules, not cryptographic security, and no arm64 instructions: the engine runs x86-64 guests.
- Locks, per-CPU state, memcaches (so no ENOMEM but for the table of VMs), the buddy allocator of
  EL2 (its pages have order 0), vCPU registers.
- FF-A, protected modules, MMIO guard, pvmfw, host MMIO; devices only as references to pages
  (`pin`), as Android has them.
- Forced reclaim of a live guest's page, and the poison that it leaves there.
- Mainline moves one page or one block at a time; ranges are Android's. There a protected guest can
  be given blocks, which `host_split_guest` splits; in mainline it has pages alone.
- Pages that a dead guest had shared are not cleared, as in the kernel: the host has seen them.
"""


def encryption(mark: str, table: Table) -> str:
    """The page of encryption."""
    cells = list(itertools.product(Actor, Operation))
    rows = [
        [
            f"{actor.value}, {operation.value}",
            *(RULES[tech, actor, operation].outcome.value for tech in Technology),
        ]
        for actor, operation in cells
    ]
    sources = "".join(
        f"- {tech.value}: {actor.value}, {operation.value}: {rule.source}\n"
        for (tech, actor, operation), rule in RULES.items()
        if rule.source
    )
    return f"""# Encryption

{mark}

`hwemu.encryption` gives each guest a key: AES-128-XTS over whole pages, derived (HKDF-SHA256) from
a secret that the machine draws at boot, the key id, and how often that id was given out. The tweak
is the page's host-physical address. At teardown the key is destroyed, and every use of it raises
`KeyDestroyedError`.

- Equal pages differ at different addresses and under different keys; ciphertext moved to another
  address decrypts to noise.
- Ciphertext that is put back *at the same address* decrypts to what it was: there is no freshness.
- It models what each side sees. Keys are ordinary memory of the emulator, and it is not
  constant-time: nothing here protects anything.

## Two places for the ciphertext

- `encrypt=view`, the default: plaintext lies in the file, and a look of the host's is encrypted on
  the way. Guests run at full speed.
- `encrypt=backing`: ciphertext lies in the file. Guests run on shadow pages with the plaintext,
  which are written back and cleared before an invalidation is acknowledged
  (`ShadowPages.drop`).

Both tell everybody the same bytes.

## Guests that run

`kvmsim boot --encrypt view|backing|none` ([kvmsim.md](kvmsim.md)), `encrypt=` of a script's `vm`,
`VmConfig.encrypt`.

| | its key id | has a key from | to |
|---|---|---|---|
| tdx | HKID | TDH.MNG.KEY.CONFIG | TDH.MNG.KEY.FREEID |
| snp | ASID | SNP_ACTIVATE | SNP_DECOMMISSION |
| pkvm | – | – | – |

Every host has a secret of its own, drawn when the first of its guests is made. Whose a page is
says the hardware's table: the PAMT, the RMP, the host's stage 2. `HostView`
(`kvmsim.confidential.hostview`) is memory as software and devices of the host meet it, by
host-physical address; `Emulator.host_read` and `host_write` are the same by gpa. They answer with
an outcome of the table below, and with bytes if there are any. Of a range nothing is written if
part of it is refused.

- What the host stores into a TD's page takes the page's leaf away; the TD's next access leaves
  with KVM_EXIT_MEMORY_FAULT and EHWPOISON. Hardware ends the TD; here its VMM does. Acceptance
  and a punch heal the page.
- With `backing` a page is encrypted in its file when its first leaf is stored. What lies there
  before is what the launch loaded, or zeros. The file lags behind what the guest stores; a look
  of the host's, and the release of the page, write it back first.
- 1 GiB of a guest can be open in shadow pages at a time. A fault opens up to 16 pages, and leaves
  are of 4 KiB; a fault without a free shadow page is KVM_EXIT_MEMORY_FAULT with ENOMEM.
- With `none` the host reads plaintext where the table says ciphertext. All that is refused stays
  so.
- Of SEV without SNP there is the model alone (`hwemu.encryptedaccess`): kvmsim boots no such
  guest. What the host's writes would do to the TDX module's own pages is not modelled: nothing.

## Moves

KVM's guests ask that their memory stays where it is (MEMFILE_F_UNMOVABLE of v7), as
`kvm_gmem_migrate_folio()` moves nothing: [`privfs compact`](cli.md#moving-memory) refuses with
EOPNOTSUPP and the guest's name. Under `kvmsim boot --movable`:

| guest | moves | since |
|---|---|---|
| `tdx` with `view` or `none` | yes | TDH.MEM.PAGE.RELOCATE ([tdx.md](tdx.md)) takes the guest's \
acceptance along |
| `snp` with `view` or `none` | yes | SNP_PAGE_MOVE ([snp.md](snp.md)) takes Validated and the \
permissions of all VMPLs along; not with PAGE_SWAP_DISABLE in its policy |
| either with `backing` | no | ciphertext is bound to its address, and the owner copies it as it \
is |
| `pkvm` | yes | a call that no kernel has ([pkvm.md](pkvm.md#transitions)) gives each page \
another place, its state kept |

A move of a TD's memory: its entries are blocked and tracked before the acknowledgement, leaves of
2 MiB split (TDH.MEM.PAGE.DEMOTE), for RELOCATE takes 4 KiB; they stay so small. They stay BLOCKED,
their frames the TD's in the PAMT, while the owner copies; no other memory gets these addresses.
The next access brings the new extent, and every entry of it is relocated before a leaf is stored:
MAPPED again, or PENDING. A page that is punched meanwhile is removed (TDH.MEM.PAGE.REMOVE).
That is work by the page, about 25 µs before the acknowledgement and 30 at the arrival, so files of
more than 4 GiB, whose extents are larger than 64 MiB, are registered UNMOVABLE, whatever guest's.
Where hardware's RELOCATE copies, here the owner has copied already, past the module; a poisoned
page is as poisoned at its new place. What the module refuses to relocate, as outside of its
TDMRs, stays blocked: the guest's access is KVM_EXIT_MEMORY_FAULT with EIO.

A move of an SNP guest's memory: leaves are zapped, and when the flush is proven its pages are lent
to the AMD-SP before the acknowledgement (RMPUPDATE: Guest-Valid becomes Pre-Swap, Guest-Invalid
Pre-Guest), so no access passes while the owner copies. At the next access the new frames are lent,
too, SNP_PAGE_MOVE makes them what the old ones were, and these are the hypervisor's: no #VC, and no
PVALIDATE. Pages of 2 MiB move whole; where the new frames or a punch do not allow it, they are
broken first (SNP_PAGE_RECLAIM, PSMASH). A page that is punched meanwhile is reclaimed and taken
back. It costs 1 to 2 µs a page, most of it at the arrival. What the AMD-SP or
RMPUPDATE refuses, as a frame that the RMP does not cover, is taken back, with a warning that names
it: the guest's next access is #VC 0x404, as to any page that it has not validated.

A move of a protected VM's memory: leaves are zapped and the flush is proven before the
acknowledgement; for EL2 the guest has its old pages still, so nobody else reaches them or gets
their addresses. At the next access the new pages are donated in their stead, whole extents at once,
about 0.1 µs a page, and leaves of 2 MiB come back. EL2 would copy; here the owner has done so
already. What EL2 refuses stays the guest's at the old place, with a warning: its access is
KVM_EXIT_MEMORY_FAULT with EPERM. The VM dies of a page that is punched meanwhile, as of any
([pkvm.md](pkvm.md#freed-under-its-guest)).

## Who meets what at a private page

{table(["access", *(tech.value for tech in Technology)], rows)}
TDX is meant with the TD bit and integrity; *another guest* has a mapping by a defect of its
hypervisor, since PAMT, RMP and page states refuse to make one. A poisoned page is healed when it is
given to a guest anew. The host's program that meets pKVM's abort gets SIGSEGV ([pkvm.md](pkvm.md)).

## Sources

{sources}"""
