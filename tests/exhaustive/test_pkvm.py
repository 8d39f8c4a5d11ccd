# SPDX-License-Identifier: GPL-2.0-or-later
"""pKVM's model against a predictor: each state, operation and size; then long random runs."""

from __future__ import annotations

import itertools
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from pkvm_predictor import Page, Predictor
from pkvm_world import Board, ask, broken, picture, predicted

from hwemu.pkvm.hypervisor import Hypervisor

pytestmark = pytest.mark.exhaustive

MEMORY = [(0, 4), (5, 8)]  # page 4 is none
BLOCK = 2
A, B, C, NOBODY = 0x1000, 0x1001, 0x1002, 0x1003
Call = tuple[str, tuple[Any, ...]]


def both(vms: int = 3) -> tuple[Hypervisor, Board, Predictor]:
    board = Board()
    hyp = Hypervisor(board, MEMORY, block_pages=BLOCK, max_vms=vms, max_shares=2)
    pages = {pfn: Page() for start, end in MEMORY for pfn in range(start, end)}
    return hyp, board, Predictor(pages, BLOCK, vms, 2)


def twins(hyp: Hypervisor, board: Board) -> tuple[Hypervisor, Board]:
    board = board.copy()
    return hyp.copy(board), board


#: Calls that bring page n, at gfn n, into each situation that a page of its own can be in.
SITUATIONS: dict[str, list[Call]] = {
    "the host's": [],
    "pinned": [("pin", ("host", 0, 1))],
    "lent to EL2": [("host_share_hyp", (0, 1))],
    "lent to EL2, pinned": [("host_share_hyp", (0, 1)), ("pin", ("hyp", 0, 1))],
    "EL2's": [("host_donate_hyp", (0, 1))],
    "A's": [("host_donate_guest", (A, 0, 0, 1, False))],
    "A's, shared": [
        ("host_donate_guest", (A, 0, 0, 1, False)),
        ("guest_share_host", (A, 0, 1)),
    ],
    "lent to B": [("host_share_guest", (B, 0, 0, 1, False))],
    "lent to B, pinned": [
        ("pin", ("host", 0, 1)),
        ("host_share_guest", (B, 0, 0, 1, False)),
    ],
    "lent to B and C": [
        ("host_share_guest", (B, 0, 0, 1, False)),
        ("host_share_guest", (C, 0, 0, 1, False)),
    ],
}
WHOLE: dict[str, list[Call]] = {
    "a block of A's": [("host_donate_guest", (A, 0, 0, 2, True))],
    "a block lent to B": [("host_share_guest", (B, 0, 0, 2, True))],
}
LIVES: dict[str, list[Call]] = {
    "alive": [],
    "A dying": [("start_teardown", (A,))],
    "B dying": [("start_teardown", (B,))],
    "A running": [("vcpu_load", (A,))],
}


GUEST_CALLS = ("guest_share_host", "guest_unshare_host", "guest_relinquish")
VM_CALLS = ("vcpu_load", "vcpu_put", "start_teardown", "finalize_teardown", "teardown")


def moved(call: Call, n: int) -> Call:
    """The call of SITUATIONS for page and gfn ``n``."""
    name, arguments = call
    at = {"pin": (1,), "host_donate_guest": (1, 2), "host_share_guest": (1, 2)}.get(name, (0,))
    if name == "guest_share_host":
        at = (1,)
    changed = list(arguments)
    for place in at:
        changed[place] = n
    return name, tuple(changed)


