# SPDX-License-Identifier: GPL-2.0-or-later
"""pKVM as its users meet it: entries, hypercalls, accesses, a life from filling to teardown."""

from __future__ import annotations

import errno

import pytest

from hwemu.pkvm.access import (
    HOST_ACCESS,
    HostOutcome,
    Mode,
    Outside,
    Reached,
    Stage2Abort,
    guest_access,
    host_access,
    host_reaches,
    owner,
)
from hwemu.pkvm.fillable import STEPS, FillableFile, Phase, Step
from hwemu.pkvm.hypercall import (
    CALLS,
    FEATURES,
    HYP_MEMINFO,
    MEM_RELINQUISH,
    MEM_SHARE,
    MEM_UNSHARE,
    HostTask,
    Returned,
    ToHost,
    hypercall,
)
from hwemu.pkvm.hypervisor import Hypervisor
from hwemu.pkvm.state import NO_ORDER, Component, PageState, PkvmError
from hwemu.pkvm.transition import TRANSITIONS, Deed

P = 4096
SIZE = 2048
BLOCK = 512


class Log:
    """Contents are one number a page; calls are kept in their order."""

    def __init__(self) -> None:
        self.contents = {pfn: 100 + pfn for pfn in range(SIZE)}
        self.calls: list[tuple[object, ...]] = []

    def zero(self, pfn: int, npages: int) -> None:
        self.calls.append(("zero", pfn, npages))
        self.contents.update(dict.fromkeys(range(pfn, pfn + npages), 0))

    def copy_pages(self, source: int, target: int, npages: int) -> None:
        self.calls.append(("copy_pages", source, target, npages))
        for n in range(npages):
            self.contents[target + n] = self.contents[source + n]

    def flush_host(self, pfn: int, npages: int) -> None:
        self.calls.append(("flush_host", pfn, npages))

    def flush_guest(self, handle: int, gfn: int, npages: int) -> None:
        self.calls.append(("flush_guest", handle, gfn, npages))


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def hyp(log: Log) -> Hypervisor:
    made = Hypervisor(log, [(0, 1000), (1024, SIZE)], hyp=[(0, 8)])
    log.calls.clear()
    return made


def refused(number: int, call: object, *arguments: object, **named: object) -> str:
    with pytest.raises(PkvmError) as caught:
        call(*arguments, **named)  # type: ignore[operator]
    assert caught.value.errno == number
    return str(caught.value)


def test_a_page_moves_with_its_contents_and_state(hyp: Hypervisor, log: Log) -> None:
    vm = hyp.create_vm(16)
    hyp.host_donate_guest(vm, 100, 4, 3)
    hyp.guest_share_host(vm, 5)
    log.calls.clear()
    hyp.host_move_guest(vm, 200, 4, 3)
    guest = hyp.vms.get("test", vm)
    assert guest.pfns(4, 3).tolist() == [200, 201, 202]
    assert guest.states(4, 3).tolist() == [0, 1, 0]
    assert host_reaches(hyp, 200, 3).tolist() == [False, True, False]
    assert host_reaches(hyp, 100, 3).all()
    assert (int(hyp.vmemmap.handle[202]), int(hyp.vmemmap.gfn[202])) == (vm, 6)
    assert [log.contents[pfn] for pfn in (100, 101, 102, 200, 201, 202)] == [0, 0, 0, 200, 201, 202]
    assert log.calls[:5] == [
        ("flush_guest", vm, 4, 1), ("flush_host", 100, 1), ("flush_host", 200, 1),
        ("copy_pages", 100, 200, 1), ("zero", 100, 1),
    ]  # fmt: skip
    hyp.vcpu_load(vm)
    hyp.host_move_guest(vm, 100, 6)
    assert hyp.guest_unshare_host(vm, 5) is None
    hyp.vcpu_put(vm)
    key = hyp.key()
    text = refused(errno.EPERM, hyp.host_move_guest, vm, 199, 4, 2)
    assert text.endswith("host's page 0xc8 is NOPAGE, not OWNED")
    assert "no leaf at page 0x7" in refused(errno.ENOENT, hyp.host_move_guest, vm, 300, 6, 2)
    hyp.start_teardown(vm)
    assert "it must be protected, alive" in refused(errno.EINVAL, hyp.host_move_guest, vm, 300, 4)
    hyp.vms.get("test", vm).dying = False
    assert hyp.key() == key
    assert hyp.teardown(vm) == 3


# --- what is written down -------------------------------------------------------------------------


def test_numbers_are_the_kernels() -> None:
    assert [state.value for state in PageState] == [0, 1, 2, 3]
    assert (HYP_MEMINFO, MEM_SHARE, MEM_UNSHARE) == (0xC6000002, 0xC6000003, 0xC6000004)


