# SPDX-License-Identifier: GPL-2.0-or-later
"""From what a person asked for to a VM."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from hwemu.encryptedaccess import Encrypt
from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.failure import Failure
from kvmsim.confidential.platform import Platform
from kvmsim.console import ConsoleVm
from kvmsim.diskfile import FileDisk
from kvmsim.emulator import MemoryBackend, VmConfig, prepare_process
from kvmsim.hostmem import HostMemory
from kvmsim.images import read_payload
from kvmsim.running import RunningVm
from kvmsim.script import Vm
from kvmsim.vmm.bootparams import BootFlag, Technology
from kvmsim.vmm.bounce import SECTOR, Disk
from kvmsim.vmm.convert import Discard
from kvmsim.vmm.prealloc import Progress

#: By the words of :data:`kvmsim.scriptvalues.KINDS`.
TECHNOLOGIES: Final[Mapping[str, Technology]] = MappingProxyType(
    {technology.kind: technology for technology in Technology}
)


def make_vm(
    host: HostMemory,
    wanted: Vm,
    on_output: Callable[[bytes], None],
    on_end: Callable[[], None],
    *,
    running: type[RunningVm] = RunningVm,
    platform: Platform | None = None,
    disk: Disk | None = None,
    on_prealloc: Callable[[MemoryBackend, Progress], None] = lambda backend, progress: None,
) -> ConsoleVm:
    """Make a VM that has not booted.

    LinkError, PreallocError or ValueError if its memory cannot be used, NoImage for a payload.
    """
    prepare_process()
    config = VmConfig(
        tuple(MemoryBackend(m.path, m.offset, m.size, m.slots, m.prealloc) for m in wanted.memory),
        wanted.vcpus,
        wanted.name,
        Discard(wanted.discard),
        (BootFlag.SELFTEST if wanted.selftest else BootFlag.NONE)
        | (BootFlag.EAGER if wanted.eager else BootFlag.NONE),
        tuple((payload.gpa, read_payload(payload.path)) for payload in wanted.payload),
        TECHNOLOGIES[wanted.kind],
        wanted.batches,
        None if wanted.encrypt == "none" else Encrypt(wanted.encrypt),
    )
    return ConsoleVm(
        host, config, on_output, on_end, running=running, platform=platform, disk=disk,
        on_prealloc=on_prealloc,
    )  # fmt: skip


@contextlib.contextmanager
def opened_disk(path: str | None) -> Iterator[Disk | None]:
    """The disk behind the bounce buffers of a VM, None for none; Failure if it cannot be one."""
    if path is None:
        yield None
        return
    try:
        disk = FileDisk(path)
    except OSError as error:
        remedy = f"; make it with: truncate -s 1M {path}" if error.errno == errno.ENOENT else ""
        raise Failure(Exit.USAGE, f"disk {path}: {error.strerror}{remedy}") from error
    with disk:
        if not disk.sectors:
            raise Failure(
                Exit.USAGE,
                f"disk {path}: shorter than a sector of {SECTOR} bytes; make it longer with "
                f"truncate -s 1M {path}",
            )
        yield disk
