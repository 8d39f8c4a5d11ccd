# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole VM in one process and one thread, for tests of the guest kernel.

It has the roles of the memory side, of KVM and of the runner in their simplest form: a page
allocator over one memfd, attributes as a list, vCPUs in turn. Private pages move to another
address each time they are allocated, as in a kernel, so that a stale translation reads old bytes.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from hwemu.arena import Arena, new_table_pool
from hwemu.cpu import api
from hwemu.cpu.unicorn_svm import SvmCpu
from hwemu.stage2 import Stage2
from kvmsim import exits
from kvmsim.vmm.bootparams import RamRange
from kvmsim.vmm.bounce import Disk
from kvmsim.vmm.launch import LaunchPage
from kvmsim.vmm.loader import EntryState
from kvmsim.vmm.machine import Machine, MachineConfig, Resume, Stop, Wait

PAGE = 4096
SHARED_BIT = 1 << 39
POOL_HPA = 256 << 20
SLICE_S = 0.001

TEST_GPA = 0x400000
TEST_GFN = TEST_GPA // PAGE
"""Where tests use private memory: behind the kernel, inside the stamp window."""


class GuestTimeout(AssertionError):
    """The guest did not do in time what the test waits for."""


class GuestVm:
    """RAM from ``config``, both sides anonymous. Use as a context manager."""

    def __init__(self, config: MachineConfig, disk: Disk | None = None) -> None:
        self.npages = max(r.end for r in config.ram) // PAGE
        self._ram = config.ram
        self._private = [False] * self.npages
        self._places: dict[int, int] = {}  # gfn -> page of the private store
        self._free = deque(range(2 * self.npages))
        self._arena = Arena(size=16 * self.npages * PAGE)
        self._shared_fd = os.memfd_create("guest-shared")
        self._private_fd = os.memfd_create("guest-private")
        os.ftruncate(self._shared_fd, self.npages * PAGE)
        os.ftruncate(self._private_fd, 2 * self.npages * PAGE)
        self._shared_hpa = self._arena.place(self._shared_fd, 0, self.npages * PAGE)
        self._private_hpa = self._arena.place(self._private_fd, 0, 2 * self.npages * PAGE)
        self._pool = new_table_pool(4 << 20)
        self.stage2 = Stage2(self._pool, POOL_HPA)
        self.machine = Machine(config, self, disk)
        self.cpus = [
            SvmCpu(self._arena, self._pool, POOL_HPA, self.stage2.root_hpa, i, self._on_fault)
            for i in range(config.vcpus)
        ]
        self._must_flush = [False] * config.vcpus
        self.output = ""
        self.stopped: Stop | None = None
        self._current: SvmCpu | None = None
        self._end = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="guest-ticker")
        self._ticker.start()

    # --- the memory side -----------------------------------------------------------------

    def set_memory_attributes(self, gpa: int, size: int, private: bool) -> bool:
        first, last = gpa // PAGE, (gpa + size) // PAGE
        changed = self._private[first:last] != [private] * (last - first)
        self._private[first:last] = [private] * (last - first)
        if changed:
            self._zap(first, last - first)
        return changed

    def discard_shared(self, gpa: int, size: int) -> None:
        self._zap(gpa // PAGE, size // PAGE)
        os.pwrite(self._shared_fd, bytes(size), gpa)

    def discard_private(self, gpa: int, size: int) -> None:
        self.punch(gpa // PAGE, size // PAGE)

    def read_shared(self, gpa: int, length: int) -> bytes:
        return os.pread(self._shared_fd, length, gpa)

    def write_shared(self, gpa: int, data: bytes) -> None:
        os.pwrite(self._shared_fd, data, gpa)

    def populate(self, gpa: int, source: bytes) -> None:
        raise AssertionError("these machines boot without a payload")

    def punch(self, gfn: int, npages: int, *, spare: tuple[int, ...] = ()) -> None:
        """Free private pages; the vCPUs in ``spare`` are not told (that is the bug to catch)."""
        self._zap(gfn, npages, spare=spare)
        for page in range(gfn, gfn + npages):
            if page in self._places:
                self._free.append(self._places.pop(page))

    def _zap(self, gfn: int, npages: int, *, spare: tuple[int, ...] = ()) -> None:
        self.stage2.zap(gfn * PAGE, npages)
        self.stage2.zap(gfn * PAGE | SHARED_BIT, npages)
        for index in range(len(self.cpus) if hasattr(self, "cpus") else 0):
            self._must_flush[index] |= index not in spare

    def private_pages(self) -> int:
        """How many private pages are allocated."""
        return len(self._places)

    def _on_fault(self, gpa: int, access: api.Access) -> bool:
        shared = self.is_shared_access(gpa)
        gfn = (gpa & ~SHARED_BIT) // PAGE
        if not self._in_ram(gfn) or self._private[gfn] is shared:
            return False
        if shared:
            hpa = self._shared_hpa + gfn * PAGE
        else:
            if not self.may_use(gfn):
                return False
            hpa = self._private_hpa + self._place(gfn) * PAGE
        self.stage2.map(gpa & -PAGE, hpa, 1)
        return True

    def is_shared_access(self, gpa: int) -> bool:
        """Which side a gpa is of: its bit says it, or, without one, the attribute."""
        technology = self.machine.config.technology
        if technology.private_bit:
            return not gpa & SHARED_BIT
        if technology.shared_bit:
            return bool(gpa & SHARED_BIT)
        gfn = gpa // PAGE
        return not self._in_ram(gfn) or not self._private[gfn]

    def may_use(self, gfn: int) -> bool:
        """Whether the guest has accepted a private page, where that is asked of it."""
        return True

    def _place(self, gfn: int) -> int:
        """The page of the private store for a gfn; a new one is zero."""
        if gfn not in self._places:
            self._places[gfn] = self._free.popleft()
            os.pwrite(self._private_fd, bytes(PAGE), self._places[gfn] * PAGE)
        return self._places[gfn]

    def read_private(self, gpa: int) -> bytes:
        """A private page as the processor or its firmware sees it."""
        return os.pread(self._private_fd, PAGE, self._place(gpa // PAGE) * PAGE)

    def write_private(self, gpa: int, data: bytes) -> None:
        """Write inside a private page as the firmware may."""
        os.pwrite(self._private_fd, data, self._place(gpa // PAGE) * PAGE + gpa % PAGE)

    def _in_ram(self, gfn: int) -> bool:
        return any(r.gpa <= gfn * PAGE < r.end for r in self._ram)

    # --- running -------------------------------------------------------------------------

    def boot(self, image: bytes, payload: Sequence[tuple[int, bytes]] = ()) -> None:
        """Load the image and set every vCPU to its entry."""
        if self.machine.config.technology.confidential:
            entries = self.machine.launch(self.machine.load_plan(image, payload), self.add_page)
        else:
            entries = self.machine.boot(image, payload)
        for cpu, entry in zip(self.cpus, entries, strict=True):
            set_entry(cpu, entry)

    def add_page(self, page: LaunchPage) -> None:
        """Load a page of a confidential guest."""
        self.write_private(page.gpa, page.data)

    def until(self, text: str, seconds: float = 30) -> str:
        """Run until the console has said ``text``; everything up to and with it."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            self.step()
            if self.stopped and text not in self.output:
                raise GuestTimeout(f"{self.stopped} before {text!r}; console: {self.output!r}")
            if time.monotonic() > deadline:
                raise GuestTimeout(f"no {text!r} in {seconds} s; console: {self.output!r}")
        said, _, self.output = self.output.partition(text)
        return said + text

    def command(self, line: str, seconds: float = 30) -> str:
        """Type a command at the prompt; its one line of answer."""
        self.machine.feed(line.encode() + b"\n")
        return self.until("\n> ", seconds).removesuffix("\n> ")

    def until_stopped(self, line: str, seconds: float = 10) -> Stop:
        """Type a command that ends the machine."""
        self.machine.feed(line.encode() + b"\n")
        deadline = time.monotonic() + seconds
        while self.stopped is None:
            self.step()
            if time.monotonic() > deadline:
                raise GuestTimeout(f"{line!r} did not end the machine in {seconds} s")
        return self.stopped

    def step(self) -> None:
        """One slice of every vCPU that is not halted."""
        for index, cpu in enumerate(self.cpus):
            if self.stopped:
                return
            if self.machine.is_halted(index):
                continue
            self._slice(index, cpu)

    def _slice(self, index: int, cpu: SvmCpu) -> None:
        self._current = cpu
        while self.stopped is None and not self.machine.is_halted(index):
            if self._must_flush[index]:
                self._must_flush[index] = False
                cpu.flush()
            exit = cpu.run()
            if isinstance(exit, api.Stage2Fault) and self._is_hole(exit):
                exit = cpu.run_mmio(exit.gpa)
            if isinstance(exit, api.KickExit):
                break
            told = self.emulate(index, exit)
            if told is None:
                continue
            action = self.machine.handle_exit(index, told)
            self.output += self.machine.take_output().decode("ascii")
            match action:
                case Resume(data):
                    self.answer(index, data)
                case Wait():
                    break
                case Stop():
                    self.stopped = action
        self._current = None

    def emulate(self, index: int, exit: api.CpuExit) -> exits.Exit | None:
        """What the VMM is told of an exit; None: it needs not know."""
        return self._translate(exit)

    def answer(self, index: int, data: bytes | int | None) -> None:
        """The VMM has answered the exit of a vCPU."""
        if data is not None:
            self.cpus[index].complete(data)

    def _is_hole(self, fault: api.Stage2Fault) -> bool:
        shared = self.is_shared_access(fault.gpa)
        return shared and not self._in_ram((fault.gpa & ~SHARED_BIT) // PAGE)

    def _translate(self, exit: api.CpuExit) -> exits.Exit:
        match exit:
            case api.IoExit(port, size, is_write, data):
                return exits.IoExit(port, size, is_write, data)
            case api.HypercallExit(nr, args, _):
                return exits.HypercallExit(nr, args)
            case api.HltExit():
                return exits.HltExit()
            case api.ShutdownExit():
                return exits.ShutdownExit()
            case api.MmioExit(gpa, size, is_write, data):
                return exits.MmioExit(gpa & ~SHARED_BIT, size, is_write, data)
            case api.Stage2Fault(gpa):
                page = gpa & ~SHARED_BIT & -PAGE
                private = not self.is_shared_access(gpa)
                return exits.MemoryFaultExit(page, PAGE, private, errno.EFAULT)
        raise AssertionError(f"the guest kernel does nothing that causes {exit}")

    def _tick(self) -> None:
        while not self._end.wait(SLICE_S):
            cpu = self._current
            if cpu is not None:
                cpu.kick()

    def close(self) -> None:
        """Free everything, engines first."""
        self._end.set()
        self._ticker.join()
        for cpu in self.cpus:
            cpu.close()
        self._arena.close()
        os.close(self._shared_fd)
        os.close(self._private_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def set_entry(cpu: SvmCpu, entry: EntryState) -> None:
    """Put a vCPU where the boot protocol says that it starts."""
    gdt = api.DescriptorTable(entry.gdt_base, entry.gdt_limit)
    cpu.set_sregs(api.Sregs.long_mode(entry.cr3, gdt=gdt))
    cpu.set_regs(
        api.Regs(rip=entry.rip, rsp=entry.rsp, rdi=entry.rdi, rsi=entry.rsi, rflags=entry.rflags)
    )


def small_config(vcpus: int = 2, mib: int = 16) -> MachineConfig:
    """RAM in two ranges, the second without a private side."""
    return MachineConfig(
        (RamRange(0, mib << 20), RamRange(mib << 20, 1 << 20, private=False)), vcpus=vcpus
    )


def values(answer: str) -> dict[str, str]:
    """The name=value fields of an `ok` answer."""
    assert answer.startswith("ok "), answer
    return dict(word.split("=", 1) for word in answer.split() if "=" in word)


def numbers(answer: str) -> dict[str, int]:
    """Those of them that are numbers."""
    return {k: int(v, 0) for k, v in values(answer).items() if v[0].isdigit()}