def test_the_hosts_entry_is_an_identity_map_or_names_the_owner(hyp: Hypervisor) -> None:
    columns = hyp.vmemmap
    vm = hyp.create_vm(16)
    assert columns.host_pte(9) == 9 << 12 | 0x4C3  # valid, page, S2AP read and write, AF
    assert columns.host_pte(0) == Component.HYP << 2
    hyp.host_donate_guest(vm, 9, 3)
    assert columns.host_pte(9) == Component.GUEST << 2
    assert (int(columns.handle[9]), int(columns.gfn[9])) == (vm, 3)
    hyp.guest_share_host(vm, 3)
    assert columns.host_pte(9) == 2 << 55 | 9 << 12 | 0x4C3
    pte = int(hyp.vms.get("test", vm).pte[3])
    assert pte == 1 << 55 | 9 << 12 | 0x4C3
    assert (columns.order[0], columns.order[9]) == (0, NO_ORDER)


def test_a_refusal_names_operation_object_range_and_state(hyp: Hypervisor) -> None:
    vm = hyp.create_vm(16)
    hyp.host_donate_guest(vm, 21, 0)
    key = hyp.key()
    text = refused(errno.EPERM, hyp.host_donate_guest, vm, 20, 4, 4)
    assert text == "EPERM: host donates to guest: host's page 0x15 is NOPAGE, not OWNED"
    assert hyp.key() == key
    assert "VM 0x1000: no leaf at page 0x1" in refused(errno.ENOENT, hyp.guest_share_host, vm, 1)
    assert "0x3e7+0x2" in refused(errno.EINVAL, hyp.host_share_hyp, 999, 2)


def test_every_row_moves_ownership_or_lends(hyp: Hypervisor) -> None:
    """After each row, at most one of both sides owns."""
    own = (PageState.OWNED, PageState.SHARED_OWNED)
    for deed, row in TRANSITIONS.items():
        assert sum(side.after in own for side in (row.initiator, row.completer)) == 1, deed
        assert row.initiator.who is not row.completer.who
    assert set(TRANSITIONS) == set(Deed)


# --- the order of safety --------------------------------------------------------------------------


def test_the_host_is_cut_off_before_the_guest_has_the_page(hyp: Hypervisor, log: Log) -> None:
    vm = hyp.create_vm(16)
    hyp.host_donate_guest(vm, 20, 4, 4)
    assert log.calls == [("flush_host", 20, 4)]


def test_a_page_is_out_of_reach_then_zero_then_the_hosts(hyp: Hypervisor, log: Log) -> None:
    vm = hyp.create_vm(16)
    hyp.host_donate_guest(vm, 20, 4)
    hyp.host_donate_guest(vm, 31, 5)
    hyp.host_donate_guest(vm, 30, 6)
    log.calls.clear()
    hyp.guest_relinquish(vm, 4, 3)
    assert log.calls == [
        ("flush_guest", vm, 4, 3), ("zero", 20, 1), ("zero", 31, 1), ("zero", 30, 1),
    ]  # fmt: skip
    assert host_reaches(hyp, 20, 1).all()


def test_conversion_in_place_keeps_contents(hyp: Hypervisor, log: Log) -> None:
    vm = hyp.create_vm(BLOCK)
    before = dict(log.contents)
    hyp.host_donate_guest(vm, 100, 0, 64)
    hyp.guest_share_host(vm, 0, 64)
    assert host_reaches(hyp, 100, 64).all()
    hyp.guest_unshare_host(vm, 0, 64)
    assert not host_reaches(hyp, 100, 64).any()
    assert log.contents == before
    assert ("zero", 100, 64) not in log.calls


def test_teardown_leaves_every_page_with_the_host(hyp: Hypervisor, log: Log) -> None:
    key = hyp.key()
    vm, plain = hyp.create_vm(2 * BLOCK), hyp.create_vm(2 * BLOCK, protected=False)
    hyp.host_donate_guest(vm, 1024, 0, BLOCK, block=True)
    hyp.host_donate_guest(vm, 100, BLOCK, 32)
    hyp.guest_share_host(vm, BLOCK + 8, 8)
    hyp.host_share_guest(plain, 1536, 0, BLOCK, block=True)
    assert hyp.teardown(vm) == BLOCK + 32
    assert hyp.teardown(plain) == BLOCK
    assert hyp.key() == key
    cleared = {pfn for pfn, content in log.contents.items() if content == 0}
    assert cleared == {*range(8), *range(1024, 1536), *range(100, 108), *range(116, 132)} - {
        *range(8)
    }
    assert hyp.create_vm(1) == vm, "a handle is free again"


