# SPDX-License-Identifier: GPL-2.0-or-later
"""A view that another thread can get past while it sleeps."""

from __future__ import annotations

import ctypes
import os
import threading

import numpy as np
import pytest

from hwemu.careful import CarefulView
from kvmsim.fence.userfault import Userfault
from kvmsim.hostmem import HostMemory

PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def pair() -> tuple[CarefulView, memoryview]:
    """The same 64 words, carefully and not."""
    storage = (ctypes.c_uint64 * 64)(*range(1 << 63, (1 << 63) + 64))
    plain = memoryview(storage).cast("B").cast("Q")
    view = CarefulView(ctypes.addressof(storage), 64)
    view.storage = storage  # type: ignore[attr-defined]
    return view, plain


def test_it_reads_as_a_memoryview_does(pair: tuple[CarefulView, memoryview]) -> None:
    view, plain = pair
    assert len(view) == len(plain)
    assert [view[at] for at in range(64)] == list(plain)
    for part in (slice(0, 64), slice(3, 9), slice(5, 5), slice(60, 99), slice(9, 3)):
        assert np.frombuffer(view[part], dtype=np.uint64).tolist() == list(plain[part])
        assert bytes(view.cast("B")[part]) == bytes(plain.cast("B")[part])
    assert view.cast("B")[7] == plain.cast("B")[7]
    assert len(view.cast("B").cast("Q")) == 64


def test_it_writes_as_a_memoryview_does(pair: tuple[CarefulView, memoryview]) -> None:
    view, plain = pair
    view[0] = (1 << 64) - 1
    view[63] = 7
    view.cast("B")[8] = 0xA5
    view.cast("B")[20:25] = b"hello"
    assert (plain[0], plain[63]) == ((1 << 64) - 1, 7)
    assert plain.cast("B")[8] == 0xA5
    assert plain.cast("B")[20:25] == b"hello"
    view.release()


def test_it_has_bounds(pair: tuple[CarefulView, memoryview]) -> None:
    view, plain = pair
    before = list(plain)
    for at in (-1, 64):
        with pytest.raises(IndexError):
            view[at]
        with pytest.raises(IndexError):
            view[at] = 1
    with pytest.raises(ValueError, match="4 bytes do not fit in a slice of 3"):
        view.cast("B")[1:4] = b"four"
    with pytest.raises(ValueError, match="step 2"):
        view[0:8:2]
    assert list(plain) == before


def test_who_sleeps_in_it_keeps_nobody_from_waking_it() -> None:
    try:
        Userfault().close()
    except OSError as error:
        pytest.skip(f"no fence: {error.strerror}")
    host = HostMemory("uffd")
    memfd = os.memfd_create("extent", os.MFD_CLOEXEC)
    os.ftruncate(memfd, PAGE)
    told = threading.Event()
    hpa = host.place_private(memfd, 0, PAGE, lambda why: told.set(), writable=True)
    words = host.arena.words()
    assert words[(hpa - host.arena.hpa_base) // 8] == 0  # the keeper, a thread, has seen to it
    assert told.wait(20)
    assert os.fstat(memfd).st_blocks == 0
    host.close()
    os.close(memfd)
