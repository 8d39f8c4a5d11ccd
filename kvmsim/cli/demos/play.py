# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps of a demonstration, the same for every kind of guest."""

from __future__ import annotations

import errno
import os
import re
import secrets
import sys
import time
from pathlib import Path
from typing import Any, Final

from kvmsim.cli.demos.attest import attest
from kvmsim.cli.demos.calls import Calls, watch
from kvmsim.cli.demos.kinds import Shown
from kvmsim.cli.demos.look import look
from kvmsim.cli.demos.stage import Differs, Stage
from kvmsim.cli.demos.talk import Talk, fields
from kvmsim.cli.vms import make_vm
from kvmsim.confidential.platform import Platform
from kvmsim.console import ConsoleVm, End
from kvmsim.diskfile import FileDisk
from kvmsim.fallocate import punch
from kvmsim.hostmem import HostMemory
from kvmsim.script import Vm
from kvmsim.scriptvalues import Memory
from kvmsim.uapi import PAGE_SIZE
from kvmsim.vmm.bounce import SECTOR
from kvmsim.vmm.loader import LOW_SIZE

MEMORY_SIZE: Final = 32 << 20
VCPUS: Final = 2
_UNIT: Final = 2 << 20
_WORDS: Final = PAGE_SIZE // 8
_DISK_SIZE: Final = 1 << 20

#: Where the steps work, gpa: units of 2 MiB that nothing else uses.
_ACCEPTED, _CONVERTED, _MOVED, _TAKEN = (0x100_0000 + index * _UNIT for index in range(4))
_MOVED_PAGES: Final = 16
_SECRET: Final = 0x5EC2E7_0F_4611_3579
_PROMPT: Final = re.compile("in private memory .* vCPUs up")
_MASK: Final = (1 << 64) - 1


