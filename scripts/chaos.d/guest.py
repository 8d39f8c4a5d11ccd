# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM under chaos: ``guest.py KERNEL LABEL SEED MUTANT OWN COMMON``, commands on stdin.

Its vCPUs stamp pages of OWN and judge what they read; all the while this process, from another
thread than the one that acknowledges, punches the pages that they have just read.  Commands:

``pause`` (answered ``paused``): no more punches of its own; others may punch until ``go``.
``begin`` (``begun``) and ``end`` (``ended``): all stamped pages are about to be punched, and were.
``fill PAGE PAGES`` (``filled``): write private pages of COMMON.
``stats`` (``stats PUNCHES READS DECISIVE BAD``), ``halt`` (``halted``).

``errno N`` is a punch of its own that failed, ``vm ended STATUS MESSAGE`` the last line of a VM
that ended by itself.
"""

from __future__ import annotations

import os
import select
import sys
from collections import deque
from pathlib import Path

import torture
from mutants import MUTANTS

from kvmsim.emulator import prepare_process
from kvmsim.hostmem import HostMemory
from kvmsim.uapi import PAGE_SIZE
from kvmsim.vmm.loader import LOW_SIZE


def say(text: str) -> None:
    print(text, flush=True)


class Guest:
    """One VM and its punches."""

    def __init__(self, guest: torture.Guest, own: Path, seed: int) -> None:
        self.guest = guest
        self.torture = torture.Torture(guest, own, seed)
        self.common = LOW_SIZE + own.stat().st_size
        self.punching = True
        self.lines: deque[str] = deque()
        self._rest = b""
        self.torture.start()
        first = self.torture.first_gfn - LOW_SIZE // PAGE_SIZE
        say(f"ready {first} {first + torture.Torture.PAGES}")

    def ended(self) -> bool:
        """Say so when the VM has ended by itself."""
        outcome = self.guest.emulator.wait(0)
        if outcome is not None:
            say(f"vm ended {outcome.status} {outcome.message}")
        return outcome is not None

    def punch(self) -> None:
        try:
            self.torture.punch(1)
        except OSError as error:
            say(f"errno {error.errno}")
            self.punching = False

    def obey(self, line: str) -> bool:
        """Do a command; False ends the process."""
        log, first, pages = self.guest.log, self.torture.first_gfn, torture.Torture.PAGES
        match line.split():
            case ["pause"]:
                self.punching = False
                say("paused")
            case ["go"]:
                self.punching = True
            case ["begin"]:
                log.begin_punch(first, pages)
                say("begun")
            case ["end"]:
                log.end_punch(first, pages)
                say("ended")
            case ["fill", page, count]:
                gpa = self.common + int(page) * PAGE_SIZE
                self.guest.console.command(f"fill {gpa:#x} {count} 7")
                say("filled")
            case ["stats"]:
                vcpus = range(len(self.guest.emulator.running.vcpus))
                stats = [log.stats(vcpu) for vcpu in vcpus]
                numbers = (
                    self.torture.result.punches,
                    sum(s.reads for s in stats),
                    sum(s.decisive for s in stats),
                    sum(s.bad for s in stats),
                )
                say("stats {} {} {} {}".format(*numbers))
                for bad in filter(None, (log.first_bad(vcpu) for vcpu in vcpus)):
                    say(f"bad read: {bad}")
            case ["halt"]:
                say("halted")
                return False
        return True

    def read(self) -> bool:
        """Take what has come; a text stream would hide lines from select."""
        data = os.read(0, 4096)
        *whole, self._rest = (self._rest + data).split(b"\n")
        self.lines.extend(line.decode() for line in whole)
        return bool(data)

    def run(self) -> int:
        while not self.ended():
            if self.lines:
                if not self.obey(self.lines.popleft()):
                    return 0
            elif select.select([0], [], [], 0 if self.punching else 0.2)[0]:
                if not self.read():
                    return 0
            elif self.punching:
                self.punch()
        return 1


def main() -> int:
    kernel, label, seed, mutant, own, common = sys.argv[1:]
    prepare_process()
    # A fence would keep what mutants leave open: their touches would bring no memory back.
    host = HostMemory("auto" if mutant == "none" else "none", movable=True)
    running = MUTANTS[mutant].running()
    image = Path(kernel).read_bytes()
    guest = torture.boot(host, image, Path(own), Path(common), label=label, running=running)
    try:
        return Guest(guest, Path(own), int(seed)).run()
    finally:
        guest.close()
        host.close()


if __name__ == "__main__":
    sys.exit(main())
