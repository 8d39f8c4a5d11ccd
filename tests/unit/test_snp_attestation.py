# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import struct

from snp_machine import (
    GCTX,
    PAGE,
    POLICY,
    Pages,
    launched,
    refused,
)

from hwemu.snp import report
from hwemu.snp.firmware import Firmware
from hwemu.snp.fwstatus import FwStatus
from hwemu.snp.guestcontext import IdBlock
from hwemu.snp.guestmessage import REPORT_REQUEST, REPORT_RESPONSE, Message, MessageType, unseal
from hwemu.snp.launch import PageType


def running() -> tuple[Firmware, Pages]:
    firmware, memory = launched()
    firmware.launch_update(GCTX, PAGE, PageType.NORMAL)
    block = IdBlock(firmware.guest_status(GCTX).digest, POLICY, guest_svn=4)
    firmware.launch_finish(GCTX, host_data=b"h" * 32, id_block=block)
    return firmware, memory


def ask(firmware: Firmware, vmpck: int, sequence: int, vmpl: int, *, kind: int = 5) -> bytes:
    payload = REPORT_REQUEST.pack(b"nonce".ljust(64, b"\0"), vmpl)
    return Message(kind, payload, vmpck, sequence).seal(firmware.guest_status(GCTX).keys[vmpck])


def test_a_report_vouches_for_the_launch() -> None:
    firmware, _ = running()
    answer = firmware.guest_request(GCTX, ask(firmware, 0, 1, 2))
    message = unseal(answer, firmware.guest_status(GCTX).keys[0])
    assert message is not None
    assert (message.kind, message.sequence) == (MessageType.REPORT_RSP, 2)
    status, size = REPORT_RESPONSE.unpack_from(message.payload)
    raw = message.payload[REPORT_RESPONSE.size :]
    assert (status, size, len(raw)) == (0, 0x4A0, 0x4A0)
    digest = firmware.guest_status(GCTX).digest
    assert raw[0x90:0xC0] == digest
    assert raw[0x50:0x90] == b"nonce".ljust(64, b"\0")
    assert raw[0xC0:0xE0] == b"h" * 32
    assert struct.unpack_from("<IIQ", raw) == (2, 4, POLICY)
    assert struct.unpack_from("<II", raw, 0x30) == (2, 0)
    assert report.verify(raw, firmware.report_key())
    assert not report.verify(raw[:0x90] + b"!" + raw[0x91:], firmware.report_key())
    assert not report.verify(raw, Firmware(firmware.rmp, Pages(), secret=b"other").report_key())
    assert report.unpack(raw).measurement == digest
    assert report.pack(report.unpack(raw), firmware.report_key()) == raw


def test_messages_have_a_key_an_order_and_a_rank() -> None:
    firmware, _ = running()
    first = ask(firmware, 1, 1, 1)
    torn = first[:-1] + bytes([first[-1] ^ 1])
    status = refused(firmware, firmware.guest_request, GCTX, torn)
    assert status is FwStatus.BAD_MEASUREMENT
    for bad in (b"", ask(firmware, 1, 2, 1), ask(firmware, 1, 1, 1, kind=1)):
        assert refused(firmware, firmware.guest_request, GCTX, bad) is FwStatus.INVALID_PARAM
    firmware.guest_request(GCTX, first)
    assert refused(firmware, firmware.guest_request, GCTX, first) is FwStatus.INVALID_PARAM
    higher = firmware.guest_request(GCTX, ask(firmware, 1, 3, 0))
    message = unseal(higher, firmware.guest_status(GCTX).keys[1])
    assert message is not None
    assert REPORT_RESPONSE.unpack(message.payload) == (FwStatus.INVALID_PARAM, 0)


def test_reports_are_for_running_guests() -> None:
    firmware, _ = launched()
    request = ask(firmware, 0, 1, 0)
    status = refused(firmware, firmware.guest_request, GCTX, request)
    assert status is FwStatus.INVALID_GUEST_STATE


def test_keys_stay_out_of_what_is_printed() -> None:
    firmware, _ = running()
    guest = firmware.guest_status(GCTX)
    assert guest.keys[0].hex() not in repr(guest)
    assert str(guest.keys[0]) not in repr(guest)
