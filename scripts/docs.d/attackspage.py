# SPDX-License-Identifier: GPL-2.0-or-later
"""Draw docs/attacks.md."""

from __future__ import annotations

from collections.abc import Callable

from kvmsim.attack.catalog import ATTACKS
from kvmsim.attack.expected import TABLE, Row
from kvmsim.attack.outcome import KINDS, Layer, Verdict

Table = Callable[[list[str], list[list[str]]], str]

VERDICTS = {
    Verdict.REFUSED: "it is not done; *by* names who refuses, and how",
    Verdict.NOTICED: "it is done, and found before anything of it is used",
    Verdict.CONCEALED: "it is done, and gets or changes nothing that is private",
    Verdict.SUCCEEDS: "it is done, and nobody stands against it",
    Verdict.NONE: "there is nothing of the kind to attack (–)",
}
LAYERS = {
    Layer.MOUNT: "privfs, as the kernel's guest_memfd does",
    Layer.KVM: "slots, bindings, types of memory",
    Layer.MODULE: "a SEAMCALL's or TDCALL's completion status",
    Layer.RMP: "RMPUPDATE, PVALIDATE and the check of an access",
    Layer.EL2: "a page state that a transition does not start from; no entry in the host's stage 2",
    Layer.MEMORY: "keys and integrity tags",
    Layer.IOMMU: "the same for devices",
    Layer.GUEST: "an exception at its instruction, or what it remembers of a page",
    Layer.OWNER: "who compares the measurement",
}


def _reasons() -> list[list[str]]:
    """A line for all kinds of an attack that end alike for one reason."""
    lines = []
    for name, rows in TABLE.items():
        alike: dict[Row, list[str]] = {}
        for kind, row in rows.items():
            if row.outcome.verdict is not Verdict.NONE:
                alike.setdefault(row, []).append(kind)
        lines += [
            [f"`{name}`", ", ".join(kinds), row.why, row.source] for row, kinds in alike.items()
        ]
    return lines


def attacks(mark: str, table: Table) -> str:
    """The page of the attack lab."""
    listed = [[f"`{one.name}`", one.group, one.what] for one in ATTACKS.values()]
    matrix = [
        [f"`{name}`", *(str(rows[kind].outcome) for kind in KINDS)] for name, rows in TABLE.items()
    ]
    verdicts = [[verdict.value, text] for verdict, text in VERDICTS.items()]
    layers = [[layer.value, text] for layer, text in LAYERS.items()]
    return f"""# The attack lab

{mark}

`kvmsim attack` does to guests what their host could do, and says where each attempt stopped. The
attacker is the host: its programs, its VMM, its kernel. It calls whatever hardware lets a host call
(SEAMCALLs, RMPUPDATE, transitions of pKVM, second-stage entries, memslots, attributes, punches),
and nothing else.

```
$ kvmsim attack list
$ kvmsim attack run remap --kind snp
snp          remap           noticed by guest: #VC 0x404
1 attacks, all as expected
$ kvmsim attack run all --json > outcomes.jsonl
```

`run` takes names or `all`, `--kind` as often as wanted (else every kind), `--kernel ELF`. It mounts
memory of its own, boots the guest kernel on it ([guest.md](guest.md)), has the guest keep a secret
in a private page, attacks that page, and asks the guest what it finds; a guest that an attack has
spoiled is replaced. With `--json` each attack is a line: `attack`, `kind`, `outcome` and `expected`
(`verdict`, `layer`, `code`; `outcome` null and `error` where it could not be tried), `as_expected`,
`why`, `source`.

| exit code | meaning |
|---|---|
| 0 | every attack ended as the table below says |
| 1 | one did not, or could not be tried |
| 2 | wrong usage: no such attack, no such kind |
| 120 | no mount can be made |
| 121 | no guest kernel |

## What is attacked

{table(["attack", "by", "what is done"], listed)}
- *Programs* have the file on the mount, and the VMM its own memory. *Frames* are attacked by the
  host's kernel, by their host-physical address, with the tables of the guest that runs (PAMT, RMP,
  page states of the hypervisor). *Pages* are attacked through KVM's interface and the mount, at a
  gpa that the guest uses. *Life* is before it runs, and when its VMM hangs.
- `read-frame`, `write-frame`, `replay` and `dma-frame` go to the frame past KVM: the tables say
  whose it is, its key and tags ([encryption.md](encryption.md)) what becomes of the access. A TD
  that meets a poisoned page has ended.
- `sev` is the model of plain SEV alone: no guest is booted. `shared-bit` and `sw-protected` have no
  hardware that protects them; they are what the others are compared with.

## What it ends in

{table(["attack", *KINDS], matrix)}
{table(["verdict", "means"], verdicts)}
{table(["by", "is"], layers)}
## Why

{table(["attack", "kinds", "because", "source"], _reasons())}
Nothing succeeds here that hardware would refuse; `tests/integration/test_attacks.py` tries every
cell. A process is one host, with tables of its own. So that a confidential VM's file is bound to no
other VM, KVM looks at those of its process, and the mount at those of all processes
([protocol.md](protocol.md#exclusive-use), `tests/integration/test_exclusive.py`).
"""
