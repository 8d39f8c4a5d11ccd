# SPDX-License-Identifier: GPL-2.0-or-later
"""Every operation on every state of a small reverse map table, and long random sequences.

The oracle is `snp_predictor`, written from the manuals and sharing no code with the model.  A
difference is printed as the operation and both answers.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from snp_predictor import Page, Predictor

from hwemu.snp.access import Granted, GuestAccess, HostAccess, Kind, guest_access, host_access
from hwemu.snp.guestops import Leaf, Vcpu, pvalidate, rmpadjust
from hwemu.snp.hostops import NewState, psmash, rmpupdate
from hwemu.snp.outcome import (
    GeneralProtection,
    HostPageFault,
    NestedPageFault,
    NpfError,
    Returned,
    VcException,
)
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import PAGE_SIZE, Entry

pytestmark = pytest.mark.exhaustive

FRAMES, GROUP, MAX_ASID = 10, 4, 3  # two pages of "2M", and two frames behind them
Operation = tuple[Any, ...]


def words(outcome: object) -> str | int:
    """An outcome of the model in the predictor's words."""
    match outcome:
        case Returned(status=status):
            return int(status)
        case NestedPageFault(error=error):
            assert error & NpfError.RMP
            assert error & NpfError.PRESENT
            names = (("enc", NpfError.ENC), ("sizem", NpfError.SIZEM), ("vmpl", NpfError.VMPL))
            return " ".join(["npf", *(name for name, bit in names if error & bit)])
        case VcException(code=0x404):
            return "vc"
        case GeneralProtection():
            return "gp"
        case HostPageFault(error=error):
            assert error & 1 << 31
            return "pf"
        case Granted():
            return "plain" if outcome is Granted.PLAIN else "ciphertext"
    raise AssertionError(outcome)


def model(rmp: Rmp, operation: Operation) -> str | int:
    """Perform an operation; faults of instructions are private accesses by nature."""
    name, *rest = operation
    match name:
        case "rmpupdate":
            frame, assigned, size, immutable, gfn, asid = rest
            new = NewState(assigned, size, immutable, gfn * PAGE_SIZE, asid)
            return words(rmpupdate(rmp, frame, new))
        case "psmash":
            return words(psmash(rmp, *rest))
        case "hold":
            rmp.hold(*rest)
            return 0
        case "release":
            rmp.release(*rest)
            return 0
        case "pvalidate":
            asid, vmpl, cpl, gfn, frame, level, size, validate = rest
            leaf = Leaf(gfn * PAGE_SIZE, frame, level)
            found = pvalidate(rmp, Vcpu(asid, vmpl, cpl), leaf, size, validate=validate)
            return str(words(found)).replace(" enc", "") if isinstance(found, NestedPageFault) \
                else words(found)  # fmt: skip
        case "rmpadjust":
            asid, vmpl, cpl, gfn, frame, level, size, target, mask, vmsa = rest
            leaf = Leaf(gfn * PAGE_SIZE, frame, level)
            done = rmpadjust(rmp, Vcpu(asid, vmpl, cpl), leaf, size, target=target,
                             permissions=mask, vmsa=vmsa)  # fmt: skip
            return str(words(done)).replace(" enc", "") if isinstance(done, NestedPageFault) \
                else words(done)  # fmt: skip
        case "host":
            kind, frame, level = rest
            return words(host_access(HostAccess(rmp, frame, KINDS[kind], level)))
        case "guest":
            kind, asid, vmpl, cpl, gfn, frame, level, private, snp = rest
            leaf = Leaf(gfn * PAGE_SIZE, frame, level)
            vcpu = Vcpu(asid, vmpl, cpl)
            return words(guest_access(GuestAccess(rmp, vcpu, leaf, KINDS[kind], private, snp)))
    raise AssertionError(name)


KINDS = {"read": Kind.READ, "write": Kind.WRITE, "fetch": Kind.FETCH, "walk": Kind.WALK}


def predicted(oracle: Predictor, operation: Operation) -> str | int:
    name, *rest = operation
    if name == "hold":
        oracle.busy.add(*rest)
        return 0
    if name == "release":
        oracle.busy.remove(*rest)
        return 0
    answer: str | int = getattr(oracle, name)(*rest)
    return answer


def same(rmp: Rmp, oracle: Predictor) -> None:
    """The table says of every frame what the oracle says of its page."""
    for frame in range(rmp.frames):
        entry, page = rmp.entry(frame), oracle.find(frame)
        assert entry.assigned == (page is not None), frame
        if page is None:
            assert entry == type(entry)(), frame
            continue
        assert (entry.size, entry.immutable, entry.asid, entry.vmsa, entry.validated) == (
            int(page.frames > 1), page.immutable, page.asid, page.vmsa, page.valid
        ), frame  # fmt: skip
        assert list(entry.permissions) == page.masks, frame
        assert rmp.page(frame) == page.first, frame
        if page.asid:
            assert rmp.gpa(frame) == (page.gfn + frame - page.first) * PAGE_SIZE, frame


