# SPDX-License-Identifier: GPL-2.0-or-later
"""Options in QEMU's manner become what ``kvmsim boot`` takes, or an error that names the known."""

from __future__ import annotations

import pytest

from kvmsim import kind
from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.main import call
from kvmsim.qemuoptions import GUESTS, Options, parse_options
from kvmsim.scriptvalues import DISCARDS, KINDS, Memory, ScriptError
from kvmsim.vmm.bootparams import Technology
from kvmsim.vmm.convert import Discard

RAM = "memory-backend-memfd-private,id=ram0,size=1G,mem-path=/m/ram"


def test_a_command_line_of_the_series() -> None:
    found = parse_options(
        [f"{RAM},prealloc=on,share=on", "shared-bit-guest,id=cgs0,discard=shared"],
        "q35,memory-backend=ram0,confidential-guest-support=cgs0",
    )
    memory = (Memory("/m/ram", 0, 1 << 30, prealloc=True),)
    assert found == Options(memory, "shared", "shared-bit")


@pytest.mark.parametrize(("guest", "kind"), GUESTS.items())
def test_a_guest_object_says_the_kind(guest: str, kind: str) -> None:
    found = parse_options([f"{guest},id=c"], "q35,confidential-guest-support=c")
    assert found == Options(kind=kind)
    assert Technology[kind.upper().replace("-", "_")].kind == kind


def test_what_may_be_left_out() -> None:
    assert parse_options([], None) == Options()
    assert parse_options([], "q35") == Options()
    found = parse_options([f"{RAM},offset=2M"], "type=q35,memory-backend=ram0")
    assert found == Options((Memory("/m/ram", 2 << 20, 1 << 30),))
    found = parse_options([RAM, "shared-bit-guest,id=c"],
                          "memory-backend=ram0,confidential-guest-support=c")  # fmt: skip
    assert found.discard is None


def test_two_commas_are_one() -> None:
    found = parse_options([RAM.replace("/m/ram", "/m/a,,b,,,,c")], "q35,memory-backend=ram0")
    assert found.memory[0].path == "/m/a,b,,c"


def test_discards_are_the_vmm_s() -> None:
    assert list(DISCARDS) == [discard.value for discard in Discard]


def test_kinds_are_those_that_a_guest_can_be_booted_as() -> None:
    assert list(KINDS) == [technology.kind for technology in Technology]
    assert set(KINDS) <= set(kind.KINDS)


@pytest.mark.parametrize(
    ("objects", "machine", "why"),
    [
        (["memory-backend-ram,id=a,size=1G"], None, "no object 'memory-backend-ram'; there are m"),
        ([f"{RAM},hugetlb=on"], None, "no option 'hugetlb=on'; there are id, size, mem-path, "),
        ([f"{RAM},prealloc"], None, "no option 'prealloc'; there are"),
        ([f"{RAM},size=2G"], None, "size is given twice"),
        ([RAM.replace("id=ram0,", "")], None, "id= is missing"),
        ([RAM.replace("size=1G,", "")], None, "size= is missing"),
        ([RAM.replace("=/m/ram", "=")], None, "mem-path= is missing"),
        ([RAM.replace("1G", "much")], None, "'much' is no size"),
        ([f"{RAM},prealloc=yes"], None, "'yes' is neither on nor off"),
        ([f"{RAM},share=off"], None, "share=off cannot be"),
        ([RAM, RAM], "memory-backend=ram0", "there is an object ram0 already"),
        ([RAM], None, "ram0 is not used: write -machine q35,memory-backend=ram0"),
        ([RAM], "q35,memory-backend=ram1", "no memory-backend-memfd-private of that id; there is"),
        (["shared-bit-guest,id=c"], "q35,memory-backend=c", "of that id; there is none"),
        (["shared-bit-guest,id=c,discard=all"], None, "discard=all: one of none, private, shared"),
        ([RAM], "pc,memory-backend=ram0", "no machine 'pc'; there are q35"),
        ([RAM], "q35,accel=kvm", "no option 'accel=kvm'; there are type, memory-backend, conf"),
        ([RAM], "", "no option|no machine"),
    ],
)  # fmt: skip
def test_what_is_refused(objects: list[str], machine: str | None, why: str) -> None:
    with pytest.raises(ScriptError, match=why):
        parse_options(objects, machine)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["-object", "x,id=a"], "no object 'x'"),
        (["-machine", "pc"], "no machine 'pc'"),
        (["-machine", "q35"], "Missing option '--memory'"),
        (["-object", f"{RAM},prealloc=on", "-object", "shared-bit-guest,id=c,discard=none",
          "-machine", "q35,memory-backend=ram0,confidential-guest-support=c", "--discard", "both"],
         "--discard and the discard of -object"),
        (["-object", "tdx-guest,id=c", "-machine", "q35,confidential-guest-support=c",
          "--kind", "tdx"], "--kind and the kind of -object"),
    ],
)  # fmt: skip
def test_wrong_usage(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["boot", *arguments]) == Exit.USAGE
    assert why in capsys.readouterr().err


def test_the_memory_is_looked_at_as_that_of_memory_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["boot", "-object", RAM, "-machine", "q35,memory-backend=ram0"]) == Exit.MEMORY
    assert "/m/ram: No such file or directory" in capsys.readouterr().err
