# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from hwemu.snp.access import Granted, GuestAccess, HostAccess, Kind, guest_access, host_access
from hwemu.snp.guestops import (
    Leaf,
    PvalidateRegisters,
    Query,
    RmpadjustRegisters,
    Vcpu,
    pvalidate,
    rmpadjust,
    rmpquery,
)
from hwemu.snp.hostops import (
    HYPERVISOR,
    NewState,
    Read,
    psmash,
    rmpread,
    rmpupdate,
    rmpupdate_range,
)
from hwemu.snp.outcome import (
    GeneralProtection,
    GuestStatus,
    HostPageFault,
    NestedPageFault,
    NpfError,
    PfError,
    PsmashStatus,
    Returned,
    RmpreadStatus,
    RmpupdateStatus,
    VcException,
)
from hwemu.snp.rmp import NotCovered, Rmp, Run
from hwemu.snp.rmpentry import (
    STATES,
    Entry,
    PageState,
    decode,
    encode,
    rwx,
    state_of,
)
from hwemu.snp.rmpfault import Remedy, remedy

M2 = 2 << 20
PRE_SWAP = next(n for n, row in enumerate(STATES) if row.state is PageState.PRE_SWAP)


def guests(rmp: Rmp, pfn: int, gpa: int, asid: int = 1, size: int = 0) -> None:
    assert rmpupdate(rmp, pfn, NewState(True, size, False, gpa, asid)).ok


def valid(rmp: Rmp, pfn: int, gpa: int, asid: int = 1, size: int = 0) -> None:
    guests(rmp, pfn, gpa, asid, size)
    assert pvalidate(rmp, Vcpu(asid), Leaf(gpa, pfn), size, validate=True) == Returned(
        GuestStatus.SUCCESS
    )


# -- entries


def test_an_entry_lies_in_its_16_bytes_as_the_kernel_reads_it() -> None:
    entry = Entry(True, 1, False, 0x12345 << 12, 0x2A, False, True, (15, 7, 1, 8))
    raw = encode(entry)
    low = int.from_bytes(raw[:8], "little")
    assert low & 7 == 0b011
    assert low >> 12 & (1 << 39) - 1 == 0x12345
    assert low >> 51 & 0x3FF == 0x2A
    assert low >> 61 & 3 == 0b10
    assert raw[8:] == bytes([15, 7, 1, 8, 0, 0, 0, 0])
    assert decode(raw) == entry


def test_entries_come_back_and_misfits_do_not_go() -> None:
    dice = random.Random(1)
    for _ in range(500):
        zero, one, two, three = (dice.randrange(16) for _ in range(4))
        entry = Entry(
            bool(dice.getrandbits(1)), dice.getrandbits(1), bool(dice.getrandbits(1)),
            dice.getrandbits(39) << 12, dice.getrandbits(10), bool(dice.getrandbits(1)),
            bool(dice.getrandbits(1)), (zero, one, two, three),
        )  # fmt: skip
        assert decode(encode(entry)) == entry
    for entry in (Entry(gpa=1), Entry(gpa=1 << 51), Entry(asid=1024), Entry(size=2)):
        with pytest.raises(ValueError, match="RMP entry with"):
            encode(entry)
    with pytest.raises(ValueError, match="of 15 bytes"):
        decode(bytes(15))


def test_every_state_has_an_entry_and_rows_exclude_each_other() -> None:
    found = set()
    flags = itertools.product((False, True), repeat=4)
    for (assigned, immutable, validated, vmsa), asid, gpa in itertools.product(
        flags, (0, 1), (0, 4096)
    ):
        entry = Entry(assigned, 0, immutable, gpa, asid, vmsa, validated)
        fits = [
            row for row in STATES
            if (row.assigned, row.guest, row.immutable, row.validated)
            == (assigned, asid > 0, immutable, validated)
            and row.gpa in (None, gpa > 0) and row.vmsa in (None, vmsa)
        ]  # fmt: skip
        assert len(fits) <= 1
        if fits:
            assert state_of(entry) is fits[0].state
            found.add(fits[0].state)
        else:
            with pytest.raises(ValueError, match="in no state"):
                state_of(entry)
    assert found == set(PageState)


