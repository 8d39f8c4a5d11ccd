# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/measure knows by itself what is loaded where, and how the manuals measure it."""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kvmsim.vmm.bootparams import BootFlag, RamRange, Technology
from kvmsim.vmm.elf import parse_elf
from kvmsim.vmm.launch import LaunchPage, PageType
from kvmsim.vmm.loader import boot_params, plan

pytest_plugins = ["guest_fixtures"]

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure"
MIB = 1 << 20
#: SNP firmware ABI, PAGE_TYPE.
NUMBERS = {PageType.NORMAL: 1, PageType.VMSA: 2, PageType.ZERO: 3, PageType.UNMEASURED: 4,
           PageType.SECRETS: 5, PageType.CPUID: 6}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("measure_script", str(SCRIPT))
    spec = importlib.util.spec_from_loader("measure_script", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure_script"] = module
    loader.exec_module(module)
    return module


@pytest.fixture
def kernel(image: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "kernel.elf"
    path.write_bytes(image)
    return path


def run(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", SCRIPT, *map(str, arguments)], capture_output=True, text=True,
        timeout=60, check=False, input=text,
    )  # fmt: skip


def report(data: bytes, step: int = 32) -> str:
    lines = [f"report {at:#x}: {data[at : at + step].hex()}" for at in range(0, len(data), step)]
    return "> " + "\n".join([*lines, f"ok report bytes={len(data)}"])


def test_it_stands_alone() -> None:
    imports = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import)
                     else [node.module or ""])
    }  # fmt: skip
    assert imports <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("kind", ["tdx", "snp"])
@pytest.mark.parametrize(
    ("memory", "vcpus", "flags", "payload"),
    [
        ((32,), 1, BootFlag.NONE, ()),
        ((32,), 2, BootFlag.EAGER, ((16 * MIB, b"p" * 5000),)),
        ((64, 2, 8), 16, BootFlag.EAGER | BootFlag.SELFTEST,
         ((16 * MIB, b"p"), (16 * MIB + 4096, b"q" * 4096), (68 * MIB, bytes(8192)))),
    ],
)  # fmt: skip
def test_its_pages_are_those_that_are_loaded(
    kind: str, memory: tuple[int, ...], vcpus: int, flags: BootFlag,
    payload: tuple[tuple[int, bytes], ...], image: bytes, script: ModuleType,
) -> None:  # fmt: skip
    ram, gpa = [], 0
    for size in memory:
        ram.append(RamRange(gpa, size * MIB))
        gpa += size * MIB
    technology = Technology[kind.upper()]
    loaded = plan(parse_elf(image), boot_params(technology, tuple(ram), vcpus, flags), payload)
    sizes = tuple(size * MIB for size in memory)
    ours = script.launch_pages(script.Guest(kind, sizes, vcpus, int(flags), image, payload))
    assert [(p.gpa, p.data) for p in ours] == [(p.gpa, p.data) for p in loaded.pages]
    if kind == "snp":
        assert [p.type for p in ours] == [NUMBERS[p.type] for p in loaded.pages]
    assert script.MEASURE[kind](ours) == by_the_book(kind, loaded.pages)


def by_the_book(kind: str, pages: tuple[LaunchPage, ...]) -> bytes:
    """The same rules, told once more and otherwise: whole buffers, offsets instead of fields."""
    if kind == "tdx":
        whole = bytearray()
        for page in pages:
            whole += b"MEM.PAGE.ADD\0\0\0\0" + page.gpa.to_bytes(8, "little") + bytes(104)
            for at in range(0, 4096, 256):
                head = bytearray(128)
                head[:9] = b"MR.EXTEND"
                head[16:24] = (page.gpa + at).to_bytes(8, "little")
                whole += head + page.data[at : at + 256]
        return hashlib.sha384(whole).digest()
    digest = bytes(48)
    for page in pages:
        info = bytearray(0x70)
        info[:48] = digest
        if page.type in (PageType.NORMAL, PageType.VMSA):
            info[0x30:0x60] = hashlib.sha384(page.data).digest()
        info[0x60], info[0x62] = 0x70, NUMBERS[page.type]
        info[0x68:0x70] = page.gpa.to_bytes(8, "little")
        digest = hashlib.sha384(info).digest()
    return digest


@pytest.mark.parametrize(("kind", "size", "offset"), [("tdx", 1024, 0x210), ("snp", 1184, 0x90)])
def test_a_report_is_compared(kind: str, size: int, offset: int, kernel: Path) -> None:
    options = ("--kind", kind, "--memory", "32M", "--kernel", kernel, "--vcpus", 1)
    found = json.loads(run(*options, "--json").stdout)
    said = bytearray(b"\xaa" * size)
    said[offset : offset + 48] = bytes.fromhex(found["measurement"])
    done = run(*options, "--report", "-", text=report(bytes(said)))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("the report says the same\n")
    older = report(bytes(size))
    done = run(*options, "--report", "-", "--json", text=older + "\n" + report(bytes(said)))
    assert done.returncode == 0
    assert json.loads(done.stdout)["same"] is True
    done = run(*options, "--report", "-", text=report(bytes(said)) + "\n" + older)
    assert done.returncode == 1
    assert f"the report says {'00' * 48}" in done.stdout
    done = run(*options, "--report", "-", text="ok report kind=none bytes=0")
    assert done.returncode == 2
    assert done.stderr == f"measure: no {kind} report of {size} bytes there, but 0 bytes\n"


def test_what_changes_the_measurement(kernel: Path, tmp_path: Path) -> None:
    file = tmp_path / "payload"
    file.write_bytes(b"x")
    base = ("--kind", "snp", "--memory", "32M", "--kernel", kernel)
    several = [
        (), ("--eager",), ("--selftest",), ("--vcpus", 3), ("--memory", "2M"),
        ("--payload", f"{file}@0x1000000"), ("--payload", f"{file}@0x1001000"),
    ]  # fmt: skip
    found = {json.loads(run(*base, *more, "--json").stdout)["measurement"] for more in several}
    assert len(found) == len(several)


def test_the_pages_are_listed(kernel: Path, image: bytes) -> None:
    done = run("--kind", "snp", "--memory", "32M", "--kernel", kernel, "--vcpus", 1, "--list")
    *pages, last = done.stdout.splitlines()
    assert re.match(rf"MEASUREMENT of {len(pages)} pages: [0-9a-f]{{96}}$", last)
    assert re.match(r"0x000000007000 type 1 sha384 [0-9a-f]{96}$", pages[0])
    assert re.match(r"0xfffffffff000 type 2 sha384 [0-9a-f]{96}$", pages[-1])


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    done = run("--kind", "tdx", "--memory", "32M", "--kernel", tmp_path / "none")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No such file" in done.stderr
    other = tmp_path / "other"
    other.write_bytes(b"#!")
    done = run("--kind", "tdx", "--memory", "32M", "--kernel", other)
    assert done.stderr == "measure: the kernel is no 64-bit little-endian ELF file\n"
    assert "is no size" in run("--kind", "tdx", "--memory", "much").stderr
    assert "write FILE@GPA" in run("--kind", "tdx", "--memory", "2M", "--payload", "x").stderr
