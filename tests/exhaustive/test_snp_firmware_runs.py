# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of commands of the AMD-SP between instructions, against a second opinion."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from snp_fwpredictor import FirmwarePredictor
from snp_machine import Nothing
from test_snp_rmp import model, predicted, same

from hwemu.snp.firmware import Firmware
from hwemu.snp.fwstatus import FirmwareRefused
from hwemu.snp.guestcontext import Policy
from hwemu.snp.rmp import Rmp

pytestmark = pytest.mark.exhaustive

FRAMES, GROUP, MAX_ASID = 12, 2, 3
POLICY = int(Policy.MUST_BE_ONE | Policy.SMT)
Operation = tuple[Any, ...]


def command(firmware: Firmware, name: str, operands: list[int]) -> int:
    if name == "launch_start":
        operands = [*operands, POLICY]
    try:
        getattr(firmware, name)(*operands)
    except FirmwareRefused as refused:
        return int(refused.status)
    return 0


INSTRUCTIONS = ("rmpupdate", "psmash", "pvalidate", "rmpadjust")


def chosen(dice: random.Random, oracle: FirmwarePredictor) -> Operation:
    frame = dice.randrange(FRAMES + 1)
    context = dice.choice(sorted(oracle.guests)) if oracle.guests and dice.random() < 0.9 else frame
    lent = [page.first for page in oracle.pages if page.immutable and page.asid]
    guest = oracle.guests.get(context)
    asid = guest.asid if guest and guest.asid and dice.random() < 0.9 else dice.randrange(5)
    if lent and dice.random() < 0.7:
        frame = dice.choice(lent)
    stuck = [page for page in oracle.pages if page.immutable]
    if len(stuck) > FRAMES // 2 and dice.random() < 0.4:
        page = dice.choice(stuck)
        return "page_reclaim", page.first, int(page.frames > 1)
    page = oracle.find(frame)
    size = int(page is not None and page.frames > 1) if dice.random() < 0.9 else dice.randrange(2)
    match dice.randrange(24):
        case 0:
            return "rmpupdate", dice.randrange(FRAMES), True, 0, True, 0, 0
        case 1:
            # two neighbours that can become one page
            at = dice.randrange(FRAMES // 2) * 2 + dice.randrange(2)
            return "rmpupdate", at, True, 0, True, at % 2, asid
        case 2 | 3 | 4 | 5:
            large = dice.random() < 0.4
            at = dice.randrange(FRAMES // 2) * 2 if large else dice.randrange(FRAMES)
            gfn = dice.randrange(3) * 2 if large else dice.randrange(2) * 2 + at % 2
            return "rmpupdate", at, True, int(large), dice.random() < 0.8, gfn, asid
        case 6 | 7:
            return "rmpupdate", frame, False, size, False, 0, 0
        case 8:
            return "psmash", dice.randrange(FRAMES // 2) * 2
        case 9:
            if page is None or not page.asid:
                return "gctx_create", dice.randrange(FRAMES)
            gfn = page.gfn + frame - page.first
            level = 1 + int(page.frames > 1)
            return "pvalidate", page.asid, 0, 0, gfn, frame, level, size, dice.random() < 0.5
        case 10:
            return "gctx_create", dice.randrange(FRAMES)
        case 11:
            return "launch_start", context
        case 12:
            return "activate", context, dice.randrange(5)
        case 13 | 14:
            return "launch_update", context, frame, dice.choice((0, 1, 1, 2, 3, 6, 7)), size
        case 15:
            return (
                ("launch_finish", context) if dice.random() < 0.3 else ("activate", context, asid)
            )
        case 16:
            return ("decommission", context) if dice.random() < 0.15 else ("wbinvd",)
        case 17:
            return ("df_flush",)
        case 18:
            return "md_init", context, dice.randrange(FRAMES)
        case 19:
            return "page_reclaim", frame, size
        case 20:
            if dice.random() < 0.5:
                return "page_unsmash", dice.choice((frame, frame - frame % 2))
            return "page_reclaim", dice.randrange(FRAMES), size
        case 21 | 22:
            # what a guest has is lent as it is: Pre-Swap, if it was valid
            pages = [page for page in oracle.pages if page.asid and not page.immutable]
            if pages:
                page = dice.choice(pages)
                return (
                    "rmpupdate",
                    page.first,
                    True,
                    int(page.frames > 1),
                    True,
                    page.gfn,
                    page.asid,
                )
    target = dice.choice(lent) if lent and dice.random() < 0.8 else dice.randrange(FRAMES + 1)
    source = frame if dice.random() < 0.7 else dice.randrange(FRAMES)
    return "page_move", context, source, target, size


def run(seed: int, steps: int) -> Counter[tuple[str, int | str]]:
    dice = random.Random(seed)
    firmware = Firmware(Rmp(FRAMES, group=GROUP, max_asid=MAX_ASID), Nothing())
    firmware.init()
    oracle = FirmwarePredictor(FRAMES, GROUP, MAX_ASID)
    answers: Counter[tuple[str, int | str]] = Counter()
    for step in range(steps):
        operation = chosen(dice, oracle)
        name, *operands = operation
        before = firmware.key()
        found: int | str
        if name in INSTRUCTIONS:
            expected, found = predicted(oracle, operation), model(firmware.rmp, operation)
        else:
            expected = getattr(oracle, name)(*operands)
            found = command(firmware, name, operands)
        assert found == expected, (seed, step, operation)
        if found != 0:
            assert firmware.key() == before, (seed, step, operation)
        answers[name, found] += 1
        if step % 16 == 0:
            same(firmware.rmp, oracle)
    same(firmware.rmp, oracle)
    return answers


OCCURRING = {
    "gctx_create": (0, 0x1A),
    "launch_start": (0, 0x02, 0x10),
    "activate": (0, 0x02, 0x0C, 0x0D, 0x0F, 0x10, 0x12),
    "launch_update": (0, 0x02, 0x08, 0x10, 0x16, 0x19, 0x1A, 0x1C),
    "launch_finish": (0, 0x02, 0x10),
    "decommission": (0, 0x10),
    "df_flush": (0, 0x0E),
    "md_init": (0, 0x02, 0x10, 0x1A),
    "page_reclaim": (0, 0x09, 0x19, 0x1A),
    "page_unsmash": (0, 0x16, 0x1A),
    "page_move": (0, 0x02, 0x08, 0x10, 0x19, 0x1A, 0x1C),
}


def occurred(answers: Counter[tuple[str, int | str]]) -> None:
    missing = [
        (name, code)
        for name, codes in OCCURRING.items()
        for code in codes
        if not answers[name, code]
    ]
    assert not missing, missing


def test_a_random_sequence_of_commands() -> None:
    occurred(run(2, 12_000))


@pytest.mark.slow
def test_long_random_sequences_of_commands() -> None:
    occurred(run(1, 100_000))
