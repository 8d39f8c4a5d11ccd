# SPDX-License-Identifier: GPL-2.0-or-later
"""What people see of a mount, from the cores alone."""

from __future__ import annotations

from privfs import views
from privfs.operation import Fallocate, Resize
from privfs.personality import PAGE_SIZE, PERSONALITIES
from privfs.service import Service

INO = 7
KEEP_SIZE = 1


def served(personality: str, *requests: Fallocate | Resize) -> Service:
    """A service with one file on which the requests were made."""
    service = Service(PERSONALITIES[personality], 1 << 10)
    service.owner.create(INO)
    for request in requests:
        outcome = service.begin(INO, request).outcome
        assert outcome is not None
        assert outcome.errno == 0
    return service


def pages(service: Service) -> list[tuple[int, int, str]]:
    found = views.file_map(service.owner, INO)
    assert found["next"] is None
    return [(r["start"] // PAGE_SIZE, r["end"] // PAGE_SIZE, r["state"]) for r in found["rows"]]


def keep(start: int, end: int) -> Fallocate:
    return Fallocate(KEEP_SIZE, start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def test_an_empty_file_has_nothing_to_show() -> None:
    service = served("resizable")
    assert pages(service) == []
    found = views.file_stat(service.owner, INO)
    assert (found["size"], found["allocated"], found["mapped"], found["extents"]) == (0, 0, 0, 0)
    assert (found["users"], found["mapped_by"]) == ([], [])
    assert (found["seals"], found["purpose"]) == ([], ["USER_INACCESSIBLE"])


def test_a_map_covers_the_file() -> None:
    service = served("resizable", Resize(8 * PAGE_SIZE), keep(2, 4), keep(5, 8))
    assert pages(service) == [
        (0, 2, "hole"), (2, 4, "allocated"), (4, 5, "hole"), (5, 8, "allocated"),
    ]  # fmt: skip


def test_a_map_shows_what_is_allocated_past_the_end() -> None:
    """Else its total would not be that of stat."""
    service = served("v7", keep(2, 4), keep(6, 7))
    assert pages(service) == [(2, 4, "allocated"), (6, 7, "allocated")]
    service = served("v7", Resize(4 * PAGE_SIZE), keep(1, 2), keep(6, 7))
    assert pages(service) == [
        (0, 1, "hole"), (1, 2, "allocated"), (2, 4, "hole"), (6, 7, "allocated"),
    ]  # fmt: skip
    assert views.file_stat(service.owner, INO)["allocated"] == 2 * PAGE_SIZE