def test_entries_read_as_words() -> None:
    assert str(Entry()) == "Hypervisor"
    entry = Entry(True, 1, False, 0x200000, 5, False, True, (15, 5, 0, 0))
    assert str(entry) == "Guest-Valid asid 5 gpa 0x200000 2M vmpl0=rwus vmpl1=r-u-"
    assert rwx(8) == "---s"


# -- the table


def test_runs_are_coalesced_as_people_read_them() -> None:
    rmp = Rmp(2048)
    valid(rmp, 512, M2, size=1)
    for step in range(10):
        guests(rmp, 1024 + step, 0x8000 + step * 4096, asid=2)
    guests(rmp, 1034, 0x100000, asid=2)
    assert list(rmp.runs(0, 2048)) == [
        Run(0, 512, PageState.HYPERVISOR, 0, 0, 0),
        Run(512, 512, PageState.GUEST_VALID, 1, M2, 1),
        Run(1024, 10, PageState.GUEST_INVALID, 2, 0x8000, 0),
        Run(1034, 1, PageState.GUEST_INVALID, 2, 0x100000, 0),
        Run(1035, 1013, PageState.HYPERVISOR, 0, 0, 0),
    ]
    assert str(next(rmp.runs(700, 5))) == "[0x2bc, 0x2c1) Guest-Valid asid 1 gpa 0x2bc000 2M"
    assert list(rmp.runs(0, 0)) == []
    assert (rmp.frames_of(1), rmp.frames_of(2), rmp.frames_of(3)) == (512, 11, 0)
    for pfn in (0, 600, 1024, 1034):
        assert STATES[rmp.states(pfn, 1)[0]].state is rmp.state(pfn)


def test_frames_of_a_large_page_have_its_entry() -> None:
    rmp = Rmp(1024, start=1 << 27)
    first = 1 << 27
    valid(rmp, first + 512, M2, size=1)
    assert rmp.entry(first + 700) == rmp.entry(first + 512)
    assert rmp.gpa(first + 700) == M2 + (700 - 512) * 4096
    assert rmp.raw(first + 700) == Entry(assigned=True)
    assert rmp.assigned(first + 700)
    assert not rmp.assigned(0, 1 << 27)
    with pytest.raises(NotCovered, match="frame 0x5"):
        rmp.entry(5)


@pytest.mark.parametrize(
    ("frames", "options"),
    [(4, {"group": 3}), (4, {"group": 1}), (-1, {}), (4, {"start": 5}), (4, {"max_asid": 1024})],
)
def test_tables_that_cannot_be(frames: int, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="RMP"):
        Rmp(frames, **options)


def test_copies_and_keys() -> None:
    rmp = Rmp(1024)
    other = rmp.copy()
    assert rmp.key() == other.key()
    guests(other, 3, 0x1000)
    assert rmp.key() != other.key()
    assert not rmp.assigned(3)
    other = rmp.copy()
    other.hold(3)
    assert rmp.key() != other.key()
    other.release(3)
    assert rmp.key() == other.key()
    with pytest.raises(ValueError, match="not in use"):
        other.release(3)


# -- the host's instructions


def test_rmpupdate_is_read_from_the_kernels_structure() -> None:
    new = NewState(True, 1, False, 0x40000000, 7)
    assert new.pack() == (0x40000000).to_bytes(8, "little") + bytes([1, 1, 0, 0, 7, 0, 0, 0])
    assert NewState.unpack(new.pack()) == new
    with pytest.raises(ValueError, match="15 bytes"):
        NewState.unpack(bytes(15))


