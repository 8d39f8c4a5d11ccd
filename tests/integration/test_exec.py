# SPDX-License-Identifier: GPL-2.0-or-later
"""Unmodified programs on the simulated /dev/kvm: a VMM in C, and one that is Python."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mounts import Mounter
from rooms import room

ROOT = Path(__file__).parents[2]
MODES = [
    "add fault many", "threads", "alarm", "fork snapshot helpers", "discard unmap move anew",
    "late protect", "full",
]  # fmt: skip

pytest_plugins = ["twin_fixtures"]
pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64",
                       reason="the program's ioctls are x86-64's"),
]  # fmt: skip


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Assert that an exec leaves no folder, mount or process."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", os.fspath(scratch))
    yield
    assert list(scratch.iterdir()) == []
    assert os.fspath(scratch) not in Path("/proc/self/mounts").read_text()
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [line for line in commands if "kvmsim" in line]


def command(*program: str | os.PathLike[str], memory: Path | None = None) -> list[str]:
    options = [] if memory is None else ["--memory", os.fspath(memory)]
    return [sys.executable, "-m", "kvmsim", "exec", *options, "--", *map(os.fspath, program)]


def run(argv: list[str], seconds: float = 90) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=seconds, check=False)


@pytest.mark.parametrize("modes", MODES)
def test_a_vmm_in_c_finds_what_it_expects(
    vmm: Path, modes: str, mount: Mounter, left: None
) -> None:
    done = run(command(vmm, *modes.split(), memory=mount().path))
    assert done.returncode == 0, done.stderr
    assert modes == "full" or "process" not in done.stderr


def test_a_child_that_there_is_no_memory_for(vmm: Path, mount: Mounter, left: None) -> None:
    done = run(command(vmm, "poor", memory=mount().path))
    assert done.returncode == 0, done.stderr
    assert "finds nothing where there was memory under slots: mmap of" in done.stderr


def test_a_vmm_for_the_kernel_runs_with_a_mount_of_its_own(left: None) -> None:
    done = run(command(sys.executable, ROOT / "scripts/vmm.py", "--real"))
    assert done.returncode == 0, done.stderr
    assert "took back" in done.stdout


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        (["sh", "-c", "exit 7"], 7, ""),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM, ""),
        (["no-such-program"], 127, "No such file"),
        (["/etc/hostname"], 126, "/etc/hostname"),
        (["sh", "-c", "echo heard; cat /proc/self/status | grep Seccomp: | cut -f2"], 0, ""),
    ],
)
def test_the_status_is_the_program_s(
    program: list[str], status: int, said: str, mount: Mounter, left: None
) -> None:
    done = run(command(*program, memory=mount().path))
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    if "echo heard" in program[-1]:
        assert done.stdout == "heard\n2\n"


@contextlib.contextmanager
def spinning(
    vmm: Path, memory: Path, mode: str = "spin"
) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """Run a guest that spins, or something else; yield the supervisor and the program."""
    supervisor = subprocess.Popen(
        command(vmm, mode, memory=memory),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    program = None
    try:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() in ("spinning\n", "breeding\n")
        (program,) = psutil.Process(supervisor.pid).children()
        yield supervisor, program
    finally:
        assert supervisor.stdout is not None
        supervisor.stdout.close()
        supervisor.kill()
        supervisor.wait(30)
        if program is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                program.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_program_in_kvm_run(
    number: signal.Signals, vmm: Path, mount: Mounter, left: None
) -> None:
    with spinning(vmm, mount().path) as (supervisor, program):
        program.send_signal(number)
        assert supervisor.wait(30) == 128 + number


def test_sigterm_for_the_supervisor_ends_the_program(vmm: Path, mount: Mounter, left: None) -> None:
    with spinning(vmm, mount().path) as (supervisor, program):
        supervisor.terminate()
        assert supervisor.wait(30) == 128 + signal.SIGTERM
        program.wait(30)


def test_a_killed_supervisor_leaves_no_program_that_hangs(
    vmm: Path, mount: Mounter, left: None
) -> None:
    with spinning(vmm, mount().path) as (supervisor, program):
        supervisor.kill()
        program.wait(30)  # its KVM_RUN fails with ENOSYS, which it complains of and ends


def test_a_killed_supervisor_leaves_no_child_that_shares_memory(
    vmm: Path, mount: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forks come one after another, so that it dies in the middle of one, or between two.

    What is just being forked dies with it, both sides if that is in the system call.
    """
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path))
    with spinning(vmm, mount().path, "breeding") as (supervisor, _):
        supervisor.kill()
        assert supervisor.stdout is not None
        assert supervisor.stdout.read() in ("kept\n", "")  # until nobody is left who has it


def test_stat_shows_its_vms(
    vmm: Path, mount: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: None
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.fspath(tmp_path))
    with spinning(vmm, mount().path) as (supervisor, _):
        asked = [sys.executable, "-m", "kvmsim", "stat"]
        done = run([*asked, "--json", str(supervisor.pid)])
        (found,) = json.loads(done.stdout)
        assert (found["vm"], found["kind"], found["state"]) == ("kvm1", "default", "running")
        (slot,) = found["slots"]
        assert (slot["gpa"], slot["size"]) == (0, 4 << 20)
        assert slot["allocated"]["shared"] == 5 * 4096  # three tables, the code, what it counts
        assert "the program's own" in run(asked).stdout
        supervisor.terminate()
        supervisor.wait(30)
    assert list(tmp_path.glob("kvmsim/*")) == []


