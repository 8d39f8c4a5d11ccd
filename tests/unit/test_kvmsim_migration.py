# SPDX-License-Identifier: GPL-2.0-or-later
"""Which addresses became which: pieces that leave, come back in other cuts, or do not."""

from __future__ import annotations

from kvmsim.migration import MOVABLE, UNMOVABLE, Migration, Migrations
from kvmsim.uapi import PAGE_SIZE
from privfs.seals import ALL_PURPOSES, Purpose

FILE, OTHER = 7, 8


def at(page: int) -> int:
    return page * PAGE_SIZE


def test_the_flags_are_those_of_the_owner() -> None:
    assert UNMOVABLE == ALL_PURPOSES
    assert MOVABLE == ALL_PURPOSES & ~Purpose.UNMOVABLE


def test_a_piece_that_comes_back_tells_both_addresses_once() -> None:
    moves = Migrations()
    moves.left(FILE, 0, 16, at(1000))
    assert list(moves.arrived(OTHER, 0, 16, at(2000))) == []
    assert list(moves.arrived(FILE, 0, 16, at(2000))) == [
        Migration(FILE, 0, 16, at(1000), at(2000))
    ]
    assert list(moves.arrived(FILE, 0, 16, at(3000))) == []


def test_pieces_are_cut_where_either_side_is() -> None:
    moves = Migrations()
    moves.left(FILE, 0, 8, at(100))
    moves.left(FILE, 8, 16, at(300))
    assert list(moves.arrived(FILE, 4, 12, at(500))) == [
        Migration(FILE, 4, 8, at(104), at(500)),
        Migration(FILE, 8, 12, at(300), at(504)),
    ]
    assert list(moves.arrived(FILE, 0, 16, at(700))) == [
        Migration(FILE, 0, 4, at(100), at(700)),
        Migration(FILE, 12, 16, at(304), at(712)),
    ]


def test_what_is_given_back_meanwhile_has_not_moved() -> None:
    moves = Migrations()
    moves.left(FILE, 0, 16, at(100))
    assert moves.freed(FILE, 4, 6) == ((at(104), at(2)),)
    assert moves.freed(FILE, 4, 6) == moves.freed(OTHER, 0, 16) == ()
    assert list(moves.arrived(FILE, 0, 16, at(500))) == [
        Migration(FILE, 0, 4, at(100), at(500)),
        Migration(FILE, 6, 16, at(106), at(506)),
    ]
    moves.left(FILE, 0, 16, at(100))
    moves.left(FILE, 20, 24, at(200))
    assert moves.freed(FILE, 14, 21) == ((at(114), at(2)), (at(200), at(1)))
    assert moves.forget(FILE) == ((at(100), at(14)), (at(201), at(3)))
    assert moves.forget(FILE) == ()
    assert list(moves.arrived(FILE, 0, 16, at(500))) == []


def test_a_piece_that_leaves_again_left_from_where_it_was_last() -> None:
    moves = Migrations()
    moves.left(FILE, 0, 4, at(100))
    moves.left(FILE, 2, 6, at(200))
    assert list(moves.arrived(FILE, 0, 6, at(500))) == [
        Migration(FILE, 0, 2, at(100), at(500)),
        Migration(FILE, 2, 6, at(200), at(502)),
    ]