def test_blocks_are_split_by_the_host_on_demand(hyp: Hypervisor) -> None:
    vm = hyp.create_vm(2 * BLOCK)
    refused(errno.EINVAL, hyp.host_donate_guest, vm, 1025, 0, BLOCK, block=True)
    hyp.host_donate_guest(vm, 1024, BLOCK, BLOCK, block=True)
    ipa = (BLOCK + 7) * P
    assert hypercall(hyp, vm, MEM_SHARE, ipa) == ToHost(HostTask.SPLIT, ipa)
    hyp.host_split_guest(vm, BLOCK + 7)
    assert hypercall(hyp, vm, MEM_SHARE, ipa) == Returned(0)
    assert host_reaches(hyp, 1024, BLOCK).nonzero()[0].tolist() == [7]


# --- hypercalls -----------------------------------------------------------------------------------


def test_a_guest_shares_what_the_host_maps_on_demand(hyp: Hypervisor) -> None:
    vm = hyp.create_vm(16)
    assert hypercall(hyp, vm, MEM_SHARE, 3 * P) == ToHost(HostTask.MAP, 3 * P)
    hyp.host_donate_guest(vm, 50, 3)
    assert hypercall(hyp, vm, MEM_SHARE, 3 * P) == Returned(0)
    assert hypercall(hyp, vm, MEM_SHARE, 3 * P) == Returned(-3), "redundant: refused"
    assert hypercall(hyp, vm, MEM_UNSHARE, 3 * P) == Returned(0)
    assert hypercall(hyp, vm, MEM_UNSHARE, 3 * P) == Returned(-3)
    assert hypercall(hyp, vm, MEM_UNSHARE, 4 * P) == Returned(-3)
    assert hypercall(hyp, vm, MEM_RELINQUISH, 3 * P) == Returned(0)
    assert hypercall(hyp, vm, MEM_RELINQUISH, 3 * P) == Returned(0), "it is gone already"


@pytest.mark.parametrize("call", [MEM_SHARE, MEM_UNSHARE, MEM_RELINQUISH])
@pytest.mark.parametrize(
    "arguments", [(P, 1, 0), (P, 0, 1), (P + 1, 0, 0), (16 * P, 0, 0), (1 << 63, 0, 0)]
)
def test_bad_arguments(hyp: Hypervisor, call: int, arguments: tuple[int, int, int]) -> None:
    vm = hyp.create_vm(16)
    hyp.host_donate_guest(vm, 50, 1)
    key = hyp.key()
    assert hypercall(hyp, vm, call, *arguments) == Returned(-3)
    assert hyp.key() == key


def test_what_a_guest_may_ask(hyp: Hypervisor) -> None:
    vm, plain = hyp.create_vm(16), hyp.create_vm(16, protected=False)
    assert hypercall(hyp, vm, HYP_MEMINFO) == Returned(P)
    assert hypercall(hyp, vm, HYP_MEMINFO, 0, 0, 1) == Returned(-3)
    assert hypercall(hyp, vm, FEATURES) == Returned(1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 9)
    assert hypercall(hyp, vm, 0x84000000) == ToHost(HostTask.HANDLE)
    for call in CALLS:
        assert hypercall(hyp, plain, call) == ToHost(HostTask.HANDLE)
    refused(errno.ENOENT, hypercall, hyp, 0x1009, HYP_MEMINFO)
    hyp.start_teardown(vm)
    refused(errno.EINVAL, hypercall, hyp, vm, HYP_MEMINFO)


# --- accesses -------------------------------------------------------------------------------------


def test_every_state_and_mode_has_an_outcome() -> None:
    assert set(HOST_ACCESS) == {(state, mode) for state in PageState for mode in Mode}


def test_the_host_faults_at_a_protected_page(hyp: Hypervisor) -> None:
    vm = hyp.create_vm(16)
    hyp.host_donate_guest(vm, 50, 3)
    assert host_access(hyp, 50, Mode.USER) is HostOutcome.SIGSEGV
    assert host_access(hyp, 50, Mode.UACCESS) is HostOutcome.EFAULT
    assert host_access(hyp, 50, Mode.KERNEL) is HostOutcome.OOPS
    assert host_access(hyp, 0, Mode.USER) is HostOutcome.SIGSEGV, "EL2's"
    assert host_access(hyp, 51, Mode.USER) is HostOutcome.DONE
    hyp.guest_share_host(vm, 3)
    assert host_access(hyp, 50, Mode.USER) is HostOutcome.DONE
    refused(errno.EINVAL, host_access, hyp, 1000, Mode.USER)


