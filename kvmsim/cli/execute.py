# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmsim exec``: an unmodified program on the simulated /dev/kvm."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping

import click

from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.failure import Failure, explained
from kvmsim.cli.tracing import opened_trace
from kvmsim.cli.verbosity import Verbosity, verbose_options
from kvmsim.control import Control
from kvmsim.device.capabilities import OFFERED
from kvmsim.device.capabilities import vm_types as offered
from kvmsim.device.gmem import FLAGS
from kvmsim.device.system import KvmDevice
from kvmsim.emulator import prepare_process
from kvmsim.exec.memory import NoMount, temporary_mount
from kvmsim.exec.refusals import Refused
from kvmsim.exec.run import LaunchFailed, run
from kvmsim.kind import VmKind
from kvmsim.running import RunningVm
from kvmsim.trace import FORMATS
from kvmsim.tracedvm import traced
from kvmsim.uapi import ABIS, Abi
from privfs.notifier.lane import find_socket

log = logging.getLogger(__name__)


def _types(
    context: click.Context, parameter: click.Parameter, given: str | None
) -> Mapping[int, VmKind] | None:
    if given is None:
        return None
    try:
        return offered(given.split(","))
    except KeyError as error:
        known = ", ".join(OFFERED)
        raise click.BadParameter(f"no VM type {error}; there are: {known}") from None


@click.command(
    "exec",
    short_help="Run a program that uses /dev/kvm.",
    context_settings={"allow_interspersed_args": False},
)
@click.argument(
    "program", metavar="-- PROGRAM [ARGUMENT]…", nargs=-1, type=click.UNPROCESSED, required=True
)
@click.option(
    "--memory", metavar="DIR", type=click.Path(exists=True, file_okay=False),
    help="Where guest_memfds are made: a privfs mount, or a folder in one (a mount of its own).",
)  # fmt: skip
@click.option(
    "--abi", type=click.Choice(list(ABIS)), default="upstream", show_default=True,
    help="The interface of today, or that of the 2022 series.",
)  # fmt: skip
@click.option(
    "--vm-types", metavar="LIST", callback=_types,
    help=f"What KVM_CREATE_VM takes, with commas between: {', '.join(OFFERED)} "
    "(all of them).",
)  # fmt: skip
@click.option(
    "--in-place", is_flag=True,
    help="guest_memfds convert in place and keep the types (KVM_SET_MEMORY_ATTRIBUTES2).",
)  # fmt: skip
@click.option(
    "--gmem-flags", is_flag=True,
    help="Offer the flags of guest_memfds that Linux 6.18 has, for files that the host maps.",
)  # fmt: skip
@click.option(
    "--trace", "trace_path", metavar="FILE", type=click.Path(dir_okay=False),
    help="Write what happens in its VMs to FILE.",
)  # fmt: skip
@click.option("--trace-format", type=click.Choice(list(FORMATS)), help="Else by FILE's suffix.")
@verbose_options
def execute(
    program: tuple[str, ...],
    memory: str | None,
    abi: Abi,
    vm_types: Mapping[int, VmKind] | None,
    in_place: bool,
    gmem_flags: bool,
    trace_path: str | None,
    trace_format: str | None,
    verbosity: Verbosity,
) -> int:
    """Run PROGRAM unmodified; every KVM ioctl that it makes is answered by the simulator.

    Its guest_memfds are files of a privfs mount, its memory slots are its own memory, its vCPUs
    run here. Everything else that it does is between it and the kernel. The status is PROGRAM's.
    """
    verbosity.log_to_stderr()
    if in_place and abi == "v7":
        raise click.UsageError("--in-place: the interface of 2022 has no conversion in place")
    if vm_types is not None and abi == "v7":
        raise click.UsageError("--vm-types: the interface of 2022 has no VM types")
    if gmem_flags and abi == "v7":
        raise click.UsageError("--gmem-flags: the interface of 2022 has no guest_memfds")
    with contextlib.ExitStack() as stack:
        running: type[RunningVm] = RunningVm
        if trace_path is not None:
            running = traced(stack.enter_context(opened_trace(trace_path, trace_format)))
        if memory is not None:
            with explained():
                find_socket(memory)
        try:
            place = memory or stack.enter_context(temporary_mount())
        except NoMount as error:
            raise Failure(Exit.MEMORY, str(error)) from error
        prepare_process()
        control = Control()
        stack.callback(control.close)
        device = stack.enter_context(
            KvmDevice(
                place,
                abi=abi,
                running=running,
                in_place=in_place,
                types=vm_types,
                control=control,
                gmem_flags=FLAGS if gmem_flags else 0,
            )
        )
        if gmem_flags and not in_place and not device.asked(None).gmem_flags:
            log.warning(
                "--gmem-flags: none are offered, since the host can map no file of the mount; it "
                "needs personality=guest_memfd and passthrough, see: privfs doctor"
            )
        try:
            status = run(program, device)
        except LaunchFailed as failed:
            status = failed.status
        except Refused as refused:
            raise Failure(Exit.INTERNAL, str(refused)) from refused
    return Exit.SIGNAL - status if status < 0 else status
