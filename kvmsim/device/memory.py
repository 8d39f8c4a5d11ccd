# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's memory as its ioctls change it: slots, attributes, private files, faults beforehand.

The rules are those of :mod:`kvmsim.vm`; here is what they need of the world (what a descriptor
is, what lies behind an address) and what has to follow a change: the flush that proves it, and
only then the unmapping.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from hwemu.arena import ArenaError
from kvmsim.device.caller import Caller, Efault, NotOurs, PrivateFd
from kvmsim.device.capabilities import gmem_flags
from kvmsim.device.dirtylog import DirtyLog, LoggingStage2
from kvmsim.device.gmemfile import GmemFiles
from kvmsim.device.hostside import Dropped, HostSide
from kvmsim.device.prefaulting import PreFaulting
from kvmsim.device.results import Begun, FdKind, NewFd
from kvmsim.device.table import Call
from kvmsim.memslot import SlotChange
from kvmsim.mmu import Zapped
from kvmsim.prefault import PreFault
from kvmsim.region import BadFd, PrivateFile, Region
from kvmsim.uapi import (
    ABIS,
    CREATE_GUEST_MEMFD,
    ENC_REGION,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_READONLY,
    KVM_MEMORY_ENCRYPT_REG_REGION,
    KVM_SET_USER_MEMORY_REGION,
    KVM_USER_MEM_SLOTS,
    MEMORY_ATTRIBUTES,
    PAGE_SHIFT,
    PAGE_SIZE,
    PRE_FAULT_MEMORY,
    U64,
    USERSPACE_MEMORY_REGION,
    USERSPACE_MEMORY_REGION2,
    KvmError,
    structs,
)
from kvmsim.whichfile import which_file
from privfs.notifier.lane import LinkError

if TYPE_CHECKING:
    from kvmsim.device.vcpu import VcpuDevice
    from kvmsim.device.vm import VmDevice

log = logging.getLogger(__name__)

# Stands for any private file while everything else of a region is looked at.
_Plan = tuple[SlotChange, int]  # and the generation of the slots that it was made for
_ANY_FILE: Final = PrivateFile(-1, U64)


