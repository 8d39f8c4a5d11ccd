# SPDX-License-Identifier: GPL-2.0-or-later
"""From the kind of a VM to the hardware that protects it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from hwemu.encryptedaccess import Encrypt
from kvmsim.confidential.base import Confidential
from kvmsim.confidential.platform import Platform
from kvmsim.kind import VmKind
from kvmsim.running import RunningVm

#: kind → module with ``make(platform, running, encrypt)``, loaded for the first guest of a kind.
_MODULES: Final[Mapping[str, str]] = MappingProxyType(
    {kind: f"kvmsim.confidential.{kind}" for kind in ("tdx", "snp", "pkvm")}
)


def make_guard(
    kind: VmKind, platform: Platform, running: RunningVm, encrypt: Encrypt | None = Encrypt.VIEW
) -> Confidential | None:
    """The hardware's side of a VM; None for a kind that has none."""
    module = _MODULES.get(kind.name)
    if module is None:
        return None
    guard: Confidential = importlib.import_module(module).make(platform, running, encrypt)
    return guard
