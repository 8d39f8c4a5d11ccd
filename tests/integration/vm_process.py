# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM as its own process: ``vm_process.py KERNEL LABEL FILE...``, console on stdin and stdout.

``vm ended STATUS MESSAGE`` is its last line.  The end of input ends the VM.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from kvmsim.emulator import Emulator, MemoryBackend, VmConfig, prepare_process
from kvmsim.hostmem import HostMemory


def main() -> int:
    prepare_process()
    kernel, label, *paths = sys.argv[1:]

    def output(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    host = HostMemory()
    config = VmConfig(tuple(MemoryBackend(path) for path in paths), 2, label)
    vm = Emulator(host, config, output)

    def feed() -> None:
        for line in sys.stdin:
            vm.feed(line.encode())
        vm.stop("its input has ended")

    vm.boot(Path(kernel).read_bytes())
    threading.Thread(target=feed, daemon=True).start()
    outcome = vm.wait()
    assert outcome is not None
    vm.close()
    host.close()
    print(f"\nvm ended {outcome.status} {outcome.message}", flush=True)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
