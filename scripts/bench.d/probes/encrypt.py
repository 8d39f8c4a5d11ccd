# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast a TD takes its memory into use, by where its ciphertext is.

encrypt.py FILE PAGES none|view|backing    a TD fills PAGES it has not accepted; print JSON

The time is that from the command on the guest's console to its answer: acceptance, faults and
stores, no boot, no end. The file is allocated already, so memory is accepted by 2 MiB.
"""

from __future__ import annotations

import json
import sys
import threading
import time

from hwemu.encryptedaccess import Encrypt
from kvmsim.emulator import Emulator, MemoryBackend, VmConfig, prepare_process
from kvmsim.hostmem import HostMemory
from kvmsim.images import read_kernel
from kvmsim.uapi import PAGE_SIZE
from kvmsim.vmm.bootparams import Technology

_SECONDS = 50.0
_FIRST = 8 << 20


def main(path: str, npages: int, mode: str) -> None:
    """Boot the guest, give it the command, print what that took."""
    prepare_process()
    said, more = bytearray(), threading.Condition()

    def output(data: bytes) -> None:
        with more:
            said.extend(data)
            more.notify_all()

    def answered(word: bytes) -> None:
        with more:
            if not more.wait_for(lambda: word in said, _SECONDS):
                raise RuntimeError(f"no {word!r} within {_SECONDS:.0f} s: {bytes(said[-200:])!r}")

    host = HostMemory()
    encrypt = None if mode == "none" else Encrypt(mode)
    memory = (MemoryBackend(path, slots=1),)
    config = VmConfig(memory, 1, "bench", technology=Technology.TDX, encrypt=encrypt)
    emulator = Emulator(host, config, output)
    try:
        emulator.boot(read_kernel())
        answered(b"\n> ")
        began = time.perf_counter_ns()
        emulator.feed(f"fill {_FIRST:#x} {npages} 1\n".encode())
        answered(b"ok fill")
        took = time.perf_counter_ns() - began
    finally:
        emulator.close()
        host.close()
    found = {"pages": npages, "bytes": npages * PAGE_SIZE, "pages_per_second": npages * 1e9 / took}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
