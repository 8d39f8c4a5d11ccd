# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfs.cli import options
from privfs.cli.exitcodes import Exit
from privfs.cli.failure import Failure
from privfs.cli.options import OPTIONS, Wishes, parse, parse_size
from privfs.personality import PERSONALITIES


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("1", 4096),
        ("4097", 8192),
        ("1k", 4096),
        ("8K", 8192),
        ("3M", 3 << 20),
        ("2g", 2 << 30),
        ("16T", 16 << 40),
        ("50%", 500 * 4096),
        ("100%", 1000 * 4096),
        ("200%", 2000 * 4096),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, memory=1000 * 4096) == size


@pytest.mark.parametrize(
    "text", ["", "0", "0%", "-1", "1.5G", "G", "1X", "1GG", "%", "5%%", " 1", "1_0", "٣", "0x10"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


def test_each_option_sets_its_field() -> None:
    wishes = parse([
        "personality=guest_memfd,size=1G", "mode=1770,t_ack=0.5,allow_other", "direct_io,fsname=x y"
    ])  # fmt: skip
    assert wishes == Wishes("guest_memfd", 1 << 30, 0o1770, 0.5, True, True, "x y")


def test_the_last_of_an_option_counts() -> None:
    assert parse(["size=1M,size=2M"], Wishes(size=3 << 20)).size == 2 << 20


def test_what_mount_8_passes_changes_nothing() -> None:
    passed = "rw,dev,suid,exec,nodev,nosuid,noexec,user,users,noauto,defaults,_netdev,nofail"
    assert parse([passed, "x-systemd.automount,x-gvfs-show,comment=x,,"]) == Wishes()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ro", "no read-only mount"),
        ("remount", "mount it again"),
        ("sise=1G", "unknown mount option 'sise=1G'"),
        ("size", "write size=BYTES"),
        ("size=", "write size=BYTES"),
        ("size=lots", "with K, M, G or T"),
        ("direct_io=1", "write direct_io"),
        ("personality=v8", "|".join(PERSONALITIES)),
        ("mode=888", "mode=OCTAL"),
        ("mode=17777", "mode=OCTAL"),
        ("t_ack=-1", "t_ack=SECONDS"),
        ("t_ack=nan", "t_ack=SECONDS"),
        ("t_ack=inf", "t_ack=SECONDS"),
        ("quota=0", "quota=BYTES"),
        ("fsname=", "fsname=NAME"),
    ],
)
def test_errors_say_what_to_write(text: str, words: str) -> None:
    with pytest.raises(Failure) as caught:
        parse(["rw", text])
    assert caught.value.code == Exit.USAGE
    assert words in str(caught.value)
    assert text.partition("=")[0] in str(caught.value)


WISHES = st.builds(
    Wishes,
    personality=st.sampled_from(sorted(PERSONALITIES)),
    size=st.integers(0, 1 << 30).map(lambda pages: pages * 4096),
    mode=st.integers(0, 0o7777),
    t_ack=st.none() | st.floats(0, 1e6),
    allow_other=st.booleans(),
    direct_io=st.booleans(),
    fsname=st.text("abc xyz/#:äß", min_size=1),
    quota=st.integers(0, 1 << 30).map(lambda pages: pages * 4096),
)


@given(WISHES)
def test_wishes_survive_being_written_out(wishes: Wishes) -> None:
    assert parse([wishes.text()]) == wishes


def test_defaults_need_no_text() -> None:
    assert Wishes().text() == ""


def test_every_option_is_in_the_help() -> None:
    text = options.help_text()
    for name in OPTIONS:
        assert name in text
    assert set(OPTIONS) == set(Wishes.__slots__)


def test_names_do_not_collide() -> None:
    assert not set(OPTIONS) & options.IGNORED
