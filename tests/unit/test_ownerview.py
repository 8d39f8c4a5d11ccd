# SPDX-License-Identifier: GPL-2.0-or-later
"""What an owner says of a file, and what becomes of an owner that says nothing."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmsim import ownerview
from kvmsim.ownerview import OwnerView
from privfs.notifier.lane import LinkError

P = 4096


class Owner:
    """The other end, which answers when the test says so."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with monkeypatch.context() as there:
            there.chdir(folder)
            self._listener.bind("control")
        self._listener.listen(1)
        self.view = OwnerView(os.fspath(folder / "socket"))
        self.sock, _ = self._listener.accept()

    def answer(self, *replies: dict[str, Any]) -> None:
        for reply in replies:
            self.sock.sendall(json.dumps(reply).encode() + b"\n")

    def asked(self) -> list[dict[str, Any]]:
        self.sock.setblocking(False)
        return [json.loads(line) for line in self.sock.recv(65536).splitlines()]

    def close(self) -> None:
        self.view.close()
        self.sock.close()
        self._listener.close()


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Owner]:
    made = Owner(tmp_path, monkeypatch)
    yield made
    made.close()


def row(start: int, end: int, state: str) -> dict[str, Any]:
    return {"start": start * P, "end": end * P, "state": state, "users": []}


def test_runs_of_a_map_in_parts_are_joined_and_clipped(owner: Owner) -> None:
    first = [row(2, 4, "allocated"), row(4, 6, "mapped"), row(6, 7, "hole"), row(7, 9, "mapped")]
    owner.answer(
        {"ok": {"size": 20 * P, "rows": first, "next": 9}},
        {"ok": {"size": 20 * P, "rows": [row(9, 20, "allocated")], "next": None}},
    )
    assert owner.view.runs(7, 3, 12) == ((3, 6), (7, 12))
    assert owner.asked() == [
        {"ask": "map", "ino": 7, "start": 3}, {"ask": "map", "ino": 7, "start": 9},
    ]  # fmt: skip


def test_what_lies_behind_the_end_is_not_asked_for(owner: Owner) -> None:
    owner.answer({"ok": {"size": 20 * P, "rows": [row(0, 9, "hole")], "next": 9}})
    assert owner.view.runs(7, 0, 9) == ()
    owner.answer({"ok": {"users": ["a(1)", "b(2)"]}})
    assert owner.view.users(7) == ("a(1)", "b(2)")


def test_who_has_a_file_exclusively(owner: Owner) -> None:
    owner.answer({"ok": {"exclusive": "td(1)"}}, {"ok": {"exclusive": None}}, {"ok": {}})
    assert [owner.view.exclusive(7) for _ in range(3)] == ["td(1)", None, None]


def test_a_refusal_is_told(owner: Owner) -> None:
    owner.answer({"errno": errno.ENOENT, "error": "inode 7 is no private file of this mount"})
    with pytest.raises(LinkError, match="inode 7 is no private file") as caught:
        owner.view.users(7)
    assert caught.value.errno == errno.ENOENT


def test_an_answer_that_comes_too_late_is_not_the_next_one_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownerview, "_TIMEOUT", 0.01)
    owner = Owner(tmp_path, monkeypatch)
    try:
        for _ in range(2):
            with pytest.raises(LinkError, match="no answer"):
                owner.view.users(7)
        owner.answer({"ok": {"users": ["late"]}}, {"ok": {"users": ["later"]}})
        owner.answer({"ok": {"users": ["now"]}})
        assert owner.view.users(7) == ("now",)
    finally:
        owner.close()


def test_an_owner_that_ends_is_not_asked_for_ever(owner: Owner) -> None:
    owner.sock.close()
    with pytest.raises(LinkError, match="no answer"):
        owner.view.users(7)


def test_without_a_control_socket_only_questions_fail(tmp_path: Path) -> None:
    view = OwnerView(os.fspath(tmp_path / "socket"))
    with pytest.raises(LinkError, match="cannot reach the owner"):
        view.users(7)
    view.close()
