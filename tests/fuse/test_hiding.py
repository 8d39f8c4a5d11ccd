# SPDX-License-Identifier: GPL-2.0-or-later
"""Private memory against other processes of the same user: the ways in, and that they are shut."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mounts import Mounter, privfs
from rooms import ROOT, Room, room

from privfs.backing import choose

pytest_plugins = ["guest_fixtures"]
pytestmark = pytest.mark.fuse

MIB = 1 << 20
_SYS_PIDFD_GETFD = 438  # asm/unistd_64.h
PYTHON = (sys.executable, "-P")
BURGLAR = Path(__file__).with_name("burglar.py")
#: A process that hides nothing.
_OPEN_HOUSE = """
import ctypes, mmap, os, sys
fd = os.memfd_create("open")
os.truncate(fd, 4096)
memory = mmap.mmap(fd, 4096)
memory[:6] = b"secret"
print(hex(ctypes.addressof(ctypes.c_char.from_buffer(memory))), flush=True)
sys.stdin.read()
"""


# --- processes of one ordinary user ------------------------------------------------------------


@pytest.fixture(scope="module")
def house() -> Iterator[Room]:
    if os.geteuid() != 0:
        pytest.skip("root: needs uid 0 to make a room with an ordinary user")
    if shutil.which("fusermount3") is None:
        pytest.skip("no fusermount3: apt install fuse3")
    with room() as made:
        yield made


@dataclass(frozen=True, slots=True)
class Started:
    """A process of the room; its pid in there, and the first line of it that was waited for."""

    pid: int
    process: subprocess.Popen[str]
    line: str


@contextlib.contextmanager
def started(house: Room, word: str, *command: str | os.PathLike[str]) -> Iterator[Started]:
    """Run a command as the room's user and wait until it says ``word``."""
    with subprocess.Popen(
        house.command("sh", "-c", 'echo $$; exec "$@"', "sh", *command),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            pid = int(process.stdout.readline())
            line = next((line for line in process.stdout if word in line), None)
            assert line is not None, f"{command} ended without {word!r}"
            yield Started(pid, process, line)
        finally:
            process.kill()


def broken_into(house: Room, pid: int, address: str = "0x400000") -> dict[str, list[str]]:
    """Attack a process as its own user; return what each attack met, nothing if it got in."""
    done = house.run(*PYTHON, BURGLAR, str(pid), address)
    assert done.returncode == 0, done.stdout
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.fixture
def mounted(house: Room, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A mount of the room's user with a file ``ram`` of 32 MiB, all of it allocated."""
    backing = getattr(request, "param", "shmem")
    try:
        choose(backing)
    except OSError as error:
        pytest.skip(str(error.strerror))
    place = house.directory(f"{request.node.name}-mount")
    done = house.privfs("mount", "--daemon", "-o", f"size=128M,backing={backing}", place)
    assert (done.returncode, done.stdout) == (0, "")
    house.sh('fallocate -l 32M "$1/ram"', place)
    yield place
    house.privfs("umount", "--lazy", place)


@pytest.fixture
def guest(house: Room, mounted: Path, image: bytes) -> Iterator[Started]:
    """``kvmsim boot`` of the room's user, with its guest in private memory."""
    kernel = house.place / "kernel.elf"
    kernel.write_bytes(image)
    command = [*PYTHON, "-m", "kvmsim", "boot", "--kernel", kernel, "--memory", mounted / "ram"]
    with started(house, "in private memory", *command) as vm:
        yield vm


SHUT = {"EACCES", "EPERM"}


def test_the_burglar_gets_into_an_open_house(house: Room) -> None:
    """Else the other tests would say nothing."""
    with started(house, "0x", *PYTHON, "-c", _OPEN_HOUSE) as target:
        met = broken_into(house, target.pid, target.line.strip())
    assert met.pop("map_files") in ([], ["EPERM"])  # CAP_CHECKPOINT_RESTORE
    if met["ptrace"] == ["EPERM"]:
        pytest.skip("kernel.yama.ptrace_scope forbids these attacks on everybody")
    assert {name: said for name, said in met.items() if said} == {}


@pytest.mark.parametrize("mounted", ["shmem", "secretmem"], indirect=True)
def test_nobody_gets_into_the_owner_of_the_memory(house: Room, mounted: Path) -> None:
    pid = house.status(mounted)["pid"]
    met = broken_into(house, pid)
    assert {name: said for name, said in met.items() if not said or set(said) - SHUT} == {}
    assert house.alive(pid)


def test_nobody_gets_into_an_emulator(house: Room, guest: Started) -> None:
    met = broken_into(house, guest.pid)
    assert {name: said for name, said in met.items() if not said or set(said) - SHUT} == {}
    assert house.alive(guest.pid)


def test_the_file_itself_is_the_only_door(house: Room, mounted: Path) -> None:
    """Who may open the file may use its memory; who may not has no way to it."""
    house.sh('chmod 0 "$1/ram"', mounted)
    script = "import os, sys; os.open(sys.argv[1], os.O_RDWR)"
    done = house.run(*PYTHON, "-c", script, mounted / "ram")
    assert "PermissionError" in done.stdout


# --- what root sees ----------------------------------------------------------------------------


def descriptors(pid: int) -> dict[str, int]:
    """Return what the descriptors above 2 of a process are, with their flags."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if int(entry.name) > 2:
            info = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text()
            flags = next(line for line in info.splitlines() if line.startswith("flags:"))
            found[f"{entry.name} {os.readlink(entry)}"] = int(flags.split()[1], 8)
    return found


def extent_mappings(pid: int) -> list[set[str]]:
    """Return the VmFlags of every mapping of an extent (proc_pid_smaps(5))."""
    found = []
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = "/memfd:privfs:" in line
        elif line.startswith("VmFlags:") and inside:
            found.append(set(line.split()[1:]))
    return found


@pytest.mark.root
def test_the_owner_passes_no_descriptor_on_and_maps_nothing(mount: Mounter) -> None:
    mounted = mount()
    subprocess.run(["fallocate", "-l", "1M", mounted.path / "f"], check=True)
    found = descriptors(mounted.process.pid)
    assert [name for name in found if "/memfd:privfs:" in name]
    assert [name for name, flags in found.items() if not flags & os.O_CLOEXEC] == []
    assert extent_mappings(mounted.process.pid) == []


@pytest.mark.root
def test_the_owner_of_secret_memory_maps_none_of_it(mount: Mounter) -> None:
    """It does while it allocates, and passes nothing on then either."""
    try:
        choose("secretmem")
    except OSError as error:
        pytest.skip(str(error.strerror))
    mounted = mount("backing=secretmem")
    subprocess.run(["fallocate", "-l", "8M", mounted.path / "f"], check=True)
    found = descriptors(mounted.process.pid)
    assert sum("/secretmem" in name for name in found) == 4
    assert [name for name, flags in found.items() if not flags & os.O_CLOEXEC] == []
    assert "/secretmem" not in Path(f"/proc/{mounted.process.pid}/maps").read_text()


@contextlib.contextmanager
def booted(
    mount: Mounter, image: bytes, tmp_path: Path, *options: str
) -> Iterator[subprocess.Popen[str]]:
    """``kvmsim boot`` on a mount, as whoever runs the tests."""
    kernel = tmp_path / "kernel.elf"
    kernel.write_bytes(image)
    mounted = mount(*options)
    subprocess.run(["truncate", "-s", "32M", mounted.path / "ram"], check=True)
    with subprocess.Popen(
        [*PYTHON, "-m", "kvmsim", "boot", "--kernel", kernel, "--memory", mounted.path / "ram"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.fspath(ROOT)},
    ) as vm:  # fmt: skip
        assert vm.stdout is not None
        try:
            assert any("in private memory" in line for line in vm.stdout)
            yield vm
        finally:
            vm.kill()


@pytest.mark.root
def test_an_emulator_passes_nothing_on(mount: Mounter, image: bytes, tmp_path: Path) -> None:
    with booted(mount, image, tmp_path) as vm:
        found = descriptors(vm.pid)
        assert [name for name in found if "/memfd:privfs:" in name]
        assert [name for name, flags in found.items() if not flags & os.O_CLOEXEC] == []
        mappings = extent_mappings(vm.pid)
        assert mappings
        assert all(flags >= {"dc", "dd"} for flags in mappings)  # no copy on fork, no dump


def ways_of_root(pid: int, name: str) -> dict[str, list[str]]:
    """Attack an emulator's memory in ``name`` as root; return what each way in met."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    span = next(line.split()[0] for line in lines if name in line)
    low, high = (int(part, 16) for part in span.split("-"))
    links = Path(f"/proc/{pid}/fd").iterdir()
    number = next(link.name for link in links if name in os.readlink(link))
    said = subprocess.run([*PYTHON, BURGLAR, str(pid), hex(low)], check=True, capture_output=True)
    met: dict[str, list[str]] = json.loads(said.stdout)
    return {way: met[way] for way in ("mem", "process_vm_readv")} | {
        "map_files": errno_of(lambda: read_page(f"/proc/{pid}/map_files/{low:x}-{high:x}")),
        "descriptor through /proc": errno_of(lambda: read_page(f"/proc/{pid}/fd/{number}")),
        "descriptor by pidfd_getfd": errno_of(lambda: map_theirs(pid, int(number))),
    }


def errno_of(attack: Callable[[], object]) -> list[str]:
    try:
        attack()
    except OSError as error:
        return [errno.errorcode[error.errno or 0]]
    return []


def read_page(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        file.read(4096)


def map_theirs(pid: int, number: int) -> None:
    """Take a descriptor of another process and read memory through it."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        fd = libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        try:
            with mmap.mmap(fd, 4096) as memory:
                memory.read(1)
        finally:
            os.close(fd)
    finally:
        os.close(pidfd)


@pytest.mark.root
def test_root_reads_ordinary_memory_in_every_way(
    mount: Mounter, image: bytes, tmp_path: Path
) -> None:
    with booted(mount, image, tmp_path) as vm:
        met = ways_of_root(vm.pid, "/memfd:privfs:")
    assert {way for way, said in met.items() if said} == set()


@pytest.mark.root
def test_root_must_take_a_descriptor_of_secret_memory(
    mount: Mounter, image: bytes, tmp_path: Path
) -> None:
    """Or run code in the process: the kernel itself has no way to read it for anybody."""
    try:
        choose("secretmem")
    except OSError as error:
        pytest.skip(str(error.strerror))
    with booted(mount, image, tmp_path, "backing=secretmem") as vm:
        found = descriptors(vm.pid)
        assert [name for name in found if "/secretmem" in name]
        assert [name for name, flags in found.items() if not flags & os.O_CLOEXEC] == []
        met = ways_of_root(vm.pid, "/secretmem")
    assert met == {
        "mem": ["EIO"],
        "process_vm_readv": ["EFAULT"],
        "map_files": ["ENXIO"],
        "descriptor through /proc": ["ENXIO"],
        "descriptor by pidfd_getfd": [],
    }


# --- core dumps --------------------------------------------------------------------------------


def dumps_core(pid: int) -> bool:
    """Crash a child of ours that may dump core; return whether it did."""
    resource.prlimit(pid, resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.kill(pid, signal.SIGSEGV)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGSEGV
    return os.WCOREDUMP(status)


@pytest.fixture
def cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to dump core in, where the machine does that for an ordinary process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.fspath(ROOT))
    script = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [*PYTHON, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as plain:
        assert plain.stdout is not None
        plain.stdout.readline()
        dumped = dumps_core(plain.pid)
        plain.returncode = -signal.SIGSEGV
    if not dumped:
        pytest.skip("this machine dumps nobody's core (core(5))")
    for core in tmp_path.glob("core*"):
        core.unlink()
    return tmp_path


@pytest.mark.root
def test_the_owner_leaves_no_core(mount: Mounter, cores: Path) -> None:
    mounted = mount()
    mounted.killed = True
    assert not dumps_core(mounted.process.pid)
    mounted.process.returncode = -signal.SIGSEGV
    assert list(cores.glob("core*")) == []


@pytest.mark.root
def test_an_emulator_leaves_no_core(
    mount: Mounter, cores: Path, image: bytes, tmp_path: Path
) -> None:
    with booted(mount, image, tmp_path) as vm:
        assert not dumps_core(vm.pid)
        vm.returncode = -signal.SIGSEGV
    assert list(cores.glob("core*")) == []


# --- children ----------------------------------------------------------------------------------


def test_the_command_of_run_has_no_descriptor_of_the_mount() -> None:
    script = (
        "import os\n"
        "links = (f'/proc/self/fd/{n}' for n in range(3, 1024))\n"
        "print(*(os.readlink(link) for link in links if os.path.islink(link)))\n"
    )
    done = privfs("run", "-o", "size=1M", "--", sys.executable, "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
