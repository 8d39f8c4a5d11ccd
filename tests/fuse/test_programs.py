# SPDX-License-Identifier: GPL-2.0-or-later
"""What ordinary programs say of private files: the tables of docs/everyday.md, run line by line."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mounts import Mounted, start

pytestmark = pytest.mark.fuse

PAGE = Path(__file__).parents[2] / "docs" / "everyday.md"
_TABLE = re.compile(r"<!-- programs: (.*?) -->\n(.*?)<!-- end -->", re.S)
_ROW = re.compile(r"^\| `(.+)` \| (\d+) \|(.*)\|$")
#: Words at the place of a command; the shell's own need not be looked for.
_COMMANDS = (
    re.compile(r"(?:^|[;{(&] ?)([a-z/][\w./-]+)(?= |$)"),
    re.compile(r"(?:timeout \S+|trace=\S+) (\S+)"),
)
_SHELL = frozenset({"exec", "exit"})
#: Debian's package of a program that has another name.
_PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86", "fuser": "psmisc",
    "chattr": "e2fsprogs", "mkfs.ext4": "e2fsprogs", "losetup": "mount",
}  # fmt: skip
#: A program → what it needs besides.
_NEEDS = {"losetup": "/dev/loop-control"}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: a command in ``sh``, its exit status, and a part of what it says."""

    command: str
    status: int
    says: str

    @property
    def programs(self) -> list[str]:
        words = [word for pattern in _COMMANDS for word in pattern.findall(self.command)]
        return [word for word in words if word not in _SHELL] or ["sh"]


@functools.cache
def tables() -> dict[tuple[str, str], list[Row]]:
    """Return the rows of the page by kind of mount and first program."""
    found: dict[tuple[str, str], list[Row]] = {}
    for kinds, table in _TABLE.findall(PAGE.read_text()):
        for line in table.splitlines()[2:]:
            match = _ROW.match(line)
            assert match, f"no row of a table of programs: {line}"
            command, status, says = match.groups()
            row = Row(command, int(status), says.strip().replace("\\|", "|"))
            for kind in kinds.split():
                found.setdefault((kind, row.programs[0]), []).append(row)
    return found


@dataclass(frozen=True, slots=True)
class Bench:
    """A mount of one kind, and ordinary files beside it."""

    kind: str
    mounted: Mounted
    outside: Path

    def run(self, row: Row, place: Path) -> str:
        """Run a row among fresh files; return what is wrong, empty if nothing is."""
        place.mkdir()
        makes = "fallocate -l 1M f && fallocate -l 1M g"
        if self.kind == "guest_memfd":
            makes = "truncate -s 1M f && : > new"
        subprocess.run(["sh", "-c", makes], cwd=place, check=True)
        out = self.outside / "out"
        out.mkdir()
        done = subprocess.run(
            ["sh", "-c", row.command], cwd=place, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
            env=os.environ | {
                "LC_ALL": "C", "OUT": str(out), "PLAIN": str(self.outside / "plain"),
                "TAR": str(self.outside / "plain.tar"),
            },
        )  # fmt: skip
        shutil.rmtree(out)
        shutil.rmtree(place)
        status = done.returncode if done.returncode >= 0 else 128 - done.returncode
        said = " ".join(done.stdout.split())
        if status == row.status and (row.says in said if row.says else _silent(row, said)):
            return ""
        return f"`{row.command}` ended with {status}: {done.stdout!r}"


def _silent(row: Row, said: str) -> bool:
    """Whether a program says nothing, but for the shell's and timeout's words of its death."""
    return not said or row.status >= 124


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Bench]]:
    place = tmp_path_factory.mktemp("programs")
    (place / "plain").write_text("a line of text\n")
    with tarfile.open(place / "plain.tar", "w") as archive:
        archive.add(place / "plain", "plain")
    options = {
        "passthrough": ("size=256M",),
        "direct_io": ("size=256M", "direct_io"),
        "guest_memfd": ("size=256M", "personality=guest_memfd"),
    }
    made: dict[str, Bench] = {}
    try:
        for kind, texts in options.items():
            (place / kind).mkdir()
            mounted = start(place / kind, texts, place / f"{kind}.log")
            made[kind] = Bench(kind, mounted, place)
        yield made
    finally:
        for bench in made.values():
            bench.mounted.end()
    assert [bench.mounted.log() for bench in made.values() if bench.mounted.log()] == []


@pytest.mark.parametrize(("kind", "program"), tables())
def test_programs_say_what_the_page_says(
    benches: dict[str, Bench], kind: str, program: str
) -> None:
    bench = benches[kind]
    if kind == "passthrough" and bench.mounted.facts["mode"] != "passthrough":
        pytest.skip(f"no passthrough here: {bench.mounted.ask('status')['passthrough_errno']}")
    rows = tables()[kind, program]
    missing = {word for row in rows for word in row.programs if shutil.which(word) is None}
    if missing:
        names = " ".join(sorted(_PACKAGES.get(word, word) for word in missing))
        pytest.skip(f"no {', '.join(sorted(missing))}: apt install {names}")
    needs = {_NEEDS[word] for row in rows for word in row.programs if word in _NEEDS}
    if lacking := [path for path in needs if not os.access(path, os.R_OK | os.W_OK)]:
        pytest.skip(f"{program} needs {', '.join(lacking)}")
    place = bench.mounted.path
    wrong = [bench.run(row, place / f"{Path(program).name}{n}") for n, row in enumerate(rows)]
    assert not [words for words in wrong if words]
    assert bench.mounted.ask("status")["memory"]["used"] == 0
    bench.mounted.audit()


def test_the_tables_are_found() -> None:
    kinds = {kind for kind, _ in tables()}
    assert kinds == {"passthrough", "direct_io", "guest_memfd"}
    assert {"fallocate", "cp", "fio", "qemu-system-x86_64", "losetup", "strace"} <= {
        program for _, program in tables()
    }
    assert Row('L=$(losetup -f f) && { dd if="$L"; }', 0, "").programs == ["losetup", "dd"]
    assert Row("timeout 1 python3 -c 'x'", 0, "").programs == ["timeout", "python3"]


@pytest.mark.parametrize(
    "command", ["fallocate -l 2M f", "fallocate -p -l 1M f", "truncate -s 2M f"]
)
def test_a_call_is_made_once(benches: dict[str, Bench], command: str) -> None:
    """No EINTR, no retry and no detour: what ``strace -c`` counts is what was asked for."""
    if shutil.which("strace") is None:
        pytest.skip("no strace: apt install strace")
    place = benches["direct_io"].mounted.path / "counted"
    place.mkdir()
    subprocess.run(["fallocate", "-l", "1M", "f"], cwd=place, check=True)
    names = "fallocate,ftruncate,pwrite64,copy_file_range"
    done = subprocess.run(
        ["strace", "-c", "-U", "calls,errors,name", "-e", f"trace={names}", *command.split()],
        cwd=place, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    rows = [line.split() for line in done.stderr.splitlines() if line.strip()[:1].isdigit()]
    call = {"fallocate": "fallocate", "truncate": "ftruncate"}[command.split()[0]]
    assert [row for row in rows if row[-1] != "total"] == [["1", call]]
    shutil.rmtree(place)
