# SPDX-License-Identifier: GPL-2.0-or-later
"""The session language: what every line means, and what a wrong one is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsim.script import (
    GRAMMAR,
    WITHIN,
    Expect,
    Holds,
    Host,
    Memory,
    Output,
    Payload,
    Poison,
    Say,
    ScriptError,
    Send,
    Stop,
    Vm,
    Wait,
    parse,
    parse_memory,
    parse_payload,
    parse_size,
    table,
)

UP = "vm a memory=ram\n"


def only(text: str, **variables: str) -> object:
    """Return the last statement's action."""
    return parse(text, variables)[-1].action


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("0x1000", 4096), ("4K", 4096), ("64m", 64 << 20), ("2G", 2 << 30),
     ("1T", 1 << 40)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "+1", "1.5G", "4KB", "0x", "1_0G ", "ten"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ScriptError, match="is no size"):
        parse_size(text)


def test_memory() -> None:
    assert parse_memory("m/ram") == Memory("m/ram")
    whole = parse_memory("m/ram,slots=3,size=1M,offset=4K")
    assert whole == Memory("m/ram", offset=4096, size=1 << 20, slots=3)
    assert parse_memory("with,comma") == Memory("with,comma")


@pytest.mark.parametrize(
    ("text", "why"),
    [("ram,slot=2", "no option slot"), ("ram,size=1,size=2", "twice"), (",size=1M", "no file"),
     ("ram,size=big", "no size"), ("", "no file")],
)  # fmt: skip
def test_what_is_no_memory(text: str, why: str) -> None:
    with pytest.raises(ScriptError, match=why):
        parse_memory(text)


PATHS = st.text("abc/. ,-", min_size=1).filter(lambda path: "=" not in path)
NUMBERS = st.integers(0, 1 << 44)


@given(PATHS, NUMBERS, NUMBERS, st.integers(1, 64))
def test_memory_reads_what_it_would_write(path: str, offset: int, size: int, slots: int) -> None:
    text = f"{path},offset={offset},size={size:#x},slots={slots}"
    assert parse_memory(text) == Memory(path, offset, size, slots)


# --- statements --------------------------------------------------------------------------------


def test_a_vm_with_everything() -> None:
    text = 'vm a memory="$DIR/ram,slots=1" memory=b vcpus=4 kernel=k.elf discard=none selftest'
    assert only(text, DIR="/my dir") == Vm(
        "a", (Memory("/my dir/ram", slots=1), Memory("b")), 4, "k.elf", "none", selftest=True
    )


def test_a_vm_of_a_kind_with_a_disk() -> None:
    text = "vm a memory=b kind=sw-protected encrypt=backing disk=$DIR/d eager"
    assert only(text, DIR="/x") == Vm(
        "a", (Memory("b"),), kind="sw-protected", disk="/x/d", eager=True, encrypt="backing"
    )


def test_a_vm_with_nothing_but_memory() -> None:
    assert only(UP) == Vm("a", (Memory("ram"),))


def test_the_only_vm_needs_no_name() -> None:
    assert only(UP + "send peek 0x1000") == Send("a", "peek 0x1000")
    assert only(UP + "send a peek 0x1000") == Send("a", "peek 0x1000")
    expected = only(UP + "expect ^ok .*=1$ within 2.5")
    assert isinstance(expected, Expect)
    assert (expected.vm, expected.regex.pattern, expected.within) == ("a", "^ok .*=1$", 2.5)


def test_expect_takes_ten_seconds_if_it_does_not_say() -> None:
    expected = only(UP + "expect a ok within reason")
    assert isinstance(expected, Expect)
    assert (expected.regex.pattern, expected.within) == ("ok within reason", WITHIN)


def test_variables() -> None:
    assert only("say $A and ${A}b, 5$ and $1", A="x") == Say("x and xb, 5$ and $1")
    expected = only(UP + "expect $PATH$", PATH="a.b")
    assert isinstance(expected, Expect)
    assert expected.regex.search("a.b")
    assert not expected.regex.search("acb")
    assert only("host echo $NOT_OURS") == Host("echo $NOT_OURS")


def test_host_commands() -> None:
    assert only("host  a | b") == Host("a | b")
    assert only("fails cat x") == Host("cat x", fails=True)
    printed = only("host x\noutput ^a.*b$")
    assert isinstance(printed, Output)
    assert printed.regex.search("first\na--b\nlast")


