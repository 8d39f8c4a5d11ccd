# SPDX-License-Identifier: GPL-2.0-or-later
"""What a technology is to an emulator: a guard that can also launch its guest and speak of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kvmsim.guard import Guard
from kvmsim.views.columns import Tables
from kvmsim.vmm.launch import LaunchPage
from kvmsim.vmm.vmsa import EntryState


class Confidential(Guard, Protocol):
    """One guest of one technology. Everything is called under the VM's lock, none of it waits."""

    def start(self, vcpus: int) -> None:
        """Create the guest: TDH.MNG.CREATE … TDH.VP.INIT, SNP_LAUNCH_START, __pkvm_init_vm().

        Its private memory is admitted from here on.
        """

    def stage(self, page: LaunchPage) -> bool:
        """The next `admit` of the page's gfn loads this content, in place of an empty page.

        False: it needs no guest page at all (SNP's VMSAs), and is loaded now.
        """

    def unstage(self, page: LaunchPage) -> None:
        """A page that was staged, and was not admitted, is not loaded after all."""

    def finish(self, entries: Sequence[EntryState]) -> None:
        """No page is loaded any more, and the vCPUs start so: TDH.MR.FINALIZE, SNP_LAUNCH_FINISH.

        Raises GuardRefusal, as `start` does.
        """

    def describe(self) -> dict[str, Any]:
        """What a person may want to know, in plain values: measurement, states, counts."""

    def tables(self) -> Tables:
        """What its tables say of its pages, to be copied by whoever wants to show it."""

    def residue(self) -> dict[str, int]:
        """After `close`: the table entries that still speak of this guest, by table; all 0."""