def test_rmpupdate_of_a_range_is_a_loop_of_rmpupdate() -> None:
    """With large pages, held frames, immutable ones and ends in the way."""
    dice = random.Random(3)
    whole = lent = 0
    for _ in range(300):
        rmp = Rmp(24, group=4, max_asid=3)
        for _ in range(dice.randrange(3)):
            size = dice.getrandbits(1)
            pfn = dice.randrange(6) * 4 if size else dice.randrange(24)
            immutable = dice.random() < 0.3
            rmpupdate(rmp, pfn, NewState(True, size, immutable, dice.randrange(4) * 0x4000, 1))
        if dice.random() < 0.2:
            rmp.hold(dice.randrange(24))
        for at in range(dice.randrange(24)):
            if not rmp.assigned(at) and dice.random() < 0.8:
                rmp.store(at, Entry(
                    True, 0, False, 0x3000 + at * 4096, 1, dice.random() < 0.1,
                    dice.random() < 0.7, (15, at % 3, 0, 0)))  # fmt: skip
        asid = dice.choice((0, 1, 1, 1, 2, 4))
        gpa = dice.choice((0, 0x3000, 0x3000, 0x3000, (1 << 51) - 0x2000, 0x123)) if asid else 0
        pfn, npages = dice.randrange(24), dice.randrange(12)
        if gpa == 0x3000:
            gpa += pfn * 4096  # those that are there already
        new = NewState(asid > 0 or dice.random() < 0.3, 0, dice.random() < 0.4, gpa, asid)
        loop, done, answer = rmp.copy(), 0, Returned(RmpupdateStatus.SUCCESS)
        for step in range(npages):
            at = gpa + step * 4096 if asid else gpa
            answer = rmpupdate(loop, pfn + step, NewState(new.assigned, 0, new.immutable, at, asid))
            if not answer.ok:
                break
            done += 1
        assert rmpupdate_range(rmp, pfn, npages, new) == (done, answer)
        assert rmp.key() == loop.key()
        whole += done == npages > 0
        lent += done == npages > 2 and bool((rmp.states(pfn, npages) == PRE_SWAP).any())
    assert whole > 50
    assert lent > 3
    with pytest.raises(ValueError, match="of 4 KiB"):
        rmpupdate_range(rmp, 0, 4, NewState(size=1))


def test_psmash_keeps_all_but_the_size() -> None:
    rmp = Rmp(1024)
    valid(rmp, 512, M2, size=1)
    leaf = Leaf(M2, 512)
    assert rmpadjust(rmp, Vcpu(1), leaf, 1, target=2, permissions=5) == Returned(
        GuestStatus.SUCCESS
    )
    before = [rmp.gpa(pfn) for pfn in range(512, 1024)]
    assert psmash(rmp, 512).ok
    for pfn in (512, 513, 1023):
        entry = rmp.raw(pfn)
        assert (entry.size, entry.validated, entry.permissions) == (0, True, (15, 0, 5, 0))
    assert [rmp.gpa(pfn) for pfn in range(512, 1024)] == before
    assert psmash(rmp, 512).status is PsmashStatus.FAIL_BADADDR


def test_rmpread() -> None:
    rmp = Rmp(1024)
    valid(rmp, 512, M2, asid=3, size=1)
    found = rmpread(rmp, 512)
    assert found == Read(M2, True, 1, True, False, 3)
    assert isinstance(found, Read)
    assert found.pack() == M2.to_bytes(8, "little") + bytes([1, 3, 0, 0, 3, 0, 0, 0])
    assert rmpread(rmp, 3) == Read(0, False, 0, False, False, 0)
    refused = rmpread(rmp, 5000)
    assert isinstance(refused, Returned)
    assert refused.status is RmpreadStatus.FAIL_INPUT


