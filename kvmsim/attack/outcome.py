# SPDX-License-Identifier: GPL-2.0-or-later
"""What an attack ends in: a verdict, who gave it, and by what code."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

KINDS: Final = ("tdx", "snp", "pkvm", "sev", "sw-protected", "shared-bit")
"""Columns of the table: kinds of VMs, and plain SEV, of which there is only the model."""


class Verdict(Enum):
    """What became of it."""

    REFUSED = "refused"
    NOTICED = "noticed"
    """It was done, and who uses the page is told before it uses anything of it."""
    CONCEALED = "concealed"
    """It was done, and tells the attacker nothing."""
    SUCCEEDS = "succeeds"
    NONE = "does not apply"
    """There is nothing to attack."""


class Layer(Enum):
    """Where it stopped."""

    MOUNT = "mount"
    KVM = "KVM"
    MODULE = "TDX module"
    RMP = "RMP"
    EL2 = "pKVM hypervisor"
    MEMORY = "memory controller"
    IOMMU = "IOMMU"
    GUEST = "guest"
    OWNER = "guest's owner"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One ending; ``code`` is an errno, a status, an exception, or what was seen."""

    verdict: Verdict
    layer: Layer = Layer.NOBODY
    code: str = ""

    def __str__(self) -> str:
        if self.verdict is Verdict.NONE:
            return "–"
        if self.verdict is Verdict.SUCCEEDS:
            return f"succeeds: {self.code}"
        return f"{self.verdict.value} by {self.layer.value}: {self.code}"

    def plain(self) -> dict[str, Any]:
        """The same in plain values."""
        return {"verdict": self.verdict.value, "layer": self.layer.value, "code": self.code}


NONE: Final = Outcome(Verdict.NONE)


def refused(layer: Layer, code: str) -> Outcome:
    """It was not done."""
    return Outcome(Verdict.REFUSED, layer, code)


def noticed(layer: Layer, code: str) -> Outcome:
    """It was done, and found."""
    return Outcome(Verdict.NOTICED, layer, code)


def concealed(layer: Layer, code: str) -> Outcome:
    """It was done in vain."""
    return Outcome(Verdict.CONCEALED, layer, code)


def succeeds(code: str) -> Outcome:
    """It was done, and nobody stood against it."""
    return Outcome(Verdict.SUCCEEDS, Layer.NOBODY, code)


class AttackError(Exception):
    """An attack could not be tried: not an outcome, but a failure of the lab."""
