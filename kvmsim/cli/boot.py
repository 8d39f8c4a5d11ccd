# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmsim boot``: one VM, its console here."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from typing import Final

import click

from kvmsim.cli import streams
from kvmsim.cli.exitcodes import Exit, exit_code
from kvmsim.cli.failure import Failure, check_memory, ended_badly, explained
from kvmsim.cli.hosts import fence_option, make_host, movable_option
from kvmsim.cli.progress import PreallocProgress
from kvmsim.cli.tracing import opened_trace
from kvmsim.cli.verbosity import Verbosity, verbose_options
from kvmsim.cli.vms import make_vm, opened_disk
from kvmsim.console import ConsoleVm, Ending
from kvmsim.control import Control, NoControl, answering
from kvmsim.images import read_kernel
from kvmsim.qemuoptions import GUESTS, Options, parse_options
from kvmsim.running import RunningVm
from kvmsim.script import Vm
from kvmsim.scriptvalues import (
    DISCARDS,
    ENCRYPTS,
    KINDS,
    Memory,
    Payload,
    ScriptError,
    parse_memory,
    parse_payload,
)
from kvmsim.trace import FORMATS
from kvmsim.tracedvm import traced
from kvmsim.vmm.bootparams import MAX_VCPUS
from kvmsim.vmm.bounce import Disk

_UNIX: Final = "unix:"


