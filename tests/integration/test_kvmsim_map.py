# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmsim map`` of guests at work, while they convert and while their memory is punched."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kvmsim_program import KVMSIM, MIB
from mounts import Mounted

from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.main import call
from kvmsim.console import ConsoleVm
from kvmsim.emulator import MemoryBackend, VmConfig
from kvmsim.fallocate import punch
from kvmsim.hostmem import HostMemory
from kvmsim.images import read_kernel
from kvmsim.views.odd import is_wrong
from kvmsim.vmm.bootparams import BootFlag, Technology

pytest_plugins = ["guest_fixtures", "program_fixtures"]
pytestmark = [pytest.mark.fuse, pytest.mark.usefixtures("kernel")]

END = 1 << 40


def wrong(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in answer["rows"] if any(map(is_wrong, row["odd"]))]


class Booted:
    """A guest at its prompt, in this process."""

    def __init__(self, host: HostMemory, path: Path, technology: Technology, **more: Any) -> None:
        self._said = bytearray()
        self._heard = threading.Condition()
        config = VmConfig(
            (MemoryBackend(os.fspath(path), prealloc=True, slots=1),), label=path.name,
            technology=technology, **more,
        )  # fmt: skip
        self.vm = ConsoleVm(host, config, self._output, lambda: None)

    def _output(self, data: bytes) -> None:
        with self._heard:
            self._said += data
            self._heard.notify_all()

    def boot(self) -> None:
        self.vm.boot(read_kernel(None))
        self.until("\n> ")

    def until(self, words: str, seconds: float = 40) -> str:
        end = time.monotonic() + seconds
        with self._heard:
            while words.encode() not in self._said:
                assert self._heard.wait(end - time.monotonic()), bytes(self._said)
            at = self._said.index(words.encode()) + len(words)
            said = self._said[:at].decode()
            del self._said[:at]
        return said

    def ask(self, line: str) -> str:
        self.vm.feed(line.encode() + b"\n")
        said = self.until("\n> ")
        assert "ok" in said, said
        return said


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("technology", [Technology.TDX, Technology.SNP])
def test_tables_agree_while_a_guest_converts_and_is_punched(
    mounted: Mounted, technology: Technology, vcpus: int
) -> None:
    host = HostMemory()
    flags = BootFlag.SELFTEST if vcpus == 2 else BootFlag.NONE
    guest = Booted(host, mounted.path / "ram", technology, vcpus=vcpus, flags=flags)
    seen: list[dict[str, Any]] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.append(guest.vm.tables("all", 0, END))

    looker = threading.Thread(target=look)
    try:
        guest.boot()
        looker.start()
        fd = os.open(mounted.path / "ram", os.O_RDWR)
        try:
            for step in range(3):
                gpa = 0x800000 + step * 0x1FF000  # over the edges of 2 MiB and inside them
                pages = 520 if step == 0 and vcpus == 1 else 3
                guest.ask(f"convert {gpa:#x} {pages} shared")
                guest.ask(f"convert {gpa:#x} {pages} private")
                guest.ask(f"fill {gpa:#x} 3 {step + 1}")
                punch(fd, gpa + 0x1000, 0x2000)
        finally:
            os.close(fd)
        done.set()
        looker.join()
        assert seen
        assert [bad for answer in seen for bad in wrong(answer)] == []
        frames = "pamt" if technology is Technology.TDX else "rmp"
        told = guest.vm.tables(frames, 0, END)
        assert told["rows"]
        assert wrong(told) == []
    finally:
        done.set()
        if looker.is_alive():
            looker.join()
        guest.vm.close()
        guard = guest.vm.guard
        host.close()
    assert guard is not None
    assert not any(guard.residue().values()), guard.residue()


def test_what_a_person_sees(
    mounted: Mounted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.fspath(tmp_path))

    def said(*arguments: str, code: int = Exit.OK) -> str:
        status = call(list(arguments))
        found = capsys.readouterr()
        assert status == code, found
        return found.out + found.err

    command = [*KVMSIM, "boot", "--memory", f"{mounted.path}/ram", "--kind", "snp", "--vcpus", "1"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as vm:
        assert vm.stdin is not None
        assert vm.stdout is not None
        try:
            vm.stdin.write("info\n")
            vm.stdin.flush()
            while "ok info" not in vm.stdout.readline():
                assert vm.poll() is None
            assert "SEV-SNP, table all" in (told := said("map"))
            assert "Guest-Valid" in told
            assert "!" not in told
            rows = json.loads(said("map", "vm0", "--table", "rmp", "--json"))[0]["rows"]
            assert {"Context", "VMSA", "Guest-Valid"} <= {row["state"] for row in rows}
            part = json.loads(said("map", "--gpa", "1M:8K", "--json"))[0]["rows"]
            assert (part[0]["start"], part[-1]["end"]) == (MIB, MIB + 8192)
            refused = said("map", "--table", "sept", code=Exit.FAILED)
            assert "it is of kind snp and has all, attributes, stage2, rmp" in refused
            said("map", "nobody", code=Exit.FAILED)
            said("map", "--gpa", "1", code=Exit.USAGE)
            said("map", "--png", "x", "--odd", code=Exit.USAGE)
            picture = tmp_path / "vm.png"
            said("map", "--png", os.fspath(picture))
            assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        finally:
            vm.stdin.write("halt\n")
            vm.stdin.close()
            vm.wait(20)
    assert said("map").startswith("no VM is up")