def test_memory_that_is_allocated_before_the_vm_is_there() -> None:
    assert parse_memory("ram,prealloc=on,size=4K") == Memory("ram", 0, 4096, 2, prealloc=True)
    assert parse_memory("ram,prealloc=off") == Memory("ram")
    for text, why in (
        ("ram,prealloc=yes", "'yes' is neither on nor off"),
        ("ram,prealloc=off,prealloc=off", "prealloc is given twice"),
    ):
        with pytest.raises(ScriptError, match=why):
            parse_memory(text)


def test_payload() -> None:
    assert parse_payload("a@b@8M") == Payload("a@b", 8 << 20)
    made = only("vm a memory=ram payload=x@0x800000 payload=$F@9M", F="y")
    assert made == Vm("a", (Memory("ram"),), payload=(Payload("x", 8 << 20), Payload("y", 9 << 20)))
    for text in ("x", "@8M", "x@"):
        with pytest.raises(ScriptError):
            parse_payload(text)


def test_what_a_vm_holds() -> None:
    assert only(UP + "holds a both=0 private=2M") == Holds("a", (("both", 0), ("private", 2 << 20)))
    assert only(UP + "holds stale=$N", N="4K") == Holds("a", (("stale", 4096),))
    for rest in ("", "both", "both=0 both=0", "total=0", "both=x"):
        with pytest.raises(ScriptError):
            parse(UP + f"holds {rest}", {})


def test_memory_that_fails() -> None:
    assert only(UP + "poison a 0x800000") == Poison("a", 0x80_0000)
    assert only(UP + "poison 8M") == Poison("a", 8 << 20)


def test_the_end_of_a_vm() -> None:
    assert only(UP + "stop a") == Stop("a")
    assert only(UP + "wait a") == Wait("a", 0, WITHIN)
    assert only(UP + "wait a status 123 within 3") == Wait("a", 123, 3)
    assert only(UP + "wait a\nvm a memory=b") == Vm("a", (Memory("b"),))


def test_comments_blank_lines_and_numbers() -> None:
    found = parse("# one\n\n  say two  \n\t# three\nsay four", {})
    assert [(s.line, s.action) for s in found] == [(3, Say("two")), (5, Say("four"))]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("sent x", "no statement 'sent'; there are vm, send"),
        ("vm", "a VM's name"),
        ("vm 1a memory=x", "a VM's name"),
        ("vm a", "needs memory=FILE"),
        ("vm a memory=", "memory="),
        ("vm a memory=x vcpus=0", "1 to 16"),
        ("vm a memory=x vcpus=17", "1 to 16"),
        ("vm a memory=x vcpus=two", "1 to 16"),
        ("vm a memory=x vcpus=1 vcpus=2", "twice"),
        ("vm a memory=x cpus=1", "not known"),
        ("vm a memory=x selftest=yes", "selftest"),
        ("vm a memory=x vcpus", "vcpus"),
        ("vm a memory=x discard=all", "one of none, private"),
        ("vm a memory=x kind=sev", "one of shared-bit, sw-protected, tdx, snp, pkvm"),
        ("vm a memory=x kind=", "kind="),
        ("vm a memory=x disk=", "disk="),
        ("vm a memory=x eager=yes", "eager"),
        ("vm a memory=x encrypt=yes", "encrypt=yes: one of view, backing, none"),
        ("vm a memory='x", "quotation"),
        (UP + "vm a memory=y", "up already"),
        ("send hello", "no VM is up"),
        (UP + "vm b memory=y\nsend hello", "which VM"),
        (UP + "expect", "regular expression must follow"),
        (UP + "expect (", "no regular expression"),
        (UP + "stop b", "no VM 'b' at this line; there is a"),
        (UP + "stop a\nwait a", "no VM 'a'"),
        (UP + "wait a status soon", "write wait VM"),
        (UP + "wait a b", "write wait VM"),
        ("output x", "none before"),
        ("host", "a command must follow"),
        ("fails", "a command must follow"),
        ("say $WHO", "no variable WHO; give it with --var WHO=VALUE"),
        ("vm a memory=$WHERE", "no variable WHERE"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, why: str) -> None:
    with pytest.raises(ScriptError) as caught:
        parse(text, {})
    assert why in str(caught.value)
    assert str(caught.value).startswith(f"{text.count(chr(10)) + 1}: ")


@given(st.text())
def test_any_text_is_understood_or_refused(text: str) -> None:
    error = None
    try:
        parse(text, {})
    except ScriptError as caught:
        error = caught
    assert error is None or str(error).split(":")[0].isdecimal()


def test_the_table_has_every_statement() -> None:
    assert len(table().splitlines()) == len(GRAMMAR) + 2
    assert set(GRAMMAR) == {row.split()[1].strip("`") for row in table().splitlines()[2:]}