_TYPES = """
import fcntl
kvm = open("/dev/kvm", "rb+", buffering=0)
print(fcntl.ioctl(kvm, 0xAE03, 235))  # KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES
for number in 0, 1:
    try:
        print(fcntl.ioctl(kvm, 0xAE01, number) > 0)  # KVM_CREATE_VM
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), [1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 30, True, True]),
        (("--vm-types", "default"), [1, True, errno.EINVAL]),
        (("--vm-types", "sw-protected,shared-bit"), [1 << 1 | 1 << 30, errno.EINVAL, True]),
    ],
)
def test_the_types_of_vms_can_be_chosen(
    given: tuple[str, ...], said: list[object], mount: Mounter, left: None
) -> None:
    before = [sys.executable, "-m", "kvmsim", "exec", *given, "--memory", os.fspath(mount().path)]
    done = run([*before, "--", sys.executable, "-c", _TYPES])
    assert done.stdout.split() == list(map(str, said)), done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--vm-types", "default,arm"], "no VM type 'arm'"),
        (["--vm-types", "default", "--abi", "v7"], "2022 has no VM types"),
    ],
)
def test_types_that_are_not_there(options: list[str], said: str) -> None:
    done = run([sys.executable, "-m", "kvmsim", "exec", *options, "--", "true"])
    assert done.returncode == 2
    assert said in done.stderr


def test_the_real_device_is_seen_by_nobody_inside(mount: Mounter, left: None) -> None:
    done = run(command("stat", "-c", "%F %s", "/dev/kvm", memory=mount().path))
    assert (done.returncode, done.stdout) == (0, "regular empty file 0\n")


@pytest.mark.parametrize(
    ("call", "code", "said"),
    [
        (317, errno.EPERM, "seccomp(2) is forbidden here"),
        (317, errno.EINVAL, "needs Linux 5.19"),
        (317, errno.ENOSYS, "needs CONFIG_SECCOMP_FILTER"),
        (272, errno.EPERM, "no namespace in which /dev/kvm is the simulated one"),  # unshare
        (438, errno.EPERM, "memory and descriptors cannot be reached"),  # pidfd_getfd
        (310, errno.EPERM, "memory and descriptors cannot be reached"),  # process_vm_readv
    ],
)
def test_what_the_machine_refuses_is_said_in_one_line(
    call: int, code: int, said: str, mount: Mounter, left: None
) -> None:
    forbidden = [sys.executable, ROOT / "tests/forbid.py", str(call), str(code)]
    done = run([*map(os.fspath, forbidden), *command("true", memory=mount().path)])
    assert done.returncode == 125, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("kvmsim: ")
    assert said in done.stderr


def test_one_exec_in_another_is_refused(mount: Mounter, left: None) -> None:
    place = mount().path
    done = run(command(*command("true", memory=place), memory=place))
    assert done.returncode == 125, done.stderr
    assert "one seccomp listener" in done.stderr


def test_no_user_namespaces_for_ordinary_users() -> None:
    ordinary = ["unshare", "--user", "--map-user=1000", "--keep-caps"]
    script = 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"'
    if shutil.which("unshare") is None or run([*ordinary, "sh", "-c", script, "sh", "true"]).stderr:
        pytest.skip("no user namespaces here, or an unshare that cannot: apt install util-linux")
    launch = [sys.executable, "-m", "kvmsim.exec.launch", "0", "--", "true"]
    done = run([*ordinary, "sh", "-c", script, "sh", *launch])
    assert done.returncode == 125
    assert "sysctl user.max_user_namespaces=0" in done.stderr


def test_no_privfs_mount(tmp_path: Path, left: None) -> None:
    done = run(command("true", memory=tmp_path))
    assert done.returncode == 120
    assert "does not lie in a privfs mount" in done.stderr


_TRACER = """
import ctypes, os, signal, sys
ptrace = ctypes.CDLL(None).ptrace
child = os.fork()
if not child:
    ptrace(0, 0, None, None)
    os.execv(sys.argv[1], sys.argv[1:])
while os.WIFSTOPPED(status := os.waitpid(child, 0)[1]):
    number = os.WSTOPSIG(status)
    ptrace(7, child, None, ctypes.c_long(0 if number == signal.SIGTRAP else number))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_program_that_another_traces_gets_no_slot(vmm: Path, mount: Mounter, left: None) -> None:
    """Its memory cannot become the guest's: the ioctl says so, and kvmsim why."""
    done = run(command(sys.executable, "-c", _TRACER, vmm, "add", memory=mount().path))
    assert done.returncode == 1
    assert "&region) (errno Operation not permitted)" in done.stderr
    assert "gets EPERM for a slot, since 1024 pages of it would stay private" in done.stderr


def test_nor_does_a_slot_that_it_has_take_its_private_memory(
    vmm: Path, mount: Mounter, left: None
) -> None:
    done = run(command(sys.executable, "-c", _TRACER, vmm, "late", memory=mount().path))
    assert done.returncode == 1
    assert "found == 6 (errno Bad address)" in done.stderr
    assert "1 pages under a slot are private memory that came after the slot, and EPERM" in (
        done.stderr
    )


@pytest.mark.root
@pytest.mark.parametrize("mode", ["add", "threads", "many", "snapshot"])
def test_an_ordinary_user_can(vmm: Path, mode: str) -> None:
    with room() as made:
        program = made.place / "vmm"
        shutil.copy(vmm, program)
        done = made.run(*command(program, mode), timeout=90)
        assert done.returncode == 0, done.stdout
        assert list((made.place / "tmp").iterdir()) == []
