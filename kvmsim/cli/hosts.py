# SPDX-License-Identifier: GPL-2.0-or-later
"""The host that a command runs its VMs on, as its options want it."""

from __future__ import annotations

from typing import Final

import click

from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.failure import Failure
from kvmsim.fence import CHOICES, FenceError
from kvmsim.hostmem import HostMemory

fence_option: Final = click.option(
    "--fence", type=click.Choice(CHOICES), default=CHOICES[0], show_default=True,
    help="What stops touches of private memory that was not granted.",
)  # fmt: skip
movable_option: Final = click.option(
    "--movable",
    is_flag=True,
    help="Let private memory be moved while the VM runs.",
)


def make_host(fence: str, *, movable: bool = False) -> HostMemory:
    """Make the host memory of this process; Failure where its fence cannot be had."""
    try:
        return HostMemory(fence, movable=movable)
    except FenceError as error:
        raise Failure(Exit.MEMORY, f"{error.strerror}; see: privfs doctor") from error
