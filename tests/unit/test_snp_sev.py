# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import hashlib
import hmac
import itertools
import struct
from collections.abc import Callable
from typing import Any

import pytest

from hwemu.snp.fwstatus import FirmwareRefused, FwStatus
from hwemu.snp.rmpentry import PAGE_SIZE
from hwemu.snp.sev import PinRefused, Pins, Sev, SevSees, SevState, sev_access


class Bytes:
    def read(self, pfn: int) -> bytes:
        return bytes([pfn & 0xFF]) * PAGE_SIZE

    def write(self, pfn: int, contents: bytes) -> None:
        raise AssertionError

    def zero(self, pfn: int) -> None:
        raise AssertionError

    def copy(self, source: int, target: int) -> None:
        raise AssertionError


def refused(sev: Sev, command: Callable[..., object], *operands: Any) -> FwStatus:
    before = sev.key()
    with pytest.raises(FirmwareRefused) as caught:
        command(*operands)
    assert sev.key() == before
    return caught.value.status


def test_the_measurement_is_what_an_owner_computes() -> None:
    sev = Sev(Bytes(), last_asid=3)
    handle = sev.launch_start(policy=0x5)
    sev.activate(handle, 2)
    sev.launch_update_data(handle, 7, 0x10, PAGE_SIZE)
    digest = hashlib.sha256(b"\x07" * (PAGE_SIZE - 16) + b"\x08" * 16).digest()
    found = sev.launch_measure(handle)
    words = struct.pack("<BBBBI", 4, 1, 55, 0, 5) + digest + found.mnonce
    assert found.measure == hmac.new(sev.tik(handle), words, hashlib.sha256).digest()
    sev.launch_finish(handle)
    assert sev.state(handle) is SevState.RUNNING


def test_commands_come_in_an_order() -> None:
    sev = Sev(Bytes(), last_asid=3)
    handle = sev.launch_start(policy=0)
    update = sev.launch_update_data
    assert refused(sev, update, handle, 1, 0, 16) is FwStatus.INACTIVE
    assert refused(sev, sev.launch_finish, handle) is FwStatus.INVALID_GUEST_STATE
    assert refused(sev, sev.activate, 99, 1) is FwStatus.INVALID_GUEST
    assert refused(sev, sev.state, 99) is FwStatus.INVALID_GUEST
    assert refused(sev, sev.activate, handle, 4) is FwStatus.INVALID_ASID
    sev.activate(handle, 1)
    assert refused(sev, sev.activate, handle, 2) is FwStatus.ACTIVE
    assert refused(sev, sev.activate, sev.launch_start(0), 1) is FwStatus.ASID_OWNED
    for length in (0, 8, 17):
        assert refused(sev, update, handle, 1, 0, length) is FwStatus.INVALID_LENGTH
    for offset in (8, PAGE_SIZE):
        assert refused(sev, update, handle, 1, offset, 16) is FwStatus.INVALID_ADDRESS
    sev.launch_measure(handle)
    assert refused(sev, update, handle, 1, 0, 16) is FwStatus.INVALID_GUEST_STATE
    assert refused(sev, sev.decommission, handle) is FwStatus.ACTIVE


def test_an_asid_comes_back_after_flushes() -> None:
    sev = Sev(Bytes(), last_asid=1)
    handle = sev.launch_start(policy=0)
    sev.activate(handle, 1)
    copy = sev.copy()
    sev.deactivate(handle)
    sev.deactivate(handle)
    sev.decommission(handle)
    other = sev.launch_start(policy=0)
    assert refused(sev, sev.activate, other, 1) is FwStatus.DFFLUSH_REQUIRED
    assert refused(sev, sev.df_flush) is FwStatus.WBINVD_REQUIRED
    sev.wbinvd()
    sev.df_flush()
    sev.activate(other, 1)
    assert copy.state(handle) is SevState.LUPDATE


def test_nothing_faults_and_nothing_is_safe_from_writes() -> None:
    for encrypted, own_key, write in itertools.product((False, True), repeat=3):
        found = sev_access(encrypted=encrypted, own_key=own_key, write=write)
        if encrypted == own_key:
            assert found is SevSees.PLAIN
        else:
            assert found is (SevSees.GARBLED if write else SevSees.CIPHERTEXT)


def test_pins_are_counted_and_let_go_exactly() -> None:
    pins = Pins(limit=5)
    pins.register(0x1800, 0x1000)
    assert pins.npages == 2
    pins.register(0x1000, 0x2000)
    assert pins.npages == 4
    for addr, size, code in (
        (0x1000, 0, errno.EINVAL),
        ((1 << 64) - 0x1000, 0x2000, errno.EINVAL),
        (0x8000, 0x2000, errno.ENOMEM),
    ):
        with pytest.raises(PinRefused) as caught:
            pins.register(addr, size)
        assert (caught.value.errno, pins.npages) == (code, 4)
    with pytest.raises(PinRefused) as caught:
        pins.unregister(0x1000, 0x1000)
    assert caught.value.errno == errno.EINVAL
    pins.unregister(0x1000, 0x2000)
    assert pins.npages == 2
    for operation in (Pins(sev=False).register, Pins(sev=False).unregister):
        with pytest.raises(PinRefused) as caught:
            operation(0x1000, 0x1000)
        assert caught.value.errno == errno.ENOTTY