class Play:
    """One demonstration on ``memory``, a private file; ``folder`` is for files of the host's.

    ``kernel`` is the guest's image as a file, ``measure`` the program that computes what it must be
    measured to. Call :meth:`run` once; whatever it ends with, nothing is left but the file.
    """

    def __init__(
        self, stage: Stage, shown: Shown, memory: str, folder: str, *, kernel: Path,
        measure: Path, eager: bool,
    ) -> None:  # fmt: skip
        self._stage = stage
        self._shown = shown
        self._memory = memory
        self._disk = os.path.join(folder, f"{shown.kind}-disk")
        self._kernel = kernel
        self._measure = measure
        self._eager = eager
        self._talk = Talk()
        self._closed = False
        self._idle = 0  #: bytes that a host maps for itself
        self._base = 0 if shown.kind != "sw" else LOW_SIZE  #: gpa of the file's first byte

    def run(self, host: HostMemory) -> None:
        """All steps; Differs at the first claim that does not hold."""
        Path(self._disk).write_bytes(bytes(_DISK_SIZE))
        platform = Platform(host)
        kind = "sw-protected" if self._shown.kind == "sw" else self._shown.kind
        calls = watch(platform, kind)
        assert platform.pages.used == 0
        self._idle = host.arena.statistics().placed_bytes
        memory = Memory(self._memory, 0, MEMORY_SIZE, prealloc=True)
        wanted = Vm(f"demo-{self._shown.kind}", (memory,), VCPUS, kind=kind, eager=self._eager)
        with FileDisk(self._disk) as disk:
            vm = make_vm(host, wanted, self._talk.put, self._talk.end, platform=platform, disk=disk)
            self._talk.type = vm.feed
            try:
                self._launch(vm, calls)
                self._come(vm, calls)
                self._convert(vm, calls)
                self._bounce(vm)
                attest(self._stage, self._shown, self._talk, vm, self._verifier(wanted))
                self._take(vm, calls)
                self._teardown(vm, platform, calls)
            finally:
                self._close(vm)

    def _close(self, vm: ConsoleVm) -> None:
        if not self._closed:
            self._closed = True
            vm.close()

    # --- the steps ------------------------------------------------------------------------------

    def _launch(self, vm: ConsoleVm, calls: Calls) -> None:
        stage, shown = self._stage, self._shown
        stage.title("A guest is launched in private memory")
        stage.say(shown.launch)
        image = self._kernel.read_bytes()
        began = time.monotonic()
        vm.boot(image)
        counts = calls.take(shown.last_call)
        lines = self._talk.until(_PROMPT)
        if counts:
            stage.calls(counts)
        stage.shown("\n".join(lines))
        stage.claim(
            f"{VCPUS} vCPUs up" in lines[-1],
            f"the guest runs in private memory, {time.monotonic() - began:.1f} s after its birth",
            lines[-1],
        )
        if shown.page_call:
            pages = len(vm.machine.load_plan(image).pages)
            found = counts.get(shown.page_call, 0)
            stage.claim(
                found == pages if shown.last_call else found >= pages,
                f"each of the {pages} pages of the image was taken by {shown.page_call}", counts,
            )  # fmt: skip
        else:
            explicit = vm.machine.statistics.conversions_explicit
            stage.claim(explicit > 0, f"it asked for {explicit} conversions", explicit)
        self._refused_to_the_host()

    def _refused_to_the_host(self) -> None:
        fd = os.open(self._memory, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pread(fd, 16, 0)
            code: int | None = 0
        except OSError as error:
            code = error.errno
        finally:
            os.close(fd)
        name = errno.errorcode.get(code or 0, "no error")
        self._stage.claim(
            code in (errno.EINVAL, errno.EPERM),
            f"read(2) of its memory is refused to the host: {name}", code,
        )  # fmt: skip

    def _come(self, vm: ConsoleVm, calls: Calls) -> None:
        stage, shown = self._stage, self._shown
        pages = _UNIT // PAGE_SIZE
        stage.title("Memory becomes the guest's " + ("at boot" if self._eager else "on first use"))
        stage.say(shown.comes)
        before = fields(self._ask("info"))
        calls.take()
        if shown.refused and not self._eager:
            left = before["unaccepted"]
            stage.claim(left > 0, f"{left >> 20} MiB are not accepted yet")
            answer = self._refused(f"touch {_ACCEPTED:#x}")
            stage.claim(shown.refused in answer, f"a use before that: {shown.refused}", answer)
            answer = self._ask(f"accept {_ACCEPTED:#x} {pages}")
            stage.claim(fields(answer)["accepted"] == pages, "2 MiB are accepted", answer)
            after = fields(self._ask("info"))["unaccepted"]
            stage.claim(left - after == _UNIT, f"{after >> 20} MiB are left", after)
        elif shown.refused:
            stage.claim(before["unaccepted"] == 0, "all of it is accepted already", before)
        faults = vm.running.vm.statistics().faults
        answer = self._ask(f"touch {_ACCEPTED:#x}")
        stage.claim(fields(answer)["value"] == 0, "a new page holds zeroes", answer)
        if counts := calls.take():
            stage.calls(counts)
        if not shown.refused:
            more = vm.running.vm.statistics().faults - faults
            stage.claim(more > 0, f"and came by {more} fault{'s' * (more > 1)}", more)
        self._ask(f"fill {_ACCEPTED:#x} {pages} {_SECRET:#x}")
        total = fields(self._ask(f"sum {_ACCEPTED:#x} {pages}"))["sum"]
        stage.claim(total == _SECRET * pages * _WORDS & _MASK, "it holds what is stored there",
                    hex(total))  # fmt: skip
        look(stage, shown.seen, vm, _ACCEPTED, _SECRET.to_bytes(8, "little"))

    def _convert(self, vm: ConsoleVm, calls: Calls) -> None:
        stage, shown, page = self._stage, self._shown, _CONVERTED
        stage.title("A page becomes shared, and private again")
        stage.say(shown.converted)
        self._ask(f"poke {page:#x} {_SECRET:#x}")
        stage.claim(not vm.machine.is_shared(page, PAGE_SIZE), "no device may reach the page yet")
        calls.take()
        self._ask(f"convert {page:#x} 1 shared")
        if counts := calls.take():
            stage.calls(counts)
        stage.claim(vm.machine.is_shared(page, PAGE_SIZE), "now a device may")
        kept = _SECRET if shown.keeps else 0
        seen = int.from_bytes(vm.machine.read_shared(page, 8), "little")
        stage.claim(
            seen == kept,
            "the host reads what the guest left in it" if shown.keeps else
            "and it finds zeroes: the private bytes are gone", hex(seen),
        )  # fmt: skip
        self._ask(f"poke {page:#x} 0xcafe shared")
        seen = int.from_bytes(vm.machine.read_shared(page, 8), "little")
        stage.claim(seen == 0xCAFE, "the host reads what the guest writes there", hex(seen))
        vm.machine.write_shared(page, (0xF00D).to_bytes(8, "little"))
        seen = fields(self._ask(f"peek {page:#x} shared"))["value"]
        stage.claim(seen == 0xF00D, "the guest reads what the host writes there", hex(seen))
        self._ask(f"convert {page:#x} 1 private")
        if counts := calls.take():
            stage.calls(counts)
        seen = fields(self._ask(f"peek {page:#x}"))["value"]
        kept = 0xF00D if shown.keeps else 0
        stage.claim(seen == kept, f"private again, it holds {kept:#x}", hex(seen))
        stage.claim(not vm.machine.is_shared(page, PAGE_SIZE), "and no device may reach it")

    def _bounce(self, vm: ConsoleVm) -> None:
        stage = self._stage
        stage.title("Private bytes go to a disk and come back, through shared bounce buffers")
        stage.say("A device reaches shared pages only, so the guest copies. The disk is a file.")
        size, second = _MOVED_PAGES * PAGE_SIZE, _DISK_SIZE // 2
        self._ask(f"fill {_MOVED:#x} {_MOVED_PAGES} {_SECRET:#x}")
        self._ask(f"bounce write {_MOVED:#x} {_MOVED_PAGES} 0")
        disk = Path(self._disk)
        stage.claim(
            disk.read_bytes()[:size] == _SECRET.to_bytes(8, "little") * (size // 8),
            f"{size >> 10} KiB in the file are byte for byte the guest's",
        )
        random = secrets.token_bytes(size)
        with disk.open("r+b") as file:
            file.write(random)
        stage.say("The host writes random bytes into the file; the guest reads them.")
        self._ask(f"bounce read {_MOVED:#x} {_MOVED_PAGES} 0")
        words = [int.from_bytes(random[at : at + 8], "little") for at in range(0, size, 8)]
        seen = fields(self._ask(f"sum {_MOVED:#x} {_MOVED_PAGES}"))["sum"]
        stage.claim(seen == sum(words) & _MASK, "their sum in private memory is theirs", hex(seen))
        self._ask(f"bounce write {_MOVED:#x} {_MOVED_PAGES} {second // SECTOR}")
        stage.claim(
            disk.read_bytes()[second : second + size] == random,
            "written back elsewhere they are the same, byte for byte",
        )
        bounce = vm.machine.bounce
        assert bounce is not None
        moved = bounce.statistics
        stage.claim(
            (moved.written_bytes, moved.read_bytes) == (2 * size, size),
            f"the device moved {moved.written_bytes >> 10} KiB out, {moved.read_bytes >> 10} in",
            moved,
        )

    def _take(self, vm: ConsoleVm, calls: Calls) -> None:
        stage, shown, page = self._stage, self._shown, _TAKEN
        stage.title("The host takes a private page away under the running guest")
        stage.say(shown.taken)
        self._ask(f"fill {page:#x} 2 {_SECRET:#x}")
        calls.take()
        before = self._counted(vm)
        if shown.gives:
            self._ask(f"{shown.gives} {page:#x} 1")
        offset = page - self._base
        name = os.path.basename(self._memory)
        stage.typed(f"fallocate --punch-hole -o {offset:#x} -l {PAGE_SIZE} {name}")
        fd = os.open(self._memory, os.O_RDWR | os.O_CLOEXEC)
        try:
            punch(fd, offset, PAGE_SIZE)
        finally:
            os.close(fd)
        if counts := calls.take():
            stage.calls(counts)
        if shown.counted:
            after = self._counted(vm)
            stage.claim(before - after == 1, "the hardware counts one private page less: "
                        f"{before} before, {after} now")  # fmt: skip
        if shown.refused:
            answer = self._refused(f"peek {page:#x}")
            stage.claim(shown.refused in answer, f"the guest notices: {shown.refused}", answer)
            answer = self._ask(f"accept {page:#x} 1")
            stage.claim(fields(answer)["lost"] == 1, "it takes a new page, knowing of the loss",
                        answer)  # fmt: skip
        seen = fields(self._ask(f"peek {page:#x}"))["value"]
        stage.claim(seen == 0, "which holds zeroes", hex(seen))
        seen = fields(self._ask(f"peek {page + PAGE_SIZE:#x}"))["value"]
        stage.claim(seen == _SECRET, "the page beside it is as it was", hex(seen))

    def _counted(self, vm: ConsoleVm) -> int:
        """How many private pages the hardware counts."""
        found: Any = {}
        if vm.guard is not None:
            with vm.running.lock:
                found = vm.guard.describe()
        for key in self._shown.counted:
            found = found[key]
        return int(found or 0)

    def _teardown(self, vm: ConsoleVm, platform: Platform, calls: Calls) -> None:
        stage = self._stage
        stage.title("The guest ends, and nothing is left of it")
        stage.say(self._shown.end)
        if vm.guard is not None:
            with vm.running.lock:
                stage.shown(_plain(vm.guard.describe()))
        self._ask("halt")
        ending = vm.ending(30)
        stage.claim(ending is not None and (ending.end, ending.status) == (End.GUEST, 0),
                    "it has ended with status 0", ending)  # fmt: skip
        calls.take()
        self._close(vm)
        if counts := calls.take():
            stage.calls(counts)
        left = vm.guard.residue() if vm.guard is not None else {}
        mapped = platform.host.arena.statistics().placed_bytes - self._idle
        left |= {"the host's pages for firmware": platform.pages.used, "bytes mapped": mapped}
        stage.claim(not any(left.values()), "left over: " + _plain(left), left)

    def _verifier(self, wanted: Vm) -> list[str]:
        """The command line of the program that measures by itself, and its options."""
        options = [
            "--kind", wanted.kind, "--memory", f"{MEMORY_SIZE >> 20}M",
            "--vcpus", str(wanted.vcpus), *["--eager"] * wanted.eager, "--report", "-",
        ]  # fmt: skip
        if self._kernel != self._measure.parent / "guests" / "build" / "kernel.elf":
            options += ["--kernel", str(self._kernel)]
        return [sys.executable, "-I", str(self._measure), *options]

    # --- the guest ------------------------------------------------------------------------------

    def _answer(self, line: str) -> str:
        self._stage.typed(line, "> ")
        answer = self._talk.ask(line)[-1]
        self._stage.shown(answer)
        return answer

    def _ask(self, line: str) -> str:
        answer = self._answer(line)
        if not answer.startswith("ok"):
            raise Differs(f"the guest answered {line!r} with {answer!r}")
        return answer

    def _refused(self, line: str) -> str:
        answer = self._answer(line)
        if not answer.startswith("error"):
            raise Differs(f"the guest answered {line!r} with {answer!r}, not with an error")
        return answer


def _plain(values: dict[str, Any]) -> str:
    """A line: names and counts; of longer values only the names."""
    words = []
    for name, value in values.items():
        if isinstance(value, dict):
            words.append(f"{name} ({_plain(value)})")
        elif not isinstance(value, list) and len(str(value)) <= 16:
            words.append(f"{name} {value}")
    return ", ".join(words)