def calls() -> Iterator[Call]:
    """Every operation with every kind of argument, on pages and gfns 0 and 1 and at the edges."""
    spans = [(0, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    places = [*itertools.product((0, 1, 3), (0, 1, 5)), (2, -1), (-1, 2)]
    for handle in (A, B):
        for (pfn, gfn), npages in itertools.product(places, (0, 1, 2)):
            yield "host_donate_guest", (handle, pfn, gfn, npages, False)
            yield "host_share_guest", (handle, pfn, gfn, npages, False)
            yield "host_move_guest", (handle, pfn, gfn, npages, False)
            if npages:
                yield "host_move_guest", (handle, pfn, gfn, npages, True)
                yield "host_donate_guest", (handle, pfn, gfn, npages, True)
                yield "host_share_guest", (handle, pfn, gfn, npages, True)
        for gfn, npages in [*spans, (5, 1), (5, 2), (6, 1), (-1, 1)]:
            for name in GUEST_CALLS:
                yield name, (handle, gfn, npages)
            for name, block in itertools.product(
                ("host_unshare_guest", "host_reclaim_guest"), (False, True)
            ):
                yield name, (handle, gfn, npages, block)
        for gfn in (0, 1, 2, 6, -1):
            yield "host_split_guest", (handle, gfn)
    for handle, name in itertools.product((A, B, NOBODY), VM_CALLS):
        yield name, (handle,)
    for name in GUEST_CALLS:
        yield name, (NOBODY, 0, 1)
    for name in ("host_donate_guest", "host_share_guest", "host_move_guest"):
        yield name, (NOBODY, 0, 0, 1, False)
    for name in ("host_unshare_guest", "host_reclaim_guest"):
        yield name, (NOBODY, 0, 1, False)
    yield "host_split_guest", (NOBODY, 0)
    for pfn, npages in [*spans, (3, 1), (3, 2), (4, 1), (7, 2), (8, 1), (-1, 1)]:
        for name in (
            "host_share_hyp", "host_unshare_hyp", "host_donate_hyp", "hyp_donate_host", "unpin",
        ):  # fmt: skip
            yield name, (pfn, npages)
        for who in ("host", "hyp", "guest"):
            yield "pin", (who, pfn, npages)
    yield "create_vm", (1, True)


CALLS = list(calls())


@pytest.mark.parametrize("life", LIVES)
def test_every_operation_in_every_situation(life: str) -> None:
    """Of two neighbours, so that ranges with different states are among them."""
    couples = (
        itertools.product(SITUATIONS, repeat=2)
        if life == "alive"
        else itertools.combinations_with_replacement(SITUATIONS, 2)
    )
    pairs = {
        f"{one} | {other}": [*SITUATIONS[one], *(moved(call, 1) for call in SITUATIONS[other])]
        for one, other in couples
    }
    answers: Counter[tuple[str, int]] = Counter()
    for title, script in (pairs | WHOLE).items():
        hyp, board, oracle = both()
        start: list[Call] = [("create_vm", (6, True)), *2 * [("create_vm", (6, False))]]
        for name, arguments in [*start, *script, *LIVES[life]]:
            assert ask(hyp, name, arguments) == 0, (title, name)
            assert getattr(oracle, name)(*arguments) == 0, (title, name)
        key, saved = hyp.key(), pickle.dumps(oracle)
        assert picture(hyp) == predicted(oracle)
        model, its_board = twins(hyp, board)
        for name, arguments in CALLS:
            want = getattr(oracle, name)(*arguments)
            case = f"{title}, {life}: {name}{arguments}"
            assert ask(model, name, arguments) == want, case
            answers[name, want] += 1
            if want:
                assert model.key() == key, f"{case}: refused, yet something has changed"
                continue
            assert picture(model) == predicted(oracle), case
            assert broken(model, its_board) is None, case
            assert hyp.key() == key, f"{case}: a copy is not independent"
            model, its_board = twins(hyp, board)
            oracle = pickle.loads(saved)
    if life == "alive":
        never = {name for name, _ in answers} - {name for name, got in answers if not got}
        assert never <= {"finalize_teardown", "host_reclaim_guest", "vcpu_put", "create_vm"}


# --- long runs ----------------------------------------------------------------------------------

NAMES = [
    *["host_donate_guest", "host_share_guest", "guest_share_host", "guest_unshare_host"] * 3,
    *["host_unshare_guest", "guest_relinquish", "host_reclaim_guest", "host_split_guest"] * 2,
    *["host_move_guest"] * 2,
    *["host_share_hyp", "host_unshare_hyp", "host_donate_hyp", "hyp_donate_host", "pin", "unpin"],
    "create_vm", "vcpu_load", "vcpu_put", "start_teardown", "finalize_teardown", "write", "touch",
]  # fmt: skip


def dice(rng: random.Random, name: str) -> tuple[Any, ...]:
    """Arguments that are mostly sensible."""
    handle = rng.choice((A, A, B, B, C, NOBODY))
    pfn, gfn = rng.randrange(-1, 9), rng.randrange(-1, 7)
    npages, block = rng.choice((1, 1, 1, 2, 2, 3, 0)), rng.random() < 0.25
    match name:
        case "host_donate_guest" | "host_share_guest" | "host_move_guest":
            return handle, pfn, gfn, npages, block
        case "host_unshare_guest" | "host_reclaim_guest":
            return handle, gfn, npages, block
        case "guest_share_host" | "guest_unshare_host" | "guest_relinquish":
            return handle, gfn, npages
        case "host_split_guest":
            return handle, gfn
        case "create_vm":
            return rng.choice((6, 6, 6, 0)), rng.random() < 0.5
        case "pin":
            return rng.choice(("host", "hyp")), pfn, npages
        case _ if name.startswith(("host_", "hyp_")) or name == "unpin":
            return pfn, npages
        case _:
            return (handle,)


def run(seed: int, steps: int) -> Counter[tuple[str, int]]:
    rng = random.Random(seed)
    hyp, board, oracle = both()
    answers: Counter[tuple[str, int]] = Counter()
    for step in range(steps):
        name = rng.choice(NAMES)
        if name in ("write", "touch"):
            pfn = rng.choice(list(oracle.pages))
            if name == "write":
                oracle.pages[pfn].content = board.contents[pfn] = f"written in step {step}"
            else:
                fill(board, oracle, pfn)
            continue
        arguments = dice(rng, name)
        want = getattr(oracle, name)(*arguments)
        assert ask(hyp, name, arguments) == want, f"seed {seed}, step {step}: {name}{arguments}"
        answers[name, want] += 1
        if step % 20 == 0 or step == steps - 1:
            assert picture(hyp, board) == predicted(oracle, contents=True), f"{seed}: step {step}"
        if step % 200 == 0:
            assert broken(hyp, board) is None, f"seed {seed}, step {step}"
    return answers


def fill(board: Board, oracle: Predictor, pfn: int) -> None:
    """CPUs of all who may reach a page do."""
    if oracle.pages[pfn].host != 3:
        board.host.add(pfn)
    for handle, guest in oracle.guests.items():
        board.guests |= {
            (handle, gfn, pfn)
            for gfn, slot in enumerate(guest.slots)
            if slot is not None and slot.pfn == pfn
        }


def test_100_000_random_steps() -> None:
    answers: Counter[tuple[str, int]] = Counter()
    for seed in range(10):
        answers += run(seed, 10_000)
    done = {name for name, number in answers if number == 0}
    assert done == set(NAMES) - {"write", "touch"}
    print(f"{sum(answers.values()):,} calls, {len(answers)} kinds of answers")