def _memory(
    ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[Memory, ...]:
    try:
        return tuple(parse_memory(value) for value in values)
    except ScriptError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


def _payload(
    ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[Payload, ...]:
    try:
        return tuple(parse_payload(value) for value in values)
    except ScriptError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


def _place(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    if value != "stdio" and not (value.startswith(_UNIX) and value != _UNIX):
        raise click.BadParameter(f"{value!r}: write stdio or unix:PATH", ctx, parameter)
    return value


@click.command(short_help="Boot a guest on private memory.")
@click.option(
    "--memory", "memory", metavar="FILE[,offset=N,size=N,slots=N,prealloc=on]", callback=_memory,
    multiple=True,
    help="Private file as guest RAM, cut into SLOTS memslots (2); again for more RAM above it.",
)  # fmt: skip
@click.option(
    "--payload", metavar="FILE@GPA", callback=_payload, multiple=True,
    help="Put FILE into private memory before the guest runs; may be repeated.",
)  # fmt: skip
@click.option("-object", "objects", metavar="TYPE,id=ID,…", multiple=True,
              help="As QEMU: memory-backend-memfd-private,id=,size=,mem-path=[,offset=,prealloc=], "
              f"or {', '.join(GUESTS)} with id=[,discard=].")  # fmt: skip
@click.option("-machine", "machine", metavar="q35,memory-backend=ID,…",
              help="As QEMU: uses the objects; also confidential-guest-support=ID.")  # fmt: skip
@click.option("--kind", type=click.Choice(KINDS),
              help="What makes its memory private; of tdx, snp and pkvm models of the hardware "
              "join in.  [default: shared-bit]")  # fmt: skip
@click.option("--encrypt", type=click.Choice(ENCRYPTS), default=ENCRYPTS[0], show_default=True,
              help="Where the ciphertext of a tdx or snp guest is: in what others see of its "
              "pages, in its file, or nowhere.")  # fmt: skip
@click.option("--vcpus", type=click.IntRange(1, MAX_VCPUS), default=2, show_default=True)
@click.option("--name", default="vm0", show_default=True, help="Name in `privfs map` and status.")
@click.option("--kernel", metavar="ELF", type=click.Path(), help="Guest kernel.")
@click.option(
    "--discard", type=click.Choice(DISCARDS), help="The side that a conversion frees (both).",
)  # fmt: skip
@click.option("--disk", metavar="FILE", type=click.Path(),
              help="What the guest's bounce buffers move to and from.")  # fmt: skip
@click.option("--eager", is_flag=True,
              help="The guest accepts all memory before it prompts, not on first use.")  # fmt: skip
@click.option("--batches", is_flag=True,
              help="Let the guest convert many ranges by one call, an extension.")  # fmt: skip
@click.option("--selftest", is_flag=True, help="The guest tests its memory before it prompts.")
@click.option(
    "--console", "where", metavar="stdio|unix:PATH", callback=_place, default="stdio",
    help="Where the console is (stdio).",
)  # fmt: skip
@fence_option
@movable_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines: boot, console, end.")
@click.option("--timeout", metavar="S", type=click.FloatRange(min=0, min_open=True),
              help="End the VM after S seconds.")  # fmt: skip
@click.option(
    "--trace", "trace_path", metavar="FILE", type=click.Path(dir_okay=False),
    help="Write what happens in the VM to FILE: exits, faults, zaps, attributes.",
)  # fmt: skip
@click.option(
    "--trace-format", type=click.Choice(list(FORMATS)),
    help="text: as the kernel's tracefs; jsonl; chrome: for Perfetto. Else by FILE's suffix.",
)  # fmt: skip
@click.option("-q", "--quiet", is_flag=True, help="Say only what goes wrong.")
@verbose_options
def boot(
    memory: tuple[Memory, ...],
    payload: tuple[Payload, ...],
    objects: tuple[str, ...],
    machine: str | None,
    kind: str | None,
    encrypt: str,
    vcpus: int,
    name: str,
    kernel: str | None,
    discard: str | None,
    disk: str | None,
    eager: bool,
    batches: bool,
    selftest: bool,
    where: str,
    fence: str,
    movable: bool,
    as_json: bool,
    timeout: float | None,
    trace_path: str | None,
    trace_format: str | None,
    quiet: bool,
    verbosity: Verbosity,
) -> int:
    """Boot a guest kernel on private memory; return the guest's status.

    Console input is taken line by line.  When input ends, the VM ends as soon as all its vCPUs
    wait for more; Ctrl-C and SIGTERM end it at once.
    """
    verbosity.log_to_stderr()
    also = _qemu(objects, machine)
    for word, ours, theirs in (("discard", discard, also.discard), ("kind", kind, also.kind)):
        if ours and theirs:
            raise click.UsageError(
                f"--{word} and the {word} of -object: give one of them.",
                click.get_current_context(),
            )
    if not (memory := memory + also.memory):
        raise click.UsageError("Missing option '--memory'.", click.get_current_context())
    discard = discard or also.discard or "both"
    kind = kind or also.kind or KINDS[0]
    wanted = Vm(
        name, memory, vcpus, kernel, discard, selftest, payload, kind, disk, eager, batches, encrypt
    )
    if trace_format and not trace_path:
        raise click.UsageError("--trace-format needs --trace FILE.", click.get_current_context())
    with contextlib.ExitStack() as stack:
        running = RunningVm
        if trace_path:
            running = traced(stack.enter_context(opened_trace(trace_path, trace_format)))
        place: streams.Place = streams.Standard()
        if where != "stdio":
            place = stack.enter_context(streams.listening(where.removeprefix(_UNIX)))
        ending, vm = _live(
            wanted, place, timeout, running, fence, stack.enter_context(answering()),
            stack.enter_context(opened_disk(wanted.disk)),
            movable=movable, as_json=as_json, quiet=quiet or as_json,
        )  # fmt: skip
        code = exit_code(ending) if ending else Exit.TIMEOUT
        if as_json:
            click.echo(_end_event(vm, ending, code), nl=False)
        if ending is None:
            raise Failure(code, f"{name}: ended after {timeout:g} s, as --timeout says")
        if bad := ended_badly(ending):
            raise Failure(code, f"{name}: {bad}")
        if not quiet and not as_json:
            click.echo(f"kvmsim: {name}: {ending.message}", err=True)
    return code


def _qemu(objects: tuple[str, ...], machine: str | None) -> Options:
    try:
        return parse_options(objects, machine)
    except ScriptError as error:
        raise click.UsageError(f"{error}.", click.get_current_context()) from None


def _live(
    wanted: Vm,
    place: streams.Place,
    timeout: float | None,
    running: type[RunningVm],
    fence: str,
    control: Control | NoControl,
    disk: Disk | None,
    *,
    movable: bool,
    as_json: bool,
    quiet: bool,
) -> tuple[Ending | None, ConsoleVm]:
    """Run a VM from birth to end; its ending, None if its time was over."""
    for memory in wanted.memory:
        check_memory(memory, wanted.kind)
    with explained():
        image = read_kernel(wanted.kernel)
    host = make_host(fence, movable=movable)
    outlet = streams.Outlet()
    to_person = outlet.put
    if as_json and isinstance(place, streams.Standard):
        to_person = streams.JsonLines(outlet.put, wanted.name).output
    try:
        progress = PreallocProgress(wanted.name, as_json=as_json, quiet=quiet)
        with explained(), progress:
            vm = make_vm(
                host, wanted, to_person, outlet.ring, running=running, disk=disk,
                on_prealloc=progress.told,
            )  # fmt: skip
        control.add(wanted.name, vm.report, vm.tables)
        try:
            with explained():
                vm.boot(image)
            _announce(wanted, place, host.fence.kind.text, as_json=as_json, quiet=quiet)
            deadline = float("inf") if timeout is None else time.monotonic() + timeout
            if not streams.attend(vm, place, outlet, deadline):
                return None, vm
            return vm.ending(), vm
        except BrokenPipeError:
            raise SystemExit(Exit.SIGNAL + signal.SIGPIPE) from None
        finally:
            outlet.give_up()
            if isinstance(place, streams.Standard):
                place.end_line()
            control.remove(wanted.name)
            vm.close()
    finally:
        host.close()
        outlet.close()


def _announce(wanted: Vm, place: streams.Place, fence: str, *, as_json: bool, quiet: bool) -> None:
    sizes = [memory.size or os.stat(memory.path).st_size - memory.offset
             for memory in wanted.memory]  # fmt: skip
    if as_json:
        memory = [
            dataclasses.asdict(memory) | {"size": size}
            for memory, size in zip(wanted.memory, sizes, strict=True)
        ]
        line = streams.event(
            "boot", vm=wanted.name, pid=os.getpid(), kind=wanted.kind, vcpus=wanted.vcpus,
            memory=memory, fence=fence,
        )  # fmt: skip
        click.echo(line, nl=False)
    elif not quiet:
        files = ", ".join(memory.path for memory in wanted.memory)
        how = "Ctrl-C ends it" if isinstance(place, streams.Standard) else f"pid {os.getpid()}"
        click.echo(
            f"kvmsim: {wanted.name}: {wanted.kind}, {wanted.vcpus} vCPUs, {sum(sizes) >> 10} KiB "
            f"of private memory in {files}, fence {fence}; {how}",
            err=True,
        )


def _end_event(vm: ConsoleVm, ending: Ending | None, code: int) -> bytes:
    runner, machine = vm.running.statistics, vm.machine.statistics
    return streams.event(
        "end",
        vm=vm.config.label,
        end=ending.end.value if ending else "timeout",
        message=ending.message if ending else "",
        exit=int(code),
        statistics=dataclasses.asdict(machine) | dataclasses.asdict(runner),
    )
