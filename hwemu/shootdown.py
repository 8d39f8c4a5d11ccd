# SPDX-License-Identifier: GPL-2.0-or-later
"""Who must flush before running again: flush epochs of the vCPUs of one VM.

KVM's vcpu->requests with IN_GUEST_MODE / OUTSIDE_GUEST_MODE (kvm_make_all_cpus_request,
vcpu_enter_guest), as one counter: whoever has zapped the second-stage table takes a new epoch;
a vCPU consumes the newest epoch when it enters guest code, and one that was in guest code before
must be kicked out. A zap is proven once its epoch is drained.

One requester at a time; `enter` and `leave` belong to the vCPU's own thread. The order inside
`enter` (first in guest, then read the epoch) makes the two safe against each other without a
lock, as KVM's barrier between vcpu->mode and vcpu->requests does.
"""

from __future__ import annotations


class Shootdown:
    """Flush epochs for vCPUs numbered from 0: ``nvcpus`` at first, more by :meth:`add`."""

    __slots__ = ("_consumed", "_epoch", "_in_guest")

    def __init__(self, nvcpus: int = 0) -> None:
        if nvcpus < 0:
            raise ValueError(f"shootdown for {nvcpus} vCPUs: none is the least")
        self._epoch = 0
        self._consumed = [0] * nvcpus
        self._in_guest = [False] * nvcpus

    def add(self) -> int:
        """One more vCPU, outside guest code and with nothing to forget; its number."""
        self._consumed.append(self._epoch)
        self._in_guest.append(False)
        return len(self._consumed) - 1

    @property
    def epoch(self) -> int:
        """The newest epoch requested."""
        return self._epoch

    def request(self) -> int:
        """Every vCPU must flush before its next guest instruction; call after the zap."""
        self._epoch += 1
        return self._epoch

    def enter(self, vcpu: int) -> bool:
        """The vCPU is about to run guest code; True: flush TLB and translation blocks first."""
        if self._in_guest[vcpu]:
            raise RuntimeError(f"vCPU {vcpu} enters guest code twice: leave() is missing")
        self._in_guest[vcpu] = True
        epoch = self._epoch
        must_flush = self._consumed[vcpu] < epoch
        self._consumed[vcpu] = epoch
        return must_flush

    def leave(self, vcpu: int) -> None:
        """The vCPU has left guest code and holds no translation outside its TLB."""
        self._in_guest[vcpu] = False

    def pending(self, vcpu: int) -> bool:
        """True while an epoch waits for this vCPU's next entry."""
        return self._consumed[vcpu] < self._epoch

    def drained(self, epoch: int) -> bool:
        """True when no vCPU is in guest code that it entered before ``epoch`` was requested."""
        return all(
            not inside or consumed >= epoch
            for inside, consumed in zip(self._in_guest, self._consumed, strict=True)
        )

    def stragglers(self, epoch: int) -> tuple[int, ...]:
        """The vCPUs that keep ``epoch`` from being drained: the ones to kick."""
        return tuple(
            vcpu
            for vcpu, inside in enumerate(self._in_guest)
            if inside and self._consumed[vcpu] < epoch
        )

    def in_guest(self) -> tuple[int, ...]:
        """The vCPUs in guest code now."""
        return tuple(vcpu for vcpu, inside in enumerate(self._in_guest) if inside)

    def key(self) -> tuple[object, ...]:
        """A hashable value equal for states that behave alike (epochs are relative)."""
        return (
            tuple(self._epoch - consumed for consumed in self._consumed),
            tuple(self._in_guest),
        )

    def copy(self) -> Shootdown:
        """An independent copy."""
        other = Shootdown.__new__(Shootdown)
        other._epoch = self._epoch
        other._consumed = self._consumed.copy()
        other._in_guest = self._in_guest.copy()
        return other