def test_a_guest_reaches_what_is_mapped(hyp: Hypervisor) -> None:
    vm, plain = hyp.create_vm(16), hyp.create_vm(16, protected=False)
    hyp.host_donate_guest(vm, 50, 3)
    assert guest_access(hyp, vm, 3 * P + 5) == Reached(50 * P + 5)
    assert guest_access(hyp, vm, 4 * P) == Stage2Abort(4 * P, True)
    assert guest_access(hyp, plain, 4 * P) == Stage2Abort(4 * P, False)
    assert guest_access(hyp, vm, 16 * P) == Outside(16 * P)


def test_owners_are_told(hyp: Hypervisor) -> None:
    vm, plain = hyp.create_vm(16), hyp.create_vm(16, protected=False)
    hyp.host_donate_guest(vm, 50, 3, 2)
    hyp.guest_share_host(vm, 3)
    hyp.host_share_guest(plain, 60, 0)
    found = [owner(hyp, pfn) for pfn in (0, 50, 51, 60, 61)]
    guest, host = (Component.GUEST, vm), (Component.HOST, 0)
    assert found == [(Component.HYP, 0), guest, guest, host, host]


# --- a file that is filled and then closed --------------------------------------------------------


def test_filled_closed_and_donated_in_place(hyp: Hypervisor, log: Log) -> None:
    vm = hyp.create_vm(16)
    file = FillableFile(hyp, 200, 8)
    mapping = file.open(0, 8)
    other = file.open(2, 3)
    refused(errno.EPERM, file.donate, vm, 0, 0, 8)
    assert "2 accesses open, the first at page 0x0" in refused(errno.EBUSY, file.make_inaccessible)
    file.close(mapping)
    assert "the first at page 0x2" in refused(errno.EBUSY, file.make_inaccessible)
    assert file.phase is Phase.FILLING
    file.close(other)
    file.make_inaccessible()
    refused(errno.EPERM, file.make_inaccessible)
    refused(errno.EPERM, file.open, 0, 1)
    file.donate(vm, 0, 4, 8)
    assert guest_access(hyp, vm, 4 * P) == Reached(200 * P)
    assert [log.contents[pfn] for pfn in range(200, 208)] == list(range(300, 308))
    refused(errno.EINVAL, file.donate, vm, 7, 0, 2)


def test_a_pinned_page_is_not_donated_past_the_file(hyp: Hypervisor) -> None:
    vm = hyp.create_vm(16)
    FillableFile(hyp, 200, 8).open(0, 1)
    refused(errno.EBUSY, hyp.host_donate_guest, vm, 200, 0)
    refused(errno.EBUSY, hyp.host_donate_hyp, 200)


def test_every_phase_answers_every_step() -> None:
    assert set(STEPS) == {(phase, step) for phase in Phase for step in Step}


def test_a_copied_file_goes_its_own_way(hyp: Hypervisor) -> None:
    file = FillableFile(hyp, 200, 8)
    access = file.open(1, 2)
    twin_hyp = hyp.copy(Log())
    twin = file.copy(twin_hyp)
    assert twin.key() == file.key()
    twin.close(access)
    twin.make_inaccessible()
    assert file.phase is Phase.FILLING
    refused(errno.EBUSY, file.make_inaccessible)


# --- VMs ------------------------------------------------------------------------------------------


def test_vms(log: Log) -> None:
    hyp = Hypervisor(log, [(0, 8)], max_vms=2)
    first = hyp.create_vm(4)
    assert hyp.create_vm(4) == first + 1 == 0x1001
    refused(errno.ENOMEM, hyp.create_vm, 4)
    hyp.vcpu_load(first)
    refused(errno.EBUSY, hyp.teardown, first)
    refused(errno.EBUSY, hyp.finalize_teardown, first)
    hyp.vcpu_put(first)
    hyp.host_donate_guest(first, 0, 0, 2)
    hyp.start_teardown(first)
    refused(errno.EINVAL, hyp.vcpu_load, first)
    assert "2 pages are not reclaimed" in refused(errno.EBUSY, hyp.finalize_teardown, first)
    hyp.host_reclaim_guest(first, 0, 2)
    hyp.finalize_teardown(first)
    refused(errno.ENOENT, hyp.start_teardown, first)


def test_references_end(log: Log) -> None:
    hyp = Hypervisor(log, [(0, 8)])
    hyp.vmemmap.refcount[3] = 0xFFFF
    key = hyp.key()
    refused(errno.EBUSY, hyp.pin, Component.HOST, 2, 2)
    assert hyp.key() == key
    refused(errno.EINVAL, hyp.pin, Component.GUEST, 2)


def test_memory_is_given_in_ranges(log: Log) -> None:
    for bad in ([], [(2, 2)], [(-1, 3)]):
        with pytest.raises(ValueError, match="ranges of pfns"):
            Hypervisor(log, bad)
