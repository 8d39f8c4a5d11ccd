# SPDX-License-Identifier: GPL-2.0-or-later
"""The demonstration: guest-private memory under a running VM, every sentence checked."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from typing import Any

from children import KVMSIM, PRIVFS, Child, Guest, fields, traces_of
from interrupts import Interrupted, Signals
from stage import Differs, Stage

MIB = 1 << 20
PAGE = 4096
LOW = 2 * MIB  # guest-physical address of the first byte of the file: shared memory is below
DATA = 256 * MIB  # guest-physical: what the guest fills
SPUN = 512 * MIB  # guest-physical: the range that is punched while both vCPUs use it
SPUN_PAGES = 256
ROUNDS = 200
VCPUS = 2
_PUNCH = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch(fd: int, offset: int, length: int) -> float:
    """Punch a hole; how long the system call took, in microseconds."""
    began = time.perf_counter()
    failed = _libc.fallocate(fd, _PUNCH, offset, length)
    took = (time.perf_counter() - began) * 1e6
    if failed:
        raise Differs(f"fallocate: {os.strerror(ctypes.get_errno())}")
    return took


def mib(size: int) -> str:
    """Return whole MiB as fallocate(1) reads them."""
    return f"{size // MIB}M"


class Demo:
    """One run.  ``close`` leaves nothing behind, whatever happened before."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        self.base = tempfile.mkdtemp(prefix="privfs-demo.")
        self.stage = Stage(self.base)
        self.dir = os.path.join(self.base, "mnt")
        self.ram = os.path.join(self.dir, "ram")
        self.mount: Child | None = None
        self.guests: list[Guest] = []

    # --- helpers ------------------------------------------------------------------------------

    def boot(self, name: str) -> Guest:
        """Boot a guest on the file and wait for its prompt."""
        command = [KVMSIM, "boot", "--memory", self.ram, "--vcpus", str(VCPUS), "--name", name]
        self.stage.typed("kvmsim " + shlex.join(command[1:]))
        began = time.monotonic()
        with self.signals.held():
            guest = Guest(name, self.ram, VCPUS)
            self.guests.append(guest)
        guest.until("in private memory", 20)
        took = time.monotonic() - began
        self.stage.shown("\n".join(guest.seen))
        self.stage.claim(
            f"{VCPUS} vCPUs up" in guest.seen[-1],
            f"the guest runs in private memory, {VCPUS} vCPUs up, {took:.1f} s after the command",
            guest.seen[-1],
        )
        return guest

    def ask(self, guest: Guest, line: str, seconds: float = 20) -> str:
        """Type a command on a guest's console, shown with its answer."""
        self.stage.typed(line, prompt=f"{guest.name}> ")
        answer = guest.ask(line, seconds)
        self.stage.shown(answer)
        return answer

    def used(self) -> int:
        """Bytes of the budget in use, as df(1) has it."""
        found = os.statvfs(self.dir)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def map(self) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Return rows and totals of ``privfs map``."""
        found = json.loads(self.stage.must([PRIVFS, "map", "--json", self.ram], quiet=True))
        return found["rows"], found["totals"]

    # --- the steps ----------------------------------------------------------------------------

    def start(self) -> None:
        """Mount, and make a file."""
        stage = self.stage
        stage.say(f"In the directory {self.base}:")
        stage.title("Memory that you can mount")
        os.mkdir(self.dir)
        stage.typed(f"privfs mount -o size=1G {self.dir}")
        with self.signals.held():
            self.mount = Child("privfs", [PRIVFS, "mount", "-o", "size=1G", "--", self.dir])
        stage.shown(self.mount.until("^privfs on "))
        stage.must(["truncate", "-s", "1G", self.ram])
        stage.must(["ls", "-lsh", self.ram])
        size, blocks = os.stat(self.ram).st_size, os.stat(self.ram).st_blocks
        stage.claim((size, blocks) == (1 << 30, 0), "1 GiB long, and no memory in use yet")

    def guest_runs(self) -> Guest:
        """Boot a guest on it, let it test its memory."""
        stage = self.stage
        stage.title("A guest runs in it")
        guest = self.boot("vm0")
        stage.say("Both vCPUs write patterns over 8 MiB, check each other's, and zero them:")
        answer = self.ask(guest, f"test {DATA:#x} {8 * MIB // PAGE}")
        stage.claim(fields(answer)["errors"] == 0, "the guest's self-test found no error", answer)
        return guest

    def refusals(self) -> None:
        """Show that the host cannot get at the contents."""
        stage = self.stage
        stage.title("The host cannot look inside")
        stage.say("The file has a size, memory and an owner. It has no contents for anyone here.")
        copy = os.path.join(self.base, "copy")
        for command in (
            ["cat", self.ram],
            ["dd", f"if={self.ram}", "of=/dev/null", "bs=4k", "count=1"],
            ["dd", "if=/dev/zero", f"of={self.ram}", "bs=4k", "count=1", "conv=notrunc"],
            ["cp", self.ram, copy],
        ):
            ran = stage.run(command)
            refused = ran.status != 0 and "Invalid argument" in ran.output
            stage.claim(refused, f"{command[0]}: refused, EINVAL", ran)
        size = os.path.getsize(copy) if os.path.exists(copy) else 0
        stage.claim(size == 0, "cp has copied nothing", size)
        stage.typed(f"mmap({self.ram}, PROT_READ, MAP_SHARED)")
        fd = os.open(self.ram, os.O_RDWR)
        try:
            mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ).close()
            code = 0
        except OSError as error:
            code = error.errno or 0
        finally:
            os.close(fd)
        stage.shown(os.strerror(code))
        stage.claim(code == errno.ENODEV, "mmap: refused, ENODEV", os.strerror(code))

    def contents(self, guest: Guest) -> None:
        """Show who uses which page."""
        stage = self.stage
        stage.title("But the host sees where memory is, and who uses it")
        stage.say("The host preallocates 64 MiB; the guest fills them, and the host adds 4 MiB.")
        stage.must(["fallocate", "-o", mib(DATA - LOW), "-l", "64M", self.ram])
        self.ask(guest, f"fill {DATA:#x} {64 * MIB // PAGE} 0x5ec2e7")
        stage.must(["fallocate", "-o", "768M", "-l", "4M", self.ram])
        stage.must([PRIVFS, "map", self.ram])
        rows, totals = self.map()
        user = f"vm0({guest.pid})"
        states = {(row["state"], tuple(row["users"])) for row in rows}
        stage.claim(("hole", ()) in states, "holes: no memory there", states)
        preallocated = {"state": "allocated", "users": [], "start": 768 * MIB, "end": 772 * MIB}
        stage.claim(
            any(preallocated.items() <= row.items() for row in rows),
            "allocated: 4 MiB that no VM has mapped", rows,
        )  # fmt: skip
        stage.claim(
            ("mapped", (user,)) in states and totals["mapped"] >= 64 * MIB,
            f"mapped: by {user}, the process that runs this VM", totals,
        )  # fmt: skip

    def punching(self, guest: Guest) -> None:
        """Take memory away under two vCPUs that use it."""
        stage = self.stage
        stage.title("Memory is taken away under running vCPUs")
        length = SPUN_PAGES * PAGE
        stage.say(f"vCPU 1 reads and writes random pages of {SPUN_PAGES}, vCPU 0 watches one word.")
        self.ask(guest, f"spin 1 {SPUN + 2 * PAGE:#x} {SPUN_PAGES - 2} random")
        self.ask(guest, f"poke {SPUN:#x} 0x1234")
        guest.type(f"watch {SPUN:#x}")
        stage.typed(f"watch {SPUN:#x}", prompt=f"{guest.name}> ")
        stage.shown(guest.until("^watching"))
        stage.must(["fallocate", "-p", "-o", mib(SPUN - LOW), "-l", mib(length), self.ram])
        answer = guest.until("^(ok|error) watch")
        stage.shown(answer)
        seen = fields(answer)
        stage.claim(
            (seen["before"], seen.get("after")) == (0x1234, 0),
            f"after {seen['reads'] - 1} reads of 0x1234 the next one was 0", answer,
        )  # fmt: skip
        stage.say(f"The same {ROUNDS} times, with the clock on the system call:")
        fd = os.open(self.ram, os.O_RDWR)
        try:
            rounds = [self._round(guest, fd, number + 1, length) for number in range(ROUNDS)]
        finally:
            os.close(fd)
        wrong = [seen for _, seen in rounds if seen]
        stage.claim(
            not wrong, f"{ROUNDS} times the first other value was 0, and so was a word beside it",
            wrong[:1],
        )  # fmt: skip
        times = [took for took, _ in rounds]
        stage.say(
            f"  fallocate of {mib(length)}, with the proof of both vCPUs: min {min(times):.0f} µs, "
            f"median {statistics.median(times):.0f} µs, max {max(times):.0f} µs"
        )
        answer = self.ask(guest, "stat 1")
        worked = fields(answer)
        stage.claim(
            worked["v1.mismatches"] == 0, "vCPU 1 met nothing but zeros and its own", answer
        )
        stage.claim(worked["v1.zeros"] > ROUNDS, f"and it met {worked['v1.zeros']} fresh pages")
        self.ask(guest, "stop")

    def _round(self, guest: Guest, fd: int, value: int, length: int) -> tuple[float, str]:
        """Write two words, watch one, punch both; microseconds, and what was not as it must be.

        The second word is read after fallocate has returned, in a page whose translation the vCPU
        has had since it wrote there.
        """
        other = SPUN + PAGE
        guest.ask(f"poke {SPUN:#x} {value}")
        guest.ask(f"poke {other:#x} {value}")
        guest.type(f"watch {SPUN:#x}")
        guest.until("^watching")
        took = punch(fd, SPUN - LOW, length)
        seen = guest.until("^(ok|error) watch")
        beside = guest.ask(f"peek {other:#x}")
        watched = fields(seen)
        right = (watched.get("before"), watched.get("after")) == (value, 0)
        return took, "" if right and fields(beside)["value"] == 0 else f"{seen}; {beside}"

    def given_back(self) -> None:
        """Show that punched memory is free for others."""
        stage = self.stage
        stage.title("What is punched is given back")
        before = self.used()
        stage.must(["du", "-h", self.ram])
        stage.must(["fallocate", "-p", "-o", mib(DATA - LOW), "-l", "64M", self.ram])
        stage.must(["du", "-h", self.ram])
        stage.must(["df", "-h", self.dir])
        freed = before - self.used()
        stage.claim(freed == 64 * MIB, "64 MiB are back, in du and in df", freed)

    def shrinking(self, guest: Guest) -> None:
        """Cut the file off under the guest."""
        stage = self.stage
        stage.title("The file is cut off under the guest")
        self.ask(guest, f"spin 1 {SPUN:#x} {SPUN_PAGES} write")
        stage.must(["truncate", "-s", "256M", self.ram])
        status = guest.wait()
        reason = guest.seen[-1]
        stage.shown(reason)
        stage.claim("beyond the end of the private file" in reason, "kvmsim says why it ended")
        stage.claim(status == 123, "and returns 123: the guest cannot go on", status)
        rows, totals = self.map()
        stage.claim(not any(row["users"] for row in rows), "nobody uses the file any more", rows)
        stage.claim(
            self.used() == totals["allocated"] < 256 * MIB,
            f"{totals['allocated'] >> 10} KiB are left in it, all else is free", totals,
        )  # fmt: skip

    def killing(self) -> None:
        """Kill an emulator; file, mount and budget do not care."""
        stage = self.stage
        stage.title("The emulator is killed")
        guest = self.boot("vm1")
        self.ask(guest, f"spin 0 {128 * MIB:#x} 1024")
        self.ask(guest, f"spin 1 {128 * MIB:#x} 1024")
        stage.typed(f"kill -9 {guest.pid}")
        guest.kill()
        fd = os.open(self.ram, os.O_RDWR)
        try:
            took = punch(fd, 0, 256 * MIB)
        finally:
            os.close(fd)
        stage.say(f"Punching all of the file right afterwards took {took:.0f} µs.")
        stage.claim(took < 1e6, "the owner knew from its pidfd that this user is dead")
        stage.must([PRIVFS, "status", self.dir])
        found = stage.must([PRIVFS, "status", "--json", self.dir], quiet=True)
        status = json.loads(found)[0]
        stage.claim(status["sessions"] == [], "no session is left", status["sessions"])
        stage.claim(self.used() == 0, "no memory is in use", self.used())
        stage.claim(os.stat(self.ram).st_size == 256 * MIB, "the file is there: 256 MiB")
        stage.say("And a new VM boots on it:")
        guest = self.boot("vm2")
        self.ask(guest, f"test {64 * MIB:#x} 512")
        self.ask(guest, "halt")
        stage.claim(guest.wait() == 0, "it ends with status 0, as it was told")

    def leave(self) -> None:
        """Unmount."""
        stage = self.stage
        stage.title("Nothing is left behind")
        stage.must(["rm", self.ram])
        stage.must([PRIVFS, "umount", self.dir])
        assert self.mount is not None
        stage.claim(self.mount.wait() == 0, "unmounted, and privfs has ended with status 0")

    def play(self) -> None:
        """All of it."""
        self.start()
        guest = self.guest_runs()
        self.refusals()
        self.contents(guest)
        self.punching(guest)
        self.given_back()
        self.shrinking(guest)
        self.killing()
        self.leave()

    # --- the end ------------------------------------------------------------------------------

    def close(self) -> list[str]:
        """End what runs, remove what was made; what is left nevertheless."""
        for guest in self.guests:
            guest.end()
        if self.mount is not None:
            self.mount.end()
        if os.path.ismount(self.dir):
            self.stage.run([PRIVFS, "umount", "--lazy", self.dir])
        if not os.path.ismount(self.dir):
            shutil.rmtree(self.base, ignore_errors=True)
        return traces_of(self.base)


def main() -> int:
    """Play; 0 if all was as claimed, 1 if not, 128 + n after signal n."""
    began = time.monotonic()
    signals = Signals()
    demo = Demo(signals)
    stage, status = demo.stage, 0
    try:
        signals.heed()
        demo.play()
    except Interrupted as interrupted:
        status = 128 + interrupted.number
        stage.failed(f"ended by {signal.Signals(interrupted.number).name}")
    except Differs as differs:
        status = 1
        stage.failed(str(differs))
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # nobody reads; clean up in silence
    finally:
        signals.ignore()
        left = demo.close()
    if left:
        stage.failed("left behind: " + "; ".join(left))
        return status or 1
    if status == 0:
        stage.claim(True, "no mount, no process, no socket, no directory")
        took = time.monotonic() - began
        stage.say("\nGuests under models of TDX, SEV-SNP and pKVM: kvmsim demo all")
        stage.say(f"\nAll {stage.claims} claims held, in {took:.0f} s.")
    return status


if __name__ == "__main__":
    sys.exit(main())