# -- every operation on every state of a page ------------------------------------------


def starts() -> Iterator[list[Page]]:
    """Every way in which the first group can be used, up to what the rules can tell apart."""
    yield []
    shapes = [[(0, 1)], [(1, 1)], [(0, 1), (1, 1), (2, 1), (3, 1)], [(0, 4)]]
    for shape, (asid, gfn) in itertools.product(shapes, [(1, 8), (0, 0)]):
        for immutable, valid, vmsa in itertools.product((False, True), repeat=3):
            if not asid and (valid or vmsa > immutable):
                continue  # in no state
            for masks in ([15, 0, 0, 0], [15, 3, 10, 2]):
                yield [
                    Page(first, count, asid, gfn + first if asid else 0, immutable, valid, vmsa,
                         list(masks))
                    for first, count in shape
                ]  # fmt: skip


def copied(pages: list[Page]) -> list[Page]:
    return [replace(page, masks=list(page.masks)) for page in pages]


def build(pages: list[Page], busy: set[int]) -> tuple[Rmp, Predictor]:
    rmp, oracle = Rmp(FRAMES, group=GROUP, max_asid=MAX_ASID), Predictor(FRAMES, GROUP, MAX_ASID)
    for page in pages:
        zero, one, two, three = page.masks
        rmp.store(
            page.first,
            Entry(True, int(page.frames > 1), page.immutable, page.gfn * PAGE_SIZE, page.asid,
                  page.vmsa, page.valid, (zero, one, two, three)),
        )  # fmt: skip
    oracle.pages = pages
    for frame in busy:
        rmp.hold(frame)
        oracle.busy.add(frame)
    return rmp, oracle


def operations() -> Iterator[Operation]:
    """Every operation on the first frames, with right and wrong operands."""
    for frame, assigned, size, immutable, gfn, asid in itertools.product(
        (0, 1, 8), (False, True), (0, 1, 2), (False, True), (0, 8, 9), (0, 1, 4)
    ):
        yield ("rmpupdate", frame, assigned, size, immutable, gfn, asid)
    for frame in (0, 1, 8, 12):
        yield ("psmash", frame)
    places = ((8, 0), (9, 1), (9, 0), (12, 0), (8, 10))
    leaves = [(gfn, frame, level) for gfn, frame in places for level in (1, 2)]
    for asid, vmpl, (gfn, frame, level) in itertools.product((1, 2), (0, 2), leaves):
        for size in (0, 1, 2):
            for cpl, validate in ((0, True), (0, False), (3, True)):
                yield ("pvalidate", asid, vmpl, cpl, gfn, frame, level, size, validate)
            for cpl, target, mask, vmsa in (
                (0, 1, 15, True), (0, 2, 5, True), (0, 0, 1, False), (3, 1, 1, False),
                (0, 4, 1, False), (0, 3, 16, False), (0, 3, 8, False),
            ):  # fmt: skip
                yield ("rmpadjust", asid, vmpl, cpl, gfn, frame, level, size, target, mask, vmsa)
        if frame >= FRAMES:
            continue  # not memory with an entry: read and written below
        for kind, cpl, private, snp in itertools.product(
            KINDS, (0, 3), (False, True), (False, True)
        ):
            yield ("guest", kind, asid, vmpl, cpl, gfn, frame, level, private, snp)
    for kind, frame, level in itertools.product(KINDS, (0, 1, 4, 9), (1, 2)):
        yield ("host", kind, frame, level)


def test_every_operation_on_every_state() -> None:
    every = list(operations())
    answers: Counter[tuple[str, str | int]] = Counter()
    for number, pages in enumerate(starts()):
        for busy in (set(), {1}) if number % 4 == 0 else (set(),):
            fresh, oracle = build(copied(pages), busy)
            before = fresh.key()
            rmp = fresh.copy()
            for operation in every:
                found, expected = model(rmp, operation), predicted(oracle, operation)
                assert found == expected, (operation, pages, busy)
                answers[operation[0], found] += 1
                if found == 0:
                    same(rmp, oracle)
                    rmp, oracle.pages = fresh.copy(), copied(pages)
                elif operation[0] in ("rmpupdate", "psmash") or expected in (1, 2, 3, 6, 255):
                    assert rmp.key() == before, (operation, pages)
            assert rmp.key() == before, pages
    codes = {name: {code for who, code in answers if who == name} for name, _ in answers}
    assert codes["rmpupdate"] == {0, 1, 2, 3, 4}
    assert codes["psmash"] == {0, 1, 2, 3, 4}
    assert codes["pvalidate"] == {0, 1, 6, 255, "gp", "npf", "npf sizem"}
    assert codes["rmpadjust"] == {0, 1, 2, 3, 6, "gp", "npf", "npf sizem", "vc"}
    assert codes["host"] == {"plain", "ciphertext", "pf"}
    assert codes["guest"] == {"plain", "ciphertext", "npf", "npf enc", "npf enc vmpl", "vc"}


