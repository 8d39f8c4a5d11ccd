# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast a guest touches private pages for the first time.

touch.py FILE    one vCPU writes a byte to each page of the private FILE, first to last; print JSON

The time is that between two port writes of the guest, so it holds faults and nothing else: no
boot, no end.  Guest page tables use 2 MiB pages; the second stage has 4 KiB leaves.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time

from kvmsim import exits
from kvmsim.emulator import Emulator, MemoryBackend, VmConfig, prepare_process, set_entry
from kvmsim.hostmem import HostMemory
from kvmsim.kind import SHARED_BIT
from kvmsim.uapi import PAGE_SIZE
from kvmsim.vmm.loader import LAYOUT, LOW_SIZE, EntryState

_SECONDS = 50.0
_LARGE = 2 << 20
_CODE = LAYOUT["image"][0]
_TABLES = LAYOUT["page tables"][0]
_PORT = 0xE0
# Page-table entries (AMD APM vol. 2, 5.4): P RW A for tables, P RW A D PS for 2 MiB leaves, NX.
_TABLE, _LEAF, _NX = 0x23, 0xE3, 1 << 63


def page_tables() -> bytes:
    """Low memory shared and executable, the rest of the first GiB private and not."""
    pml4 = [(_TABLES + PAGE_SIZE) | SHARED_BIT | _TABLE] + [0] * 511
    pdpt = [(_TABLES + 2 * PAGE_SIZE) | SHARED_BIT | _TABLE] + [0] * 511
    directory = [SHARED_BIT | _LEAF] + [i * _LARGE | _LEAF | _NX for i in range(1, 512)]
    return struct.pack("<1536Q", *pml4, *pdpt, *directory)


def code(gpa: int, npages: int) -> bytes:
    """Say so on a port, touch page after page, say so again."""
    return b"".join([
        b"\x48\xbf", struct.pack("<Q", gpa),  # mov rdi, gpa
        b"\x48\xb9", struct.pack("<Q", npages),  # mov rcx, npages
        b"\xe6", bytes([_PORT]),  # out PORT, al
        b"\xc6\x07\x01",  # 1: mov byte [rdi], 1
        b"\x48\x81\xc7", struct.pack("<I", PAGE_SIZE),  # add rdi, 4096
        b"\x48\xff\xc9",  # dec rcx
        b"\x75\xf1",  # jnz 1b
        b"\xe6", bytes([_PORT]),  # out PORT, al
        b"\xf4",  # hlt
    ])  # fmt: skip


def main(path: str) -> None:
    """Build the machine, run it once, print what it took."""
    prepare_process()
    size = os.stat(path).st_size
    npages = size // PAGE_SIZE
    times: list[int] = []

    def handle(vcpu: int, left: exits.Exit) -> bool:
        times.append(time.perf_counter_ns())
        if not isinstance(left, exits.IoExit) or left.port != _PORT:
            raise RuntimeError(f"the guest left for another reason: {left}")
        return len(times) < 2

    host = HostMemory()
    config = VmConfig((MemoryBackend(path, slots=1),), vcpus=1, label="bench")
    emulator = Emulator(host, config, lambda output: None)
    try:
        emulator.memory.set_memory_attributes(LOW_SIZE, size, True)
        emulator.memory.write_shared(_TABLES, page_tables())
        emulator.memory.write_shared(_CODE, code(LOW_SIZE, npages))
        entry = EntryState(
            rip=_CODE, rsp=_CODE, rdi=0, rsi=0, cr3=_TABLES | SHARED_BIT, gdt_base=0, gdt_limit=0
        )
        set_entry(emulator.running.vcpus[0].cpu, entry)
        emulator.running.make_runnable(0)
        emulator.running.start(handle)
        if emulator.wait(_SECONDS) is None:
            raise RuntimeError(f"the guest did not touch {npages} pages within {_SECONDS:.0f} s")
        asked = emulator.running.statistics.pages_asked
        faults = emulator.running.vcpus[0].faults
        if len(times) != 2:
            raise RuntimeError(f"the guest stopped: {emulator.running.stop_reason}")
    finally:
        emulator.close()
        host.close()
    rate = npages * 1e9 / (times[1] - times[0])
    found = {"pages": npages, "asked": asked, "faults": faults, "pages_per_second": rate}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
