# SPDX-License-Identifier: GPL-2.0-or-later
"""The page about the TDX model, drawn from its tables."""

from __future__ import annotations

from collections.abc import Callable

from hwemu.tdx.entry import LEAVES as ENTRY_LEAVES
from hwemu.tdx.entry import STATES, SeptState
from hwemu.tdx.fields import FIELDS
from hwemu.tdx.leaves import GUEST, LEAVES, REFUSALS, TOP, Check
from hwemu.tdx.locks import HOST_PRIORITY
from hwemu.tdx.pamt import PageType
from hwemu.tdx.states import LIFE_CYCLE, OPERATION, RUNNING_STATES, OpState
from hwemu.tdx.status import Operand, Status

Table = Callable[[list[str], list[list[str]]], str]

EXAMPLE = """```python
from hwemu.tdx import TdxError, TdxModule
from hwemu.tdx.fields import pack_params
from hwemu.tdx.pamt import Tdmr
from hwemu.tdx.td import TdParams

module = TdxModule([Tdmr(4 << 30, 1 << 30)], memory)  # memory: hwemu.tdx.Memory
tdr, *pages = range(4 << 30, (4 << 30) + (1 << 20), 4096)
module.mng_create(tdr, 32)
module.mng_key_config(tdr)
for _ in range(6):
    module.mng_addcx(tdr, pages.pop())
memory.write(0x10000, pack_params(TdParams(max_vcpus=1)))
module.mng_init(tdr, 0x10000)
tdvpr = pages.pop()
module.vp_create(tdr, tdvpr)
for _ in range(5):
    module.vp_addcx(tdvpr, pages.pop())
module.vp_init(tdvpr)
module.mr_finalize(tdr)

try:
    module.mem_page_aug(tdr, 0x1000, pages[-1])
except TdxError as error:
    print(error)  # EPT_WALK_FAILED | RCX: TDH.MEM.PAGE.AUG at gpa 0x1000 …
for level in (3, 2, 1):
    module.mem_sept_add(tdr, 0, level, pages.pop())
module.mem_page_aug(tdr, 0x1000, pages.pop())

module.vp_enter(tdvpr)
module.access(tdvpr, 0x1000, 2)  # VirtualException: the page is PENDING
module.tdcall(tdvpr, 6, rcx=0x1000)  # TDG.MEM.PAGE.ACCEPT
module.access(tdvpr, 0x1000, 2)  # Translation(hpa=…, level=0, rights=7)
module.seamcall(29, rcx=0x1000, rdx=tdr)  # PAGE.REMOVE: GPA_RANGE_NOT_BLOCKED | RCX
```
"""


def diagram(edges: list[tuple[str, str, str]]) -> str:
    """Draw a state diagram of (from, to, by what); several reasons share an arrow."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for old, new, why in edges:
        arrows.setdefault((old, new), []).append(why)
    lines = [f"    {old} --> {new}: {', '.join(why)}" for (old, new), why in arrows.items()]
    return "```mermaid\nstateDiagram-v2\n" + "\n".join(lines) + "\n```\n"


def entry_edges() -> list[tuple[str, str, str]]:
    """Return what moves an S-EPT entry, from the tables."""

    def made(number: int, new: SeptState) -> list[tuple[str, str, str]]:
        leaf = LEAVES[number]
        short = leaf.name.removeprefix("TDH.MEM.")
        return [(one.name, new.name, short) for one in sorted(leaf.entry_states) if one != new]

    edges = made(2, SeptState.MAPPED) + made(3, SeptState.NL_MAPPED) + made(6, SeptState.PENDING)
    for state, info in STATES.items():
        for after, why in (
            (info.blocked, "RANGE.BLOCK"),
            (info.unblocked, "RANGE.UNBLOCK"),
            (info.accepted, "TDG.MEM.PAGE.ACCEPT"),
        ):
            if after is not None:
                edges.append((state.name, after.name, why))
    return edges + made(29, SeptState.FREE) + made(30, SeptState.FREE)


def leaf_rows() -> list[list[str]]:
    """Return what allows each leaf and what it does."""
    rows = []
    for leaf in LEAVES.values():
        first, last = leaf.levels
        sizes = "–"
        if Check.ENTRY in leaf.order:
            top = "root" if last == TOP else str(last)
            sizes = str(first) if last == first else f"{first} to {top}"
        states = ", ".join(one.name for one in sorted(leaf.entry_states)) or "–"
        if len(leaf.entry_states) == len(SeptState):
            states = "any"
        operation = ", ".join(str(int(one)) for one in sorted(leaf.op_states)) or "–"
        rows.append([f"`{leaf.name}` {leaf.number}", states, sizes, operation, leaf.effect])
    return rows


def entry_rows() -> list[list[str]]:
    """Return what each state of an entry means."""
    rows = []
    for state, info in STATES.items():
        rights = "".join(one for bit, one in ((1, "R"), (2, "W"), (4, "X")) if info.rights & bit)
        leaf = "leaf" if state in ENTRY_LEAVES else "–"
        tracked = "yes" if info.tracked else "no"
        code, shown = f"{info.code:#04x}", str(info.public)
        rows.append([f"{state.name} {int(state)}", code, shown, leaf, rights or "–", tracked])
    return rows


def tdx(mark: str, table: Table) -> str:
    """Draw docs/tdx.md."""
    orders = [
        [
            f"`{leaf.name}`",
            " → ".join(check.name for check in leaf.order),
            ", ".join(code.name for code in dict.fromkeys(leaf.further)) or "–",
        ]
        for leaf in LEAVES.values()
    ]
    checks = [
        [check.name, check.value, ", ".join(code.name for code in codes)]
        for check, codes in REFUSALS.items()
    ]
    guest = [[f"`{name}` {number}", what] for number, (name, what) in GUEST.items()]
    life = [(old.name, new.name, why) for (old, why), new in LIFE_CYCLE.items()]
    operation = [(old.name, new.name, why) for (old, why), new in OPERATION.items()]
    types = ", ".join(f"{one.name} {one.value}" for one in PageType)
    states = ", ".join(f"{int(one)} {one.name}" for one in OpState)
    running = ", ".join(one.name for one in sorted(RUNNING_STATES))
    codes = [[code.name, f"`{int(code):#018x}`"] for code in Status]
    operands = ", ".join(f"{one.name} {one.value}" for one in Operand)
    fields = [[field.name, f"`{number:#018x}`"] for number, field in FIELDS.items()]
    first = ", ".join(sorted(kind.value for kind in HOST_PRIORITY))
    return f"""# The TDX model

