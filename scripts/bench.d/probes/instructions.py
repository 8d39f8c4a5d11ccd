# SPDX-License-Identifier: GPL-2.0-or-later
"""How many instructions a second a vCPU runs of the two loops of cpu_floor.

instructions.py count|memory ITERATIONS    run the loop to its HLT; print JSON

"count" is dec, jnz; "memory" is load, add, store, dec, jnz on one word of a page that is not
executable, as in any guest with NX.
"""

from __future__ import annotations

import json
import struct
import sys
import time

from hwemu.cpu.api import HltExit
from hwemu.testing import PD, Machine

_DATA = 2 << 20
# P RW A D PS and NX of a 2 MiB page (AMD APM vol. 2, 5.4).
_LARGE_NX = 0xE3 | 1 << 63

#: Body of the loop, instructions for each time round.
_LOOPS = {
    "count": (b"\x48\xff\xc9\x75\xfb", 2),  # 1: dec rcx; jnz 1b
    "memory": (
        b"\x48\x8b\x07"  # 1: mov rax, [rdi]
        b"\x48\x83\xc0\x01"  # add rax, 1
        b"\x48\x89\x07"  # mov [rdi], rax
        b"\x48\xff\xc9\x75\xf1",  # dec rcx; jnz 1b
        5,
    ),
}


def main(name: str, iterations: int) -> None:
    """Run the loop briefly to translate it, then for the time."""
    body, instructions = _LOOPS[name]
    with Machine() as machine:
        machine.write(PD + 8, struct.pack("<Q", _DATA | _LARGE_NX))
        for times in (1000, iterations):
            cpu = machine.boot(body + b"\xf4", rcx=times, rdi=_DATA)
            start = time.perf_counter_ns()
            left = cpu.run()
            took = time.perf_counter_ns() - start
            if not isinstance(left, HltExit) or cpu.get_regs().rcx:
                raise RuntimeError(f"the guest left for another reason: {left}")
        if name == "memory" and machine.word(_DATA) != iterations + 1000:
            raise RuntimeError(f"the guest counted to {machine.word(_DATA)}")
    print(json.dumps({"instructions_per_second": iterations * instructions * 1e9 / took}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
