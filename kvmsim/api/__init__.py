# SPDX-License-Identifier: GPL-2.0-or-later
"""A VMM's view of KVM in Python: the same calls reach /dev/kvm and the simulator.

::

    with Kvm("/dev/kvm") as kvm, kvm.create_vm() as vm:
        vm.add_slot(0, kvm.allocate(1 << 20))
        vcpu = vm.create_vcpu()
        match vcpu.run():
            case exits.IoExit(port, size, write=True, data=data): ...

What a kernel lacks it says by :meth:`Kvm.check_extension`; what it refuses comes as
:class:`IoctlError` with the name of the ioctl.
"""

from __future__ import annotations

from kvmsim.api.kvm import Kvm
from kvmsim.api.memory import ConversionError, GuestMemfd, Memslot
from kvmsim.api.registers import Dtable, Regs, Segment, Sregs
from kvmsim.api.simulated import Simulation
from kvmsim.api.transport import IoctlError, Memory, Pin, Transport
from kvmsim.api.vcpu import Vcpu
from kvmsim.api.vm import Vm

__all__ = [
    "ConversionError",
    "Dtable",
    "GuestMemfd",
    "IoctlError",
    "Kvm",
    "Memory",
    "Memslot",
    "Pin",
    "Regs",
    "Segment",
    "Simulation",
    "Sregs",
    "Transport",
    "Vcpu",
    "Vm",
]
