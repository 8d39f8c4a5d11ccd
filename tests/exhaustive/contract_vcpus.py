# SPDX-License-Identifier: GPL-2.0-or-later
"""The vCPUs of a user: what guest code and the runner do, with kvmsim's fault path as it ships.

A vCPU enters guest code and flushes if it must, touches a page through its TLB or the table, leaves
with a fault, asks, waits; what comes back is checked and stored in one section under the lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from contract_process import Process, Vcpu
from contract_stage2 import SHARED, Leaf, extent_id
from contract_values import SEEN

from kvmsim.exits import MmioExit
from kvmsim.fault import (
    Access,
    Effect,
    Fault,
    Installed,
    LeaveGuest,
    NeedPage,
    PageGrant,
    Retry,
    RetryReason,
)
from kvmsim.uapi import PAGE_SIZE

_STORE = Access(write=True)


class Vcpus(Process):
    """A process whose guest code runs."""

    def _vcpu_events(self, v: int, vcpu: Vcpu) -> Iterator[tuple[Any, ...]]:
        match vcpu.state:
            case "inside":
                yield "leave", v
            case "granted":
                yield "install", v
            case "asks":
                if self.can_send():
                    yield "get", v
                elif "closed" in self.flags:
                    yield "stall", v
            case "idle" | "retries":
                for at in self._touched() if vcpu.state == "idle" else (vcpu.at,):
                    yield ("access" if self._translated(v, at) else "fault"), v, at

    def _touched(self) -> Iterator[int]:
        for gfn, pages, _, _ in self.setup.bound:
            for at in range(gfn, gfn + pages):
                yield at
                if self.setup.shared:
                    yield at + SHARED

    def _translated(self, v: int, at: int) -> Leaf | None:
        """Look into the TLB, unless it is flushed at entry, then into the table."""
        tlb = self.vcpus[v].tlb if not self.shootdown.pending(v) else frozenset()
        for where in (tlb, self.leaves):
            found = [leaf for leaf in where if leaf.at == at]
            if found:
                return min(found)
        return None

    # --- vCPUs --------------------------------------------------------------------------------

    def _on_access(self, v: int, at: int) -> None:
        vcpu = self.vcpus[v]
        tlb = frozenset() if self._shootdown().enter(v) else vcpu.tlb
        self._vcpu(v, tlb=tlb)
        leaf = self._translated(v, at)
        assert leaf is not None
        self._vcpu(v, state="inside", at=-1, tlb=tlb | {leaf})

    def _on_leave(self, v: int) -> None:
        self._shootdown().leave(v)
        self._vcpu(v, state="idle")
        if self.shootdown.pending(v):
            self._forget(v)

    def _on_fault(self, v: int, at: int) -> None:
        """Snapshot and look up, in one section under the lock."""
        if self._shootdown().enter(v):
            self._vcpu(v, tlb=frozenset())
        fault = self.cores.fault(0 if self.setup.alike else v, at * PAGE_SIZE, _STORE)
        effect = self._vm().begin_fault(fault)
        SEEN.add(type(effect))
        if isinstance(effect, Installed):  # the engine's hook says so, and guest code goes on
            leaf = self._translated(v, at)
            assert leaf is not None
            self._vcpu(v, state="inside", at=-1, tlb=self.vcpus[v].tlb | {leaf})
            return
        self.shootdown.leave(v)
        if isinstance(effect, NeedPage):
            self._vcpu(v, state="asks", at=at, fault=fault, need=effect)
            if self.setup.prompt and self.can_send():
                self._on_get(v)
        else:
            self._leaves(v, at, effect)

    def _on_get(self, v: int) -> None:
        vcpu = self.vcpus[v]
        need = vcpu.need
        assert need is not None
        get = self._user().get(
            need.file, need.page, need.start, need.end, write=need.write, again=vcpu.again
        )
        self._vcpu(v, state="waits", need=None, req=get.req, again=False)
        self._post(get)

    def _on_stall(self, v: int) -> None:
        """The socket is closed: the fault finds no owner."""
        self._vcpu(v, state="idle", at=-1, fault=None, need=None)

    def _on_install(self, v: int) -> None:
        """Check and store, in one section under the lock."""
        vcpu = self.vcpus[v]
        grant, fault = vcpu.grant, vcpu.fault
        assert grant is not None
        assert fault is not None
        self.granting = grant.start, vcpu.made_for
        instance = extent_id(grant.ino, grant.instance)
        writable = grant.ino in self.stores
        arrived = PageGrant(grant.ino, grant.start, grant.end, grant.seq, instance, writable)
        self._arrived(v, fault, arrived)

    def _arrived(self, v: int, fault: Fault, grant: PageGrant) -> None:
        fault = fault.copy()
        effect = self._vm().page_arrived(fault, grant)
        again = effect == Retry(RetryReason.INSTANCE)
        self._vcpu(v, fault=None, req=0, grant=None, made_for=(), again=again)
        self._leaves(v, self.vcpus[v].at, effect)

    def _leaves(self, v: int, at: int, effect: Effect) -> None:
        """Go on, or to the VMM: as long as a slot has the gfn, not with a device's exit."""
        SEEN.add(effect.reason if isinstance(effect, Retry) else type(effect))
        if isinstance(effect, Retry | NeedPage):
            self._vcpu(v, state="retries", at=at)
            return
        self._vcpu(v, state="idle", at=-1)
        mmio = isinstance(effect, LeaveGuest) and isinstance(effect.exit, MmioExit)
        if mmio and self.vm.mmu.slots.find(effect.exit.gpa // PAGE_SIZE) is not None:
            self.wrong("an access to memory leaves as one to a device")
