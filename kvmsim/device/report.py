# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VM of the device is and holds, for ``kvmsim stat``."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from kvmsim.device.vm import VmDevice
from kvmsim.holdings import held
from kvmsim.report import memory_report
from privfs.notifier.lane import LinkError


def vm_report(vm: VmDevice) -> dict[str, Any]:
    """What it is and holds now, in plain values; from a thread that may wait, with no lock held.

    As of :meth:`kvmsim.emulator.Emulator.report`, but for what its VMM does, which is not known
    here: ``discard`` and ``counters["vmm"]`` are None.
    """
    running, found, error = vm.running, None, ""
    try:
        found = held(running.lock, running.vm.mmu, running.private, vm.memory.side)
    except LinkError as lost:
        error = lost.strerror or str(lost)
    with running.lock:
        memory = memory_report(running.vm.mmu, found, {})
        counters = asdict(running.vm.statistics())
        vcpus = [
            {"vcpu": vcpu.index, "state": vcpu.state.value, "faults": vcpu.faults}
            for vcpu in running.vcpus
        ]
    del counters["slots"], counters["memory"]  # told already
    state = "not started"
    if running.started:
        state = "ended" if running.stopping else "running"
    return {
        "vm": running.label,
        "pid": os.getpid(),
        "state": state,
        "kind": vm.kind.name,
        "hardware": None if vm.launch is None else vm.launch.describe(),
        "fence": running.host.fence.kind.text,
        "discard": None,
        "vcpus": vcpus,
        **memory,
        "counters": {"vm": counters, "runner": asdict(running.statistics), "vmm": None},
        "error": error,
    }