class VmMemory:
    """The memory of ``vm``.

    ``owners`` says which VM made a private file, by (st_dev, st_ino); None: one that is gone.
    """

    def __init__(self, vm: VmDevice, owners: dict[tuple[int, int], object]) -> None:
        self._vm = vm
        self._running = vm.running
        self._owners = owners
        self._made: list[tuple[int, int]] = []
        self._slots_lock = threading.Lock()  # KVM's slots_lock: one change at a time
        self.side = HostSide(vm.host)
        self.files = GmemFiles(self, vm, self._slots_lock) if vm.system.in_place else None
        self._log = DirtyLog()
        mmu = self._running.vm.mmu
        mmu.stage2 = LoggingStage2(
            mmu.stage2, self._log, vm.kind.side_bit, lambda: self._running.storing
        )

    # --- slots --------------------------------------------------------------------------------

    def set_region(self, call: Call) -> None:
        """KVM_SET_USER_MEMORY_REGION: 32 bytes, in v7 160 if the private flag is set."""
        data = call.fetch(USERSPACE_MEMORY_REGION.size)
        extended = ABIS[self._vm.abi].region_ioctl == KVM_SET_USER_MEMORY_REGION
        if extended and Region.from_bytes(data).flags & KVM_MEM_GUEST_MEMFD:
            data = call.fetch(USERSPACE_MEMORY_REGION2.size)
        self._set(call, Region.from_bytes(data), v1=True)

    def set_region2(self, call: Call) -> None:
        """KVM_SET_USER_MEMORY_REGION2; v7 has no such request."""
        if self._vm.abi == "v7":
            raise call.refused(errno.ENOTTY, "v7 has KVM_SET_USER_MEMORY_REGION alone")
        data = call.fetch(USERSPACE_MEMORY_REGION2.size)
        self._set(call, Region.from_bytes(data), v1=False)

    def _set(self, call: Call, region: Region, *, v1: bool) -> None:
        with self._slots_lock:
            slots = self._running.vm.mmu.slots
            private = bool(region.flags & KVM_MEM_GUEST_MEMFD and region.memory_size)
            # Everything but the descriptor first: nothing is opened for what is refused anyway.
            with self._running.lock:
                expected = slots.plan(
                    region, shared=self.side, file=_ANY_FILE if private else BadFd.CLOSED, v1=v1
                )
                generation = slots.generation
            file: PrivateFile | BadFd = BadFd.CLOSED
            if private:
                file = self._resolve(call.caller, region.guest_memfd)
            if expected.old is None:
                plan = None if private else (expected, generation)
                self._create(call, region, file, v1=v1, plan=plan)
            else:
                self._change(region, v1=v1, plan=(expected, generation))

    def _still(self, plan: _Plan | None) -> SlotChange | None:
        """What was planned, if no slot has changed since: one loses its file at any time."""
        if plan is None or plan[1] != self._running.vm.mmu.slots.generation:
            return None
        return plan[0]

    def _create(
        self,
        call: Call,
        region: Region,
        file: PrivateFile | BadFd,
        *,
        v1: bool,
        plan: _Plan | None,
    ) -> None:
        vm = self._running.vm
        first = region.userspace_addr >> PAGE_SHIFT
        last = first + (region.memory_size >> PAGE_SHIFT)
        writable = not region.flags & KVM_MEM_READONLY
        if isinstance(file, PrivateFile) and file.whole:
            last = first  # no access of the guest goes there
        try:
            made, missing = self.side.place(call.caller, first, last, writable=writable)
        except ArenaError as error:
            self.forget_unused(file)
            raise MemoryError(str(error)) from error
        try:
            with self._running.lock:
                self.side.check(call.name, first, last, writable=writable)
                vm.set_user_memory_region2(
                    region, shared=self.side, file=file, v1=v1, planned=self._still(plan)
                )
                self.side.add(region.slot, first, last, made)
                made = []
                self._log.follow(region.slot, vm.mmu.slots.get(region.slot))
        except KvmError:
            self.forget_unused(file)
            raise
        finally:
            self.side.discard(made)
        if missing:
            log.info("%s slot %d: %s", call.name, region.slot, missing)
        if isinstance(file, PrivateFile):
            try:
                with self._running.lock:
                    self._running.private.placed(file.id)
            except ArenaError as error:
                self._change(Region(region.slot, 0, 0, 0), v1=True)
                raise MemoryError(str(error)) from error

    def _change(self, region: Region, *, v1: bool, plan: _Plan | None = None) -> None:
        """Delete, move or re-flag a slot that is there."""
        dropped = Dropped()
        with self._running.lock:
            old = self._running.vm.mmu.slots.get(region.slot)
            assert old is not None
            zapped = self._running.vm.set_user_memory_region2(
                region, shared=self.side, v1=v1, planned=self._still(plan)
            )
            slots = self._running.vm.mmu.slots
            new = slots.get(region.slot)
            if self._log.follow(region.slot, new) and new is not None:
                # what is mapped may be written without a fault
                ranges = (*zapped.ranges, *self._zap([(new.base_gfn, new.end_gfn)]).ranges)
                zapped = Zapped(ranges)
            if not region.memory_size:
                first = old.userspace_addr >> PAGE_SHIFT
                dropped = self.side.remove(old.id, first, first + old.npages)
        if zapped.ranges:
            self._running.flush_zapped(zapped)
        self.side.retire(dropped)
        if not region.memory_size and old.file is not None:
            self.forget_unused(PrivateFile(old.file, 0))

    def forget_unused(self, file: PrivateFile | BadFd) -> None:
        """A file that no slot is bound to is not used any more (slots_lock held)."""
        if not isinstance(file, PrivateFile):
            return
        with self._running.lock:
            slots = self._running.vm.mmu.slots
            used = next(slots.find_file(file.id, 0, U64), None) is not None
        used = used or (self.files is not None and self.files.uses(file.id))
        if not used:
            try:
                self._running.private.forget(file.id)
            except LinkError as error:  # the owner is gone, and with it the file
                log.info("file %#x: %s", file.id, error)

    def _resolve(self, caller: Caller, number: int) -> PrivateFile | BadFd:
        """What a slot can be bound to."""
        found = caller.fd(number)
        if found is NotOurs.CLOSED:
            return BadFd.CLOSED
        if not isinstance(found, PrivateFd):
            return BadFd.NOT_PRIVATE
        try:
            status = which_file(found.fd)
            if self._owners.get((status.st_dev, status.st_ino), self._vm) is not self._vm:
                return BadFd.OTHER_VM
            file = self._running.private.open_fd(found.fd, status)
            gmem = self._vm.system.gmem
            if gmem is not None:
                file = replace(file, flags=gmem.made.get((status.st_dev, status.st_ino), 0))
            if self.files is not None:
                file = self.files.describe(file, (status.st_dev, status.st_ino))
            return file
        except OSError as error:  # LinkError too
            log.info("descriptor %d: %s", number, error)
            return BadFd.NOT_PRIVATE

    # --- the caller's memory ------------------------------------------------------------------

    def resolve(self, gpa: int, caller: Caller) -> bool:
        """A guest met a gap in the userspace side: True if there is memory now.

        Runner thread: the caller may have mapped something there since the slot was made. No
        guest runs meanwhile, so whoever has the slots_lock does not wait for this thread.
        """
        gfn = gpa >> PAGE_SHIFT
        with self._slots_lock:
            with self._running.lock:
                slot = self._running.vm.mmu.slots.find(gfn)
                page = -1 if slot is None else slot.shared_page(gfn)
                there = slot is None or self.side.hpa(page) is not None
            if slot is None or there:
                return True  # it is another fault by now
            try:
                made, _ = self.side.place(caller, page, page + 1, writable=not slot.readonly)
            except (ArenaError, Efault) as error:
                log.warning("memory behind gpa %#x cannot be mapped: %s", gpa, error)
                return False
            with self._running.lock:
                self.side.add(slot.id, page, page + 1, made)
            return bool(made)

    def host_range_changed(self, start: int, size: int) -> None:
        """The caller unmapped or mapped anew bytes [start, start + size): KVM's mmu_notifier.

        When this returns no guest reaches what was there; what is there now is found at the next
        touch.
        """
        with self._slots_lock:
            with self._running.lock:
                first, last = start >> PAGE_SHIFT, -(-(start + size) >> PAGE_SHIFT)
                first, last = self.side.covered(first, last)
                zapped = self._running.vm.invalidate_shared(self.side, first, last)
                dropped = self.side.forget(first, last)
            self._running.flush_zapped(zapped)
            self.side.retire(dropped)

    def host_ranges(self) -> list[tuple[int, int]]:
        """Bytes [start, end) of the caller that are under slots."""
        with self._running.lock:
            slots = [slot for slot in self._running.vm.mmu.slots if not slot.whole]
        return [
            (one.userspace_addr, one.userspace_addr + (one.npages << PAGE_SHIFT)) for one in slots
        ]

    def read_word(self, gpa: int, *, caller: Caller) -> int | None:
        """The 64-bit word at a guest-physical address, through the userspace side."""
        with self._running.lock:
            slot = self._running.vm.mmu.slots.find(gpa >> PAGE_SHIFT)
            hpa = None if slot is None else self.side.hpa(slot.shared_page(gpa >> PAGE_SHIFT))
        try:
            if slot is not None and slot.file is not None and self.files is not None:
                page = slot.private_page(gpa >> PAGE_SHIFT)
                data = self.files.read_slot(slot.file, page, gpa % PAGE_SIZE, 8)
            elif slot is not None and slot.whole:  # its memory is nowhere here
                at = slot.userspace_addr + gpa - (slot.base_gfn << PAGE_SHIFT)
                data = caller.read(at, 8)
            elif hpa is None:
                return None
            else:
                data = self._vm.host.read(hpa + gpa % PAGE_SIZE, 8)
        except (ArenaError, Efault, KvmError) as error:
            log.info("word at gpa %#x: %s", gpa, error)
            return None
        return int.from_bytes(data, "little")

    # --- attributes ---------------------------------------------------------------------------

    def set_attributes(self, call: Call) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        address, size, attributes, flags = call.read(MEMORY_ATTRIBUTES)
        with self._slots_lock:
            with self._running.lock:
                zapped = self._running.vm.set_memory_attributes(address, size, attributes, flags)
            if zapped.ranges:
                self._running.flush_zapped(zapped)

    def encrypt_region(self, call: Call) -> None:
        """KVM_MEMORY_ENCRYPT_(UN)REG_REGION: v7's conversion; upstream it is SEV's."""
        address, size = call.read(ENC_REGION)
        private = call.request == KVM_MEMORY_ENCRYPT_REG_REGION
        with self._slots_lock:
            with self._running.lock:
                zapped = self._running.vm.encrypt_region(address, size, private=private)
            if zapped.ranges:
                self._running.flush_zapped(zapped)

    # --- private files ------------------------------------------------------------------------

    def create_guest_memfd(self, call: Call) -> NewFd:
        """KVM_CREATE_GUEST_MEMFD (kvm_gmem_create()); the reserved words are not looked at."""
        gmem = self._vm.system.gmem
        if gmem is None or self._vm.abi == "v7":
            raise call.refused(errno.ENOTTY, "no private files: no mount was given, or v7")
        if gmem.missing:
            raise call.refused(errno.ENOTTY, gmem.missing)
        size, flags = call.read(CREATE_GUEST_MEMFD)
        known = gmem_flags(self._vm.system.asked(self._vm.kind))
        if flags & ~known:
            raise call.refused(errno.EINVAL, f"flags {flags:#x}: the mount has {known:#x}")
        if not 0 < size < 1 << 63 or size % PAGE_SIZE:
            raise call.refused(errno.EINVAL, f"size {size:#x}: not a positive number of pages")
        try:
            fd = gmem.create(size, flags if self.files is None else 0)
        except OSError as error:
            raise call.refused(error.errno or errno.EIO, f"{gmem.folder}: {error}") from error
        status = os.fstat(fd)
        key = status.st_dev, status.st_ino
        self._owners[key] = self._vm
        self._made.append(key)
        if self.files is not None:
            self.files.add(key, flags)
        return NewFd(FdKind.PRIVATE_FILE, "anon_inode:[kvm-gmem]", fd=fd, cloexec=False)

    # --- the rest -----------------------------------------------------------------------------

    def get_dirty_log(self, call: Call) -> None:
        """KVM_GET_DIRTY_LOG."""
        slot_id, address = call.read(structs.DIRTY_LOG)
        if slot_id & 0xFFFF >= KVM_USER_MEM_SLOTS or slot_id >> 16:
            raise call.refused(errno.EINVAL, f"slot {slot_id:#x}")
        with self._slots_lock:
            with self._running.lock:
                taken = self._log.take(slot_id)
                if taken is None:
                    raise call.refused(errno.ENOENT, f"slot {slot_id} does not log writes")
                bitmap, gfns = taken
                zapped = self._zap(gfns)
            if gfns:
                self._running.flush_zapped(zapped)
        call.caller.write(address, bitmap)

    def _zap(self, gfns: list[tuple[int, int]]) -> Zapped:
        """Have every access to these gfns fault again (lock held)."""
        mmu = self._running.vm.mmu
        zapped = mmu.begin_zap(gfns, self._vm.kind.halves)
        if gfns:
            mmu.invalidate.end()
        return zapped

    def pre_fault(self, vcpu: VcpuDevice, call: Call) -> Begun:
        """KVM_PRE_FAULT_MEMORY: refused at once, or answered when the owner has answered."""
        gpa, size, flags = call.read(PRE_FAULT_MEMORY)
        work = PreFault(vcpu.engine.index, gpa, size, flags)
        with self._running.lock:
            work.check(self._running.vm)
        self._vm.start()  # whose end ends this
        return vcpu.wait_for(PreFaulting(self._running, work, call).begin())

    def close(self) -> None:
        """Unmap the caller's memory; the engines are closed."""
        for key in self._made:  # what lives on is no other VM's (kvm_gmem_bind())
            self._owners[key] = None
        self.side.close()