def test_rmpupdate_that_changes_nothing_but_immutable_clears_nothing() -> None:
    rmp = Rmp(1024)
    for pfn, gpa, size in ((1, 0x5000, 0), (512, M2, 1)):
        valid(rmp, pfn, gpa, size=size)
        leaf = Leaf(gpa, pfn)
        assert rmpadjust(rmp, Vcpu(1), leaf, size, target=1, permissions=3) == Returned(
            GuestStatus.SUCCESS
        )
        before = rmp.raw(pfn)
        guests(rmp, pfn, gpa, size=size)
        assert rmp.raw(pfn) == before
        assert rmpupdate(rmp, pfn, NewState(True, size, True, gpa, 1)).ok
        assert rmp.raw(pfn) == replace(before, immutable=True)
        assert rmp.state(pfn) is PageState.PRE_SWAP
        found = guest_access(GuestAccess(rmp, Vcpu(1), leaf, Kind.READ))
        assert isinstance(found, NestedPageFault), "it is the AMD-SP's for now"


def test_a_remapped_page_is_no_longer_validated() -> None:
    rmp = Rmp(8, group=4)
    valid(rmp, 1, 0x5000)
    guests(rmp, 1, 0x6000)
    found = guest_access(GuestAccess(rmp, Vcpu(1), Leaf(0x6000, 1), Kind.READ))
    assert isinstance(found, VcException)
    assert found.code == 0x404
    found = guest_access(GuestAccess(rmp, Vcpu(1), Leaf(0x5000, 1), Kind.READ))
    assert isinstance(found, NestedPageFault)


def test_the_vmsa_of_a_running_vcpu_is_in_use() -> None:
    rmp = Rmp(8, group=4)
    valid(rmp, 1, 0x5000)
    leaf = Leaf(0x5000, 1)
    assert rmpadjust(rmp, Vcpu(1), leaf, 0, target=1, permissions=0, vmsa=True) == Returned(
        GuestStatus.SUCCESS
    )
    assert rmp.state(1) is PageState.VMSA
    rmp.hold(1)
    assert rmpupdate(rmp, 1, HYPERVISOR).status is RmpupdateStatus.FAIL_INUSE
    refused = rmpadjust(rmp, Vcpu(1), leaf, 0, target=1, permissions=0, vmsa=False)
    assert isinstance(refused, Returned)
    assert refused.status is GuestStatus.FAIL_INUSE
    rmp.release(1)
    assert rmpupdate(rmp, 1, HYPERVISOR).ok


# -- the guest's instructions


def test_pvalidate_says_that_nothing_changed_by_the_carry_flag() -> None:
    rmp = Rmp(8, group=4)
    valid(rmp, 1, 0x5000)
    found = pvalidate(rmp, Vcpu(1), Leaf(0x5000, 1), 0, validate=True)
    assert isinstance(found, Returned)
    assert (found.status, found.eax, found.carry) == (GuestStatus.FAIL_NOUPDATE, 0, True)
    assert found.why == "Validated changes"


def test_sizes_that_differ_are_the_hosts_or_the_guests_to_mend() -> None:
    rmp = Rmp(1024)
    guests(rmp, 512, M2, size=1)
    part = pvalidate(rmp, Vcpu(1), Leaf(M2 + 0x3000, 515, 2), 0, validate=True)
    assert isinstance(part, NestedPageFault)
    assert part.error & (NpfError.RMP | NpfError.SIZEM) == NpfError.RMP | NpfError.SIZEM
    assert remedy(rmp, Leaf(M2 + 0x3000, 515, 2), 1, part.error) is Remedy.SMASH
    assert psmash(rmp, 512).ok
    whole = pvalidate(rmp, Vcpu(1), Leaf(M2, 512, 2), 1, validate=True)
    assert isinstance(whole, Returned)
    assert whole.status is GuestStatus.FAIL_SIZEMISMATCH
    assert pvalidate(rmp, Vcpu(1), Leaf(M2 + 0x3000, 515, 1), 0, validate=True) == Returned(
        GuestStatus.SUCCESS
    )


def test_registers() -> None:
    assert PvalidateRegisters.decode(1, 0xFF01) == PvalidateRegisters(1, True)
    assert RmpadjustRegisters.decode(0, 1 << 16 | 0x502) == RmpadjustRegisters(0, 2, 5, True)


