# SPDX-License-Identifier: GPL-2.0-or-later
"""The program ``kvmsim`` on a real mount: consoles, scripts, every way in which a VM can end."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvmsim_program import KVMSIM, MIB, kvmsim, play
from mounts import Mounted

from kvmsim.cli.exitcodes import Exit
from kvmsim.cli.session import Console

pytest_plugins = ["guest_fixtures", "program_fixtures"]
pytestmark = [pytest.mark.fuse, pytest.mark.usefixtures("kernel")]

SECONDS = 20
MANUAL = Path(__file__).parents[2] / "docs" / "kvmsim.md"


class Booted:
    """``kvmsim boot`` under way, with someone at its console."""

    def __init__(self, *arguments: str | os.PathLike[str]) -> None:
        self.process = subprocess.Popen(
            [*KVMSIM, "boot", *map(os.fspath, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.console = Console()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for data in self.process.stdout:
            self.console.output(data)
        self.console.end()

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def expect(self, regex: str) -> None:
        assert self.console.expect(re.compile(regex), SECONDS), (regex, self.console.last)

    def end(self) -> int:
        """Wait for its end and return its status."""
        return self.process.wait(SECONDS)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@contextlib.contextmanager
def booted(*arguments: str | os.PathLike[str]) -> Iterator[Booted]:
    """Boot and wait for the kernel to be up."""
    vm = Booted(*arguments)
    try:
        vm.expect("in private memory")
        yield vm
    finally:
        vm.close()


def given_back(mounted: Mounted) -> bool:
    """Whether nobody uses the mount any more and nothing is wrong with its memory."""
    mounted.audit()
    return mounted.ask("status")["sessions"] == []


# --- a console in pipes ------------------------------------------------------------------------


@pytest.mark.parametrize("fence", ["mprotect", "none"])
def test_a_guest_answers_and_ends_with_its_status(mounted: Mounted, fence: str) -> None:
    arguments = ["boot", f"--fence={fence}", "--memory", mounted.path / "ram"]
    done = kvmsim(*arguments, text="info\nhalt 3\n")
    assert done.returncode == 3
    assert "> ok info vcpus=2 private_capable=33554432" in done.stdout
    assert done.stderr.splitlines() == [
        f"kvmsim: vm0: shared-bit, 2 vCPUs, 32768 KiB of private memory in {mounted.path / 'ram'}, "
        f"fence {fence}; Ctrl-C ends it",
        "kvmsim: vm0: the guest ended with status 3",
    ]
    assert given_back(mounted)


def test_the_end_of_input_ends_a_guest_that_waits_and_not_one_that_works(
    mounted: Mounted,
) -> None:
    done = kvmsim("boot", "-q", "--memory", mounted.path / "ram", text="test 0x800000 64\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok test pages=64 errors=0" in done.stdout
    arguments = ["--memory", mounted.path / "ram", "-q", "--timeout", "2"]
    done = kvmsim("boot", *arguments, text="spin 1 0x800000 16\n")
    assert done.returncode == Exit.TIMEOUT
    assert done.stderr == "kvmsim: vm0: ended after 2 s, as --timeout says\n"


def test_selftest_slots_vcpus_and_names(mounted: Mounted) -> None:
    memory = f"{mounted.path / 'ram'},size=8M,slots=3"
    with booted("--memory", memory, "--vcpus", "3", "--name", "tested", "--selftest") as vm:
        vm.expect("^ok test pages=.* errors=0 counter=60000 expected=60000 vcpus=3")
        assert {s["user"].split("(")[0] for s in mounted.ask("status")["sessions"]} == {"tested"}
        vm.type("halt")
        assert vm.end() == 0


def test_ram_lies_file_after_file_and_part_of_a_file_is_all_that_is_used(
    mounted: Mounted,
) -> None:
    other = mounted.path / "other"
    with open(other, "w") as file:
        os.truncate(file.fileno(), 8 * MIB)
    first = f"{mounted.path / 'ram'},offset=4M,size=8M"
    with booted("--memory", first, "--memory", other) as vm:
        vm.type("info")
        vm.expect("private_capable=16777216")
        vm.type(f"poke {10 * MIB + 4096:#x} 0x77")  # 2 MiB are low memory, 8 the first file
        vm.expect("ok poke")
        assert mounted.stat("other")["allocated"] == 4096
        rows = json.loads(mounted.privfs("map", "--json", mounted.path / "ram").stdout)["rows"]
        used = [row for row in rows if row["state"] != "hole"]
        assert used
        assert all(4 * MIB <= row["start"] < row["end"] <= 12 * MIB for row in used)
        vm.type("halt")
        assert vm.end() == 0


def test_json(mounted: Mounted) -> None:
    done = kvmsim("boot", "--json", "--memory", mounted.path / "ram", text="halt 4\n")
    assert (done.returncode, done.stderr) == (4, "")
    boot, *lines, end = map(json.loads, done.stdout.splitlines())
    assert (boot["event"], boot["vm"], boot["vcpus"]) == ("boot", "vm0", 2)
    assert boot["fence"] in ("uffd", "none")
    assert boot["memory"] == [
        {
            "path": os.fspath(mounted.path / "ram"),
            "offset": 0,
            "size": 32 * MIB,
            "slots": 2,
            "prealloc": False,
        }
    ]
    assert {line["event"] for line in lines} == {"console"}
    assert lines[-1]["line"] == "ok halt status=4"
    assert (end["event"], end["end"], end["exit"]) == ("end", "guest", 4)
    assert end["statistics"]["conversions_explicit"] > 0


def test_a_reader_that_leaves_ends_the_vm(mounted: Mounted) -> None:
    with subprocess.Popen(
        [*KVMSIM, "boot", "-q", "--memory", mounted.path / "ram"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(SECONDS) == Exit.SIGNAL + signal.SIGPIPE
    assert given_back(mounted)


# --- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_working_vm_and_gives_all_back(
    mounted: Mounted, number: signal.Signals
) -> None:
    with booted("--memory", mounted.path / "ram") as vm:
        vm.type("spin 1 0x800000 64")
        vm.expect("ok spin")
        vm.process.send_signal(number)
        assert vm.end() == Exit.SIGNAL + number
        assert given_back(mounted)


def test_ctrl_c_on_a_terminal(mounted: Mounted) -> None:
    ours, theirs = pty.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ours)
        process = subprocess.Popen(
            [*KVMSIM, "boot", "--memory", mounted.path / "ram"],
            preexec_fn=lambda: os.login_tty(theirs), pass_fds=[theirs],
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        os.close(theirs)
        screen = b""
        deadline = time.monotonic() + SECONDS
        while not screen.endswith(b"\n> ") and time.monotonic() < deadline:
            screen += os.read(ours, 4096)
        os.write(ours, b"info\n")
        while b"ok info" not in screen and time.monotonic() < deadline:
            screen += os.read(ours, 4096)
        os.write(ours, b"\x03")
        assert process.wait(SECONDS) == Exit.SIGNAL + signal.SIGINT
    assert given_back(mounted)


# --- a console on a socket ---------------------------------------------------------------------


def test_a_console_on_a_socket(mounted: Mounted, tmp_path: Path) -> None:
    place = tmp_path / "console"
    arguments = [*KVMSIM, "boot", "--memory", mounted.path / "ram", "--console", f"unix:{place}"]
    with subprocess.Popen(
        [*arguments, "--json"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "boot"
        second = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS)
        assert second.returncode == Exit.USAGE
        assert "exists already" in second.stderr
        for word in ("poke 0x800000 5", "peek 0x800000"):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(SECONDS)
                client.connect(os.fspath(place))
                client.sendall(f"{word}\n".encode())
                said = b""
                while b"ok " + word[:4].encode() not in said:
                    data = client.recv(4096)
                    assert data, said
                    said += data
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SECONDS)
            client.connect(os.fspath(place))
            client.sendall(b"halt 6\n")
            while client.recv(4096):
                pass
        end = json.loads(process.stdout.readline())
        assert (end["end"], end["exit"]) == ("guest", 6)
        assert process.wait(SECONDS) == 6
    assert not place.exists()


def test_a_late_client_sees_what_was_said(mounted: Mounted, tmp_path: Path) -> None:
    place = tmp_path / "console"
    with subprocess.Popen(
        [*KVMSIM, "boot", "--memory", mounted.path / "ram", "--console", f"unix:{place}"],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert f"pid {process.pid}" in process.stderr.readline()
        # the guest's first words wait for no client
        deadline = time.monotonic() + SECONDS
        while mounted.stat("ram")["allocated"] < 64 * 4096 and time.monotonic() < deadline:
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SECONDS)
            client.connect(os.fspath(place))
            said = b""
            while not said.endswith(b"\n> "):
                said += client.recv(4096)
        assert said.startswith(b"kvmsim guest kernel, boot stage")
        process.terminate()
        assert process.wait(SECONDS) == Exit.SIGNAL + signal.SIGTERM
    assert not place.exists()


# --- what cannot be booted ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "code", "why"),
    [
        ("nothing", Exit.MEMORY, "No such file or directory; make it in a privfs mount with: tru"),
        (".", Exit.MEMORY, "is a directory; name a file in a privfs mount"),
        ("../outside", Exit.MEMORY, "does not lie in a privfs mount"),
        ("empty", Exit.MEMORY, "is empty; give it the guest's size with: truncate -s 1G"),
        ("ram,offset=32M", Exit.MEMORY, "make it longer with truncate -s"),
        ("ram,size=33M", Exit.MEMORY, "make it longer with truncate -s"),
        ("ram,size=5000", Exit.MEMORY, "must be multiples of 4096"),
        ("ram,offset=8", Exit.MEMORY, "must be multiples of 4096"),
        ("ram,slots=0", Exit.MEMORY, "cannot be cut into 0 slots"),
        ("ram,size=8K,slots=3", Exit.MEMORY, "cannot be cut into 3 slots"),
        (".privfs/meminfo", Exit.MEMORY, ""),
    ],
)
def test_memory_that_cannot_be_used(mounted: Mounted, memory: str, code: int, why: str) -> None:
    (mounted.path / "empty").touch()
    (mounted.path.parent / "outside").write_bytes(bytes(4096))
    done = kvmsim("boot", "--memory", f"{mounted.path}/{memory}")
    assert done.returncode == code, done.stderr
    assert why in done.stderr
    assert done.stderr.startswith("kvmsim: ")
    assert done.stderr.count("\n") == 1
    assert given_back(mounted)


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file or directory; build it with scripts/setup"),
     (b"not an image", "not a 64-bit little-endian ELF file")],
)  # fmt: skip
def test_a_kernel_that_cannot_be_booted(
    mounted: Mounted, kernel: Path, content: bytes | None, why: str
) -> None:
    kernel.unlink()
    if content is not None:
        kernel.write_bytes(content)
    done = kvmsim("boot", "--memory", mounted.path / "ram")
    assert done.returncode == Exit.IMAGE
    assert why in done.stderr
    assert done.stderr.count("\n") == 1
    assert given_back(mounted)


def test_a_file_that_is_too_small_for_the_guest(mounted: Mounted) -> None:
    os.truncate(mounted.path / "ram", 65536)
    done = kvmsim("boot", "--memory", mounted.path / "ram")
    assert done.returncode == 0x7F
    assert "panic: boot stage: no private-capable RAM range with room" in done.stdout


def test_a_dead_mount(mounted: Mounted) -> None:
    mounted.kill()
    done = kvmsim("boot", "--memory", mounted.path / "ram")
    assert done.returncode == Exit.MEMORY
    assert "the mount is dead, clear it with: privfs umount DIR" in done.stderr


# --- how a guest ends without wishing to -------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("triple", "vcpu 0: triple fault"),
        ("jump 0x3000000000", "vcpu 0: private access to 0x3000000000"),
        ("jump 0x3000000000 shared", "vcpu 0: internal error 1"),
    ],
)
def test_a_guest_that_cannot_go_on(mounted: Mounted, command: str, why: str) -> None:
    with booted("--memory", mounted.path / "ram", "-q") as vm:
        vm.type(command)
        assert vm.end() == Exit.CRASHED
        vm.expect(rf"^kvmsim: vm0: {why}.*; boot it again$")
        assert given_back(mounted)


def test_a_file_cut_off_under_its_guest(mounted: Mounted) -> None:
    with booted("--memory", mounted.path / "ram", "-q") as vm:
        vm.type("poke 0x1800000 7")
        vm.expect("ok poke")
        os.truncate(mounted.path / "ram", 16 * MIB)
        vm.type("peek 0x1800000")
        assert vm.end() == Exit.CRASHED
        vm.expect("private access to 0x1800000.*beyond the end of the private file")
        assert given_back(mounted)


def test_a_punched_word_reads_as_zero(mounted: Mounted) -> None:
    with booted("--memory", mounted.path / "ram") as vm:
        vm.type("poke 0x800000 7")
        vm.expect("ok poke")
        hole = ["fallocate", "-p", "-o", "6M", "-l", "4K", os.fspath(mounted.path / "ram")]
        subprocess.run(hole, check=True, timeout=SECONDS)
        vm.type("peek 0x800000")
        vm.expect("value=0x0$")
        vm.type("halt")
        assert vm.end() == 0


def test_the_owner_is_killed_under_its_guest(mounted: Mounted) -> None:
    with booted("--memory", mounted.path / "ram", "-q") as vm:
        vm.type("spin 1 0x800000 64")
        vm.expect("ok spin")
        mounted.kill()
        assert vm.end() == Exit.OWNER_LOST
        vm.expect("^kvmsim: vm0: machine check: .*mount again, then boot again$")


def test_a_killed_emulator_leaves_a_file_that_boots_again(mounted: Mounted) -> None:
    with booted("--memory", mounted.path / "ram") as vm:
        vm.type("spin 1 0x800000 64")
        vm.expect("ok spin")
        vm.process.kill()
        assert vm.end() == -signal.SIGKILL
    hole = ["fallocate", "-p", "-o", "0", "-l", "32M", os.fspath(mounted.path / "ram")]
    subprocess.run(hole, check=True, timeout=SECONDS)  # waits for the proof of its death
    assert given_back(mounted)
    assert mounted.stat("ram")["allocated"] == 0
    assert kvmsim("boot", "--memory", mounted.path / "ram", text="halt\n").returncode == 0


# --- scripts -----------------------------------------------------------------------------------


def test_the_example_of_the_manual(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"```kvmsim\n(.*?)```", MANUAL.read_text(), re.DOTALL)
    assert example is not None
    programs = os.path.dirname(sys.executable)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    done = play(mounted, example[1])
    assert (done.returncode, done.stdout.count("\n")) == (0, 3), done.stderr
    assert given_back(mounted)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("expect ^never within 0.5", r":3: expected vm0 to print a line like /^never/, but not with"
                                     "in 0.5 s; its last line was 'kernel in private memory"),
        ("send triple\nexpect ok", ":4: expected vm0 to print a line like /ok/, but vm0 has ended: "
                                   "vcpu 0: triple fault"),
        ("send halt 1\nwait vm0 status 2", ":4: expected vm0 to end with 2, but it ended with 1: "),
        ("wait vm0 within 0.5", ":3: expected vm0 to end, but not within 0.5 s; its last line was"),
        ("send peek 0x800000\nexpect value=\nhost cat $RAM", ":5: 'cat $RAM': expected 0, got 1"),
        ("poison 0x1000", ":3: poison of gpa 0x1000: no private memory is there"),
        ("vm other memory=$DIR/none", "/none: No such file or directory"),
        ("vm other memory=$RAM,slots=99999", "cannot be cut into 99999 slots"),
    ],
)  # fmt: skip
def test_a_script_that_does_not_hold(mounted: Mounted, text: str, why: str) -> None:
    done = play(mounted, f"vm vm0 memory=$RAM\nexpect in private memory\n{text}\n")
    assert done.returncode == Exit.FAILED
    assert why in done.stderr
    assert done.stderr.count("\n") == 1
    assert given_back(mounted)


def test_memory_that_fails_ends_its_vm_and_a_punch_mends_it(mounted: Mounted) -> None:
    done = play(
        mounted,
        "vm a memory=$RAM\nexpect in private memory\n"
        "send poke 0x800000 7 private\nexpect ok poke\npoison 0x800000\n"
        "send peek 0x801000 private\nexpect value=0x0$\n"
        "host fallocate --punch-hole --offset 6M --length 4K $RAM\n"
        "send peek 0x800000 private\nexpect value=0x0$\n"
        "poison 0x801000\nsend peek 0x801000 private\nwait a status 123\n",
    )
    assert done.returncode == 0, done.stderr


def test_two_vms_share_a_file_and_stop_in_turn(mounted: Mounted) -> None:
    done = play(
        mounted,
        "vm a memory=$RAM,size=16M\nvm b memory=$RAM,offset=16M vcpus=1\n"
        "expect a in private memory\nexpect b in private memory\n"
        "stop a\nsend info\nexpect vcpus=1\n"
        "vm a memory=$RAM,size=8M selftest\nexpect a errors=0\n"
        "send a halt\nwait a\nsend halt\nwait b\nsay both\n",
    )
    assert (done.returncode, done.stdout) == (0, "both\n"), done.stderr
    assert given_back(mounted)


def test_a_script_is_interrupted(mounted: Mounted) -> None:
    script = mounted.path.parent / "script.kvs"
    script.write_text("vm a memory=$RAM\nexpect in private memory\nsay up\nhost sleep 600\n")
    with subprocess.Popen(
        [*KVMSIM, "run", script, "--var", f"RAM={mounted.path / 'ram'}"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == Exit.SIGNAL + signal.SIGINT
    assert given_back(mounted)
