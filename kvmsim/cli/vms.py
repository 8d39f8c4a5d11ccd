# SPDX-License-Identifier: GPL-2.0-or-later
"""From what a person asked for to a VM."""

from __future__ import annotations

from collections.abc import Callable

from kvmsim.console import ConsoleVm
from kvmsim.emulator import MemoryBackend, VmConfig, prepare_process
from kvmsim.hostmem import HostMemory
from kvmsim.images import read_payload
from kvmsim.running import RunningVm
from kvmsim.script import Vm
from kvmsim.vmm.bootparams import BootFlag
from kvmsim.vmm.convert import Discard
from kvmsim.vmm.prealloc import Progress


def make_vm(
    host: HostMemory,
    wanted: Vm,
    on_output: Callable[[bytes], None],
    on_end: Callable[[], None],
    *,
    running: type[RunningVm] = RunningVm,
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
        BootFlag.SELFTEST if wanted.selftest else BootFlag.NONE,
        tuple((payload.gpa, read_payload(payload.path)) for payload in wanted.payload),
    )
    return ConsoleVm(host, config, on_output, on_end, running=running, on_prealloc=on_prealloc)