def test_rmpquery() -> None:
    rmp = Rmp(8, group=4)
    valid(rmp, 1, 0x5000)
    leaf = Leaf(0x5000, 1)
    rmpadjust(rmp, Vcpu(1), leaf, 0, target=2, permissions=3)
    assert rmpquery(rmp, Vcpu(1), leaf, target=2) == Query(0, 3, False)
    assert rmpquery(rmp, Vcpu(1, vmpl=2), leaf, target=2) == Query(0, 3, False)
    for vcpu, target, status in (
        (Vcpu(1, vmpl=2), 1, GuestStatus.FAIL_PERMISSION),
        (Vcpu(1), 4, GuestStatus.FAIL_INPUT),
    ):
        found = rmpquery(rmp, vcpu, leaf, target=target)
        assert isinstance(found, Returned)
        assert found.status is status
    assert isinstance(rmpquery(rmp, Vcpu(1, cpl=3), leaf, target=2), GeneralProtection)
    assert isinstance(rmpquery(rmp, Vcpu(2), leaf, target=2), NestedPageFault)


# -- accesses and what a host does about them


def test_error_codes_describe_the_access() -> None:
    rmp = Rmp(8, group=4)
    valid(rmp, 1, 0x5000)
    host = host_access(HostAccess(rmp, 1, Kind.WRITE, user=True))
    assert isinstance(host, HostPageFault)
    assert host.error == PfError.RMP | PfError.PRESENT | PfError.WRITE | PfError.USER
    assert host_access(HostAccess(rmp, 1, Kind.READ)) is Granted.CIPHERTEXT
    assert isinstance(host_access(HostAccess(rmp, 2, Kind.WRITE, level=2)), HostPageFault)
    assert host_access(HostAccess(rmp, 2, Kind.WRITE)) is Granted.PLAIN
    fetch = guest_access(GuestAccess(rmp, Vcpu(1, vmpl=1), Leaf(0x5000, 1), Kind.FETCH))
    assert isinstance(fetch, NestedPageFault)
    assert fetch.error == (
        NpfError.RMP | NpfError.VMPL | NpfError.ENC | NpfError.FETCH | NpfError.FINAL
        | NpfError.PRESENT | NpfError.USER
    )  # fmt: skip
    walk = guest_access(GuestAccess(rmp, Vcpu(2), Leaf(0x5000, 1), Kind.WALK, private=False))
    assert isinstance(walk, NestedPageFault)
    assert walk.error & (NpfError.WALK | NpfError.ENC) == NpfError.WALK | NpfError.ENC


def test_remedies() -> None:
    rmp = Rmp(8, group=4)
    rmp_fault = NpfError.RMP
    assert remedy(rmp, Leaf(0x5000, 1), 1, rmp_fault) is Remedy.ASSIGN
    assert remedy(rmp, Leaf(0x5000, 99), 1, rmp_fault) is Remedy.WRONG_PAGE
    valid(rmp, 1, 0x5000)
    assert remedy(rmp, Leaf(0x5000, 1, 2), 1, rmp_fault) is Remedy.ZAP
    assert remedy(rmp, Leaf(0x5000, 1, 1), 1, rmp_fault) is Remedy.RETRY
    assert remedy(rmp, Leaf(0x5000, 1), 2, rmp_fault) is Remedy.WRONG_PAGE
    assert remedy(rmp, Leaf(0x6000, 1), 1, rmp_fault) is Remedy.WRONG_PAGE
    guests(rmp, 4, 0x8000, size=1)
    assert remedy(rmp, Leaf(0x8000, 4, 1), 1, rmp_fault) is Remedy.SMASH
    assert remedy(rmp, Leaf(0x8000, 4, 2), 1, rmp_fault) is Remedy.RETRY


def test_an_arena_of_half_a_terabyte_has_a_table() -> None:
    rmp = Rmp(1 << 27, start=1 << 27)
    guests(rmp, (1 << 28) - 512, M2, size=1)
    assert rmp.state((1 << 28) - 1) is PageState.GUEST_INVALID
    assert np.count_nonzero(rmp.states((1 << 28) - 1024, 1024)) == 512