# -- long sequences -------------------------------------------------------------------


def chosen(dice: random.Random, oracle: Predictor) -> Operation:
    """An operation that is often possible: mostly on what is there, sometimes on anything."""
    page = dice.choice(oracle.pages) if oracle.pages and dice.random() < 0.8 else None
    frame = dice.randrange(FRAMES)
    asid, gfn = dice.randrange(MAX_ASID + 2), dice.randrange(3) * GROUP + frame % GROUP
    level = dice.choice((1, 2))
    size = dice.choice((0, 0, 0, 1, 1, 2))
    if page and dice.random() < 0.95:
        frame = page.first + dice.randrange(page.frames)
        gfn = page.gfn + frame - page.first
        asid = page.asid
        if dice.random() < 0.9:
            level = 1 if page.frames == 1 else 2
            size = int(page.frames > 1)
            frame, gfn = (frame, gfn) if size == 0 else (page.first, page.gfn)
    vmpl, cpl = dice.choice((0, 0, 0, 1, 2)), dice.choice((0, 0, 0, 0, 3))
    match dice.randrange(16):
        case 0 | 1 | 2 | 3:
            if dice.random() < 0.6:
                whole = dice.random() < 0.5
                frame = dice.choice((0, GROUP)) if whole else dice.randrange(FRAMES)
                gfn = dice.randrange(3) * GROUP + (0 if whole else frame % GROUP)
                return ("rmpupdate", frame, True, int(whole), dice.random() < 0.05, gfn,
                        dice.randrange(1, MAX_ASID + 1))  # fmt: skip
            return ("rmpupdate", frame, dice.random() < 0.1, size, False, gfn,
                    0 if dice.random() < 0.8 else asid)  # fmt: skip
        case 4:
            return ("psmash", dice.choice((0, GROUP, frame)))
        case 5:
            if oracle.busy:
                return ("release", dice.choice(sorted(oracle.busy)))
            return ("hold", dice.randrange(FRAMES))
        case 6 | 7 | 8:
            return ("pvalidate", asid, vmpl, cpl, gfn, frame, level, size, dice.random() < 0.7)
        case 9 | 10 | 11:
            return ("rmpadjust", asid, vmpl, cpl, gfn, frame, level, size, dice.randrange(5),
                    dice.choice((0, 1, 3, 5, 7, 8, 15, 15, 16)), dice.random() < 0.3)  # fmt: skip
        case 12:
            return ("host", dice.choice([*KINDS]), frame, level)
    return ("guest", dice.choice([*KINDS]), asid, vmpl, cpl, gfn, frame, level,
            dice.random() < 0.8, dice.random() < 0.9)  # fmt: skip


def stuck(oracle: Predictor) -> list[int]:
    """Frames that only the AMD-SP can give back."""
    return [page.first for page in oracle.pages if page.immutable]


def run(seed: int, steps: int) -> Counter[tuple[str, str | int]]:
    dice = random.Random(seed)
    rmp, oracle = Rmp(FRAMES, group=GROUP, max_asid=MAX_ASID), Predictor(FRAMES, GROUP, MAX_ASID)
    answers: Counter[tuple[str, str | int]] = Counter()
    for step in range(steps):
        operation = chosen(dice, oracle)
        before = rmp.key()
        expected, found = predicted(oracle, operation), model(rmp, operation)
        assert found == expected, (seed, step, operation)
        if found != 0:
            assert rmp.key() == before, (seed, step, operation)
        answers[operation[0], found] += 1
        if step % 64 == 0:
            same(rmp, oracle)
            for frame in stuck(oracle):  # as SNP_PAGE_RECLAIM of the firmware would
                rmp.store(frame, replace(rmp.raw(frame), immutable=False))
                page = oracle.find(frame)
                assert page is not None
                page.immutable = False
    same(rmp, oracle)
    return answers


def occurred(answers: Counter[tuple[str, str | int]]) -> None:
    for name, codes in {
        "rmpupdate": (0, 1, 2, 3, 4),
        "psmash": (0, 1, 3, 4),
        "pvalidate": (0, 1, 6, 255, "gp", "npf", "npf sizem"),
        "rmpadjust": (0, 1, 2, 3, 6, "gp", "npf", "npf sizem", "vc"),
        "host": ("plain", "ciphertext", "pf"),
        "guest": ("plain", "ciphertext", "npf", "npf enc", "npf enc vmpl", "vc"),
    }.items():
        missing = [code for code in codes if not answers[name, code]]
        assert not missing, (name, missing)


def test_a_random_sequence() -> None:
    occurred(run(1, 8_000))


@pytest.mark.slow
def test_long_random_sequences() -> None:
    for seed in range(3):
        occurred(run(seed, 100_000))