{mark}

`hwemu.tdx` is one TDX 1.5 module as a value machine: PAMT, Secure EPT, the leaves of SEAMCALL and
TDCALL with their states, checks and status codes. It is for those who write a VMM or teach how one
works: each refusal that the module would give can be met here, by its name, in its order.

**It models rules, not cryptographic security.** Nothing is encrypted; whoever runs it can read all
of a TD's memory. The report's MAC is made with a key that is an argument. No attestation and no
secrecy follow from any of it.

{EXAMPLE}
`seamcall(leaf, rcx=…)` and `tdcall` take registers and return a `Result` with the registers after
it; `call` and the named methods raise `TdxError` instead where nothing has changed. What the CPU
side must do comes back as values: `FlushTlb`, `TdExit`, `VirtualException`, `DoubleFault`.
TDH.VP.ENTER returns at once: the vCPU then is in its TD until a `TdExit`, or until `td_exit`.
`copy()` and `key()` make worlds of it that can be explored.

## The leaves

Levels are 0 for 4 KiB, 1 for 2 MiB, 2 for 1 GiB. Operation states: {states}.

{table(["leaf", "entry states", "levels", "operation states", "effect"], leaf_rows())}
## The order of the checks

The first check that fails answers, and nothing has changed. Its operand stands in the low dword.
WALK, ENTRY, EMPTY, UNIFORM and "not blocked" leave the entry in RCX (as far as the host may see it)
and its level and state in RDX (2:0 and 15:8).

{table(["leaf", "checks", "further refusals"], orders)}
{table(["check", "asks for", "else"], checks)}
## An entry of the Secure EPT

R 0, W 1, X 2, memory type 5:3, TDMEM 6, PS 7, TDGL 8, D 9, TDEL 11, HPA 51:12, TDHP 52, TDEX 53,
TDBW 54, TDB 55, TDP 56, TDWR 59, TDSA 60, SVE 63. The code of a state is PS, TDMEM, TDP, TDB, TDBW,
TDEX, D from bit 6 to bit 0. A PENDING leaf of 2 MiB counts its accepted pages in 20:12. Tracked: a
vCPU may have it in its TLB, so that while the TD may run ({running})
it changes only after RANGE.BLOCK, TRACK, and the exit of every vCPU that entered before.

{table(["state", "code", "shown as", "", "rights", "tracked"], entry_rows())}
{diagram(entry_edges())}
RELOCATE and DEMOTE also unblock. PAGE.REMOVE leaves REMOVED while a TD is being imported.

## The life of a TD

Types of pages in the PAMT: {types}.

{diagram(life)}
{diagram(operation)}
In TEARDOWN every page is reclaimed by TDH.PHYMEM.PAGE.RECLAIM, the TDR last.

## The guest

An access to a leaf with the rights goes through. One to a PENDING page becomes #VE, or a TD exit
with SEPT_VE_DISABLE; a second #VE before VEINFO.GET is a double fault. Everything else is a TD exit
with an EPT violation. ACCEPT of what is not PENDING is a TD exit that says what was asked for.

{table(["leaf", "does"], guest)}
## Locks

`begin` takes the locks of a leaf and leaves it in its midst; what another leaf then answers is
OPERAND_BUSY. A host that was refused comes first: until it has been served the guest is answered
OPERAND_BUSY_HOST_PRIORITY. Such locks are: {first}. A vCPU that runs holds
its TD's root, shared.

## What is not modelled

- TDH.SYS.*: the module is initialised, all TDMRs with it. TDMRs need not be whole GiB.
- Migration: its states are in the tables, its leaves are not. A test or a loader sets them.
- Partitioned TDs (L2 VMs), service TDs, devices, TDG.MEM.PAGE.ATTR.*, metadata writes.
- CPUID, MSRs, the rest of a vCPU's state: that is the CPU side's.
- Key ids in addresses: an S-EPT entry holds the bare address.
- A leaf that is given one page for two purposes: hardware finds its own lock (OPERAND_BUSY), the
  model says that the page is not free.
- REMOVED met by ACCEPT is a TD exit here, as FREE is.

## A CPU beside it

The walk is `access`: ask it when the CPU misses, and keep what it answers (hpa, size, rights) until
`FlushTlb` of that vCPU. A nested page table that the engine reads is such a TLB: fill it from
`Translation`, drop it at `FlushTlb`, and give no page to anyone else but by the leaves. BLOCK and
REMOVE tell the CPU nothing, as in hardware: that is what TRACK is for.

The tests compare the model with a predictor that was written apart from it, on every state and in
100,000 random leaves, and explore small worlds in which a TLB never forgets:
`.venv/bin/python -m pytest tests/exhaustive -k tdx`.

## Fields that TDH.MNG.RD reads

{table(["field", "id"], fields)}
## Status codes

Operands: {operands}.

{table(["name", "value"], codes)}"""
