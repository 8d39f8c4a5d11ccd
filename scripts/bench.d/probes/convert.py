# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast private memory becomes shared, beside a punch of the same.

convert.py FILE BYTES convert|punch    the private FILE is a VM's RAM, all of it allocated and
                                       mapped; convert or punch it, BYTES at a time; print JSON

A conversion is what the VMM does: it changes the attribute, which zaps, and discards the private
side. A punch is the last part alone, the zap comes with it. No vCPU runs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial

from kvmsim.emulator import Emulator, MemoryBackend, VmConfig, prepare_process
from kvmsim.hostmem import HostMemory
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE
from kvmsim.vmm.convert import Converted, Discard, convert_memory
from kvmsim.vmm.loader import LOW_SIZE

_LARGE = 2 << 20


def _fill(emulator: Emulator, size: int) -> None:
    source = bytes(min(size, _LARGE))
    emulator.memory.set_memory_attributes(LOW_SIZE, size, True)
    for at in range(0, size, len(source)):
        emulator.memory.populate(LOW_SIZE + at, source)


def _convert(emulator: Emulator, step: int, gpa: int) -> None:
    ram = emulator.machine.config.ram
    done = convert_memory(emulator.memory, ram, gpa, step, private=False, discard=Discard.PRIVATE)
    if not isinstance(done, Converted) or done.discarded != step:
        raise RuntimeError(f"not converted: {done}")


def _punch(emulator: Emulator, step: int, gpa: int) -> None:
    emulator.memory.discard_private(gpa, step)


_WAYS = {"convert": _convert, "punch": _punch}


def main(path: str, step: int, way: str) -> None:
    """Build the machine, fill it, do it once for every part, print what it took."""
    prepare_process()
    size = os.stat(path).st_size
    host = HostMemory()
    emulator = Emulator(
        host, VmConfig((MemoryBackend(path, slots=1),), vcpus=1, label="bench"), lambda output: None
    )
    try:
        _fill(emulator, size)
        act = partial(_WAYS[way], emulator, step)
        start = time.perf_counter_ns()
        for gpa in range(LOW_SIZE, LOW_SIZE + size, step):
            act(gpa)
        took = time.perf_counter_ns() - start
        (left,) = (held for slot, held in emulator.allocated().items() if slot)
        if left.private:
            raise RuntimeError(f"{left.private} private pages are left")
    finally:
        emulator.close()
        host.close()
    found = {"pages": size >> PAGE_SHIFT, "pages_per_second": size / PAGE_SIZE * 1e9 / took}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
