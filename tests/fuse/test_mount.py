# SPDX-License-Identifier: GPL-2.0-or-later
"""A real mount under ordinary tools: names as on tmpfs, memory given back at once, refusals."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounts import Mounted, Mounter, privfs

pytestmark = pytest.mark.fuse

PAGE = 4096
MIB = 1 << 20
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _fallocate(fd, mode, offset, length) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def sh(script: str, cwd: Path, *, check: bool = True) -> str:
    """Run a shell script in a directory and return all that it says."""
    done = subprocess.run(
        ["sh", "-e", "-u", "-c", script], cwd=cwd, text=True, timeout=60, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"LC_ALL": "C"},
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout
    return done.stdout


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def used(mounted: Mounted) -> int:
    """Return what df shows as used, in bytes."""
    found = os.statvfs(mounted.path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def refused(code: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


# --- names -------------------------------------------------------------------------------------

TREE = """
shown() { find . -mindepth 1 -name .privfs -prune -o -mindepth 1 "$@" | sort; }
mkdir -p a/b/c; : > a/f; : > a/b/g; ln a/f a/b/hard; ln -s ../f a/b/soft
mv a/b/g a/b/c/h; chmod 640 a/f; mkdir gone; rmdir gone; : > gone2; rm gone2
mv -T a/b/c a/moved; cp -a a/b/soft copied; touch -d '2001-02-03 04:05:06 UTC' a/f
truncate -s 8192 a/moved/h
shown -printf '%P %y %m %n %s %l\\n'
stat -c '%n %F %a %h %s' a/f a/b/hard a/moved/h; stat -c %Y a/f
ls -R a; readlink a/b/soft; test a/f -ef a/b/hard
rm -r a/moved; rmdir a 2>&1 || echo refused; rm nothing 2>&1 || echo refused
mkdir a 2>&1 || echo refused; ln a/b x 2>&1 || echo refused; mv a a/b/ 2>&1 || echo refused
rm -rf a copied; shown -print
"""


def test_names_are_those_of_tmpfs(mount: Mounter, tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if os.statvfs(shm).f_namemax != 255 or not os.access(shm, os.W_OK):
        pytest.skip("no tmpfs at /dev/shm to compare with")
    mounted = mount()
    reference = shm / f"privfs-test-{os.getpid()}"
    reference.mkdir()
    try:
        expected = sh(TREE, reference)
    finally:
        subprocess.run(["rm", "-rf", reference], check=True)
    found = sh(TREE, mounted.path)
    # Directories have sizes of their own on every file system.
    assert _without_directory_sizes(found) == _without_directory_sizes(expected)
    assert "refused" in found


def _without_directory_sizes(listing: str) -> list[str]:
    return [
        " ".join(line.split(" ")[:4]) if line.split(" ")[1:2] == ["d"] else line
        for line in listing.splitlines()
    ]


def test_df_and_du_show_budget_and_memory(mount: Mounter) -> None:
    mounted = mount("size=8M")
    with opened(mounted.path / "f") as fd:
        os.ftruncate(fd, 4 * MIB)
        fallocate(fd, 0, MIB, MIB)
    df = sh("df -k --output=fstype,size,used,avail . | tail -1", mounted.path).split()
    assert df == ["fuse.privfs", "8192", "1024", "7168"]
    assert sh("du -k f; du -k --apparent-size f", mounted.path) == "1024\tf\n4096\tf\n"
    assert sh("stat -c '%s %b %B %o' f", mounted.path) == "4194304 2048 512 4096\n"
    mounted.audit()


def test_seek_finds_data_and_holes(mount: Mounter) -> None:
    mounted = mount()
    with opened(mounted.path / "f") as fd:
        os.ftruncate(fd, 8 * PAGE)
        fallocate(fd, 0, 2 * PAGE, 2 * PAGE)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 2 * PAGE
        assert os.lseek(fd, 2 * PAGE, os.SEEK_HOLE) == 4 * PAGE
        refused(errno.ENXIO, lambda: os.lseek(fd, 4 * PAGE, os.SEEK_DATA))


# --- memory ------------------------------------------------------------------------------------


def test_memory_is_given_back_at_once(mount: Mounter) -> None:
    mounted = mount("size=64M")
    before = used(mounted)

    def holds(size: int) -> None:
        assert used(mounted) - before == size
        counts = mounted.stat("f")
        assert counts["allocated"] == counts["held"] == size
        assert os.stat(mounted.path / "f").st_blocks * 512 == size
        mounted.audit()

    with opened(mounted.path / "f") as fd:
        fallocate(fd, 0, 0, 16 * MIB)
        holds(16 * MIB)
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 4 * MIB, 2 * MIB)
        holds(14 * MIB)
        fallocate(fd, ZERO_RANGE, 3 * MIB, 2 * MIB)
        holds(15 * MIB)
        os.ftruncate(fd, MIB)
        holds(MIB)
        os.ftruncate(fd, 16 * MIB)
        holds(MIB)
        os.ftruncate(fd, 0)
        holds(0)


def test_an_unlinked_file_keeps_its_memory_until_closed(mount: Mounter) -> None:
    mounted = mount("size=64M")
    with opened(mounted.path / "f") as fd:
        fallocate(fd, 0, 0, 4 * MIB)
        os.unlink(mounted.path / "f")
        assert used(mounted) == 4 * MIB
        assert os.fstat(fd).st_nlink == 0
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, MIB)
        assert used(mounted) == 3 * MIB
        again = os.dup(fd)
    assert used(mounted) == 3 * MIB
    os.close(again)
    _wait_used(mounted, 0)
    mounted.audit()
    assert mounted.ask("status")["files"] == 0


def test_a_deleted_file_is_given_back(mount: Mounter) -> None:
    mounted = mount("size=64M")
    sh("fallocate -l 4M a; fallocate -l 4M b; ln b c", mounted.path)
    assert used(mounted) == 8 * MIB
    sh("rm a b", mounted.path)
    _wait_used(mounted, 4 * MIB)
    sh(": > d; mv d c", mounted.path)  # rename over the last name
    _wait_used(mounted, 0)
    mounted.audit()


def _wait_used(mounted: Mounted, size: int) -> None:
    """Wait for RELEASE and FORGET, which the kernel sends after close(2) or unlink(2) returned."""
    for _ in range(200):
        if used(mounted) == size:
            return
    assert used(mounted) == size


def test_open_with_trunc_frees(mount: Mounter) -> None:
    mounted = mount()
    sh("fallocate -l 4M f; : > f", mounted.path)
    assert os.stat(mounted.path / "f").st_size == 0
    assert mounted.stat("f")["held"] == 0
    mounted.audit()


def test_the_budget_is_half_of_the_memory_unless_told(tmp_path: Path) -> None:
    done = privfs("run", "--", "sh", "-c", 'stat -f -c "%b %S" "$PRIVFS"')
    blocks, unit = map(int, done.stdout.split())
    assert (blocks, unit) == (os.sysconf("SC_PHYS_PAGES") // 2, PAGE)


def test_enospc_changes_nothing(mount: Mounter) -> None:
    mounted = mount("size=2M")
    with opened(mounted.path / "f") as fd:
        fallocate(fd, 0, 0, MIB)
        before = (os.fstat(fd).st_size, os.fstat(fd).st_blocks, used(mounted), mounted.stat("f"))
        refused(errno.ENOSPC, lambda: fallocate(fd, 0, 0, 4 * MIB))
        refused(errno.ENOSPC, lambda: fallocate(fd, 0, MIB, 1 * MIB + PAGE))
        after = (os.fstat(fd).st_size, os.fstat(fd).st_blocks, used(mounted), mounted.stat("f"))
        assert after == before
        fallocate(fd, 0, MIB, MIB)  # all of the rest
        assert used(mounted) == 2 * MIB
    mounted.audit()


# --- refusals ----------------------------------------------------------------------------------


@pytest.fixture(params=["passthrough", "direct_io"])
def refusing(request: pytest.FixtureRequest, mount: Mounter) -> Mounted:
    """A mount in each of its two ways to refuse, with a file ``f`` of 1 MiB."""
    mode: str = request.param
    mounted = mount(*(["direct_io"] if mode == "direct_io" else []))
    if mounted.facts["mode"] != mode:
        pytest.skip(f"no {mode} here: {mounted.ask('status')['passthrough_errno']}")
    sh("fallocate -l 1M f", mounted.path)
    return mounted


@pytest.mark.parametrize(
    "command",
    [
        "cat f", "cp f /dev/null", "dd if=f of=/dev/null bs=4k count=1", "md5sum f", "head -c1 f",
        "echo x >> f", "dd if=/dev/zero of=f bs=4k count=1 conv=notrunc",
    ],
)  # fmt: skip
def test_tools_are_told_invalid_argument(refusing: Mounted, command: str) -> None:
    said = sh(f"{command} && echo SUCCEEDED", refusing.path, check=False)
    assert "Invalid argument" in said or "I/O error" in said
    assert "SUCCEEDED" not in said


def test_reading_and_writing_is_refused(refusing: Mounted) -> None:
    with opened(refusing.path / "f") as fd:
        refused(errno.EINVAL, lambda: os.read(fd, 1))
        refused(errno.EINVAL, lambda: os.write(fd, b"x"))
        refused(errno.EINVAL, lambda: os.pread(fd, 1, PAGE))
        refused(errno.EINVAL, lambda: os.pwrite(fd, b"x", PAGE))
        refused(errno.EXDEV, lambda: _copy_range(fd))
    assert refusing.stat("f")["held"] == MIB


def _copy_range(fd: int) -> None:
    with open("/proc/self/exe", "rb") as source:
        os.copy_file_range(source.fileno(), fd, PAGE)


def test_shared_mappings_are_refused(refusing: Mounted) -> None:
    with opened(refusing.path / "f") as fd:
        for prot in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
            refused(errno.ENODEV, lambda prot=prot: mmap.mmap(fd, PAGE, mmap.MAP_SHARED, prot))
        refused(errno.EPERM, lambda: mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_EXEC))


def test_private_mappings_reach_no_memory(refusing: Mounted) -> None:
    with opened(refusing.path / "f") as fd:
        if refusing.facts["mode"] == "passthrough":
            refused(errno.ENODEV, lambda: mmap.mmap(fd, PAGE, mmap.MAP_PRIVATE))
            return
    touch = (
        "import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "print(mmap.mmap(fd, 4096, mmap.MAP_PRIVATE)[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", touch, refusing.path / "f"], capture_output=True, timeout=30,
        check=False,
    )  # fmt: skip
    assert done.returncode == -7, done  # SIGBUS
    assert done.stdout == b""


def test_o_direct_is_refused(refusing: Mounted) -> None:
    path = refusing.path / "f"
    refused(errno.EINVAL, lambda: os.open(path, os.O_RDWR | os.O_DIRECT))
    refused(
        errno.EINVAL, lambda: os.open(refusing.path / "new", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    )
    assert os.listdir(refusing.path).count("new") == 0


def test_nothing_is_executable_and_no_attribute_is_kept(refusing: Mounted) -> None:
    path = refusing.path / "f"
    path.chmod(0o755)
    refused(errno.EACCES, lambda: os.execv(path, ["f"]))
    refused(errno.EOPNOTSUPP, lambda: os.setxattr(path, "user.x", b"1"))
    assert os.listxattr(path) == []


# --- sizes -------------------------------------------------------------------------------------


def test_a_resizable_file_goes_up_and_down_by_pages(mount: Mounter) -> None:
    mounted = mount()
    with opened(mounted.path / "f") as fd:
        for size in (PAGE, 16 * MIB, 3 * PAGE, 0, 1 << 40):
            os.ftruncate(fd, size)
            assert os.fstat(fd).st_size == size
        refused(errno.EINVAL, lambda: os.ftruncate(fd, PAGE + 1))
        refused(errno.EFBIG, lambda: os.ftruncate(fd, 1 << 62))
        assert os.fstat(fd).st_size == 1 << 40
        os.ftruncate(fd, 4 * PAGE)
        fallocate(fd, 0, 4 * PAGE, 4 * PAGE)
        assert os.fstat(fd).st_size == 8 * PAGE
        refused(errno.EINVAL, lambda: fallocate(fd, KEEP_SIZE, 8 * PAGE, PAGE))
        refused(errno.EINVAL, lambda: fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 1, PAGE))
        refused(errno.EOPNOTSUPP, lambda: fallocate(fd, 0x08, 0, PAGE))  # COLLAPSE_RANGE


def test_a_guest_memfd_file_is_sized_once(mount: Mounter) -> None:
    mounted = mount("personality=guest_memfd")
    with opened(mounted.path / "f") as fd:
        refused(errno.EINVAL, lambda: os.ftruncate(fd, PAGE + 1))
        os.ftruncate(fd, 8 * PAGE)
        for size in (0, 4 * PAGE, 8 * PAGE, 16 * PAGE):
            refused(errno.EINVAL, lambda size=size: os.ftruncate(fd, size))
        refused(errno.EOPNOTSUPP, lambda: fallocate(fd, 0, 0, PAGE))
        refused(errno.EOPNOTSUPP, lambda: fallocate(fd, ZERO_RANGE, 0, PAGE))
        fallocate(fd, KEEP_SIZE, 0, 8 * PAGE)
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, 4 * PAGE)
        refused(errno.EINVAL, lambda: os.fchmod(fd, 0o600))
        refused(errno.EINVAL, lambda: os.fsync(fd))
    assert mounted.stat("f")["held"] == 4 * PAGE
    mounted.audit()


# --- life and death ----------------------------------------------------------------------------


def test_callers_of_a_killed_mount_are_answered_at_once(mount: Mounter) -> None:
    mounted = mount()
    waiting = (
        "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "print('open', flush=True); sys.stdin.readline(); print('calling', flush=True)\n"
        "try: os.ftruncate(fd, 4096)\n"
        "except OSError as error: print(error.errno)"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", waiting, mounted.path / "f"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert caller.stdout is not None
    assert caller.stdin is not None
    with caller, opened(mounted.path / "g") as fd:
        assert caller.stdout.readline() == "open\n"
        mounted.process.send_signal(19)  # SIGSTOP: the call will be under way when it dies
        os.waitid(os.P_PID, mounted.process.pid, os.WSTOPPED)
        caller.stdin.write("go\n")
        caller.stdin.flush()
        assert caller.stdout.readline() == "calling\n"
        while "fuse" not in _stack(caller.pid) and caller.poll() is None:
            time.sleep(0.01)
        mounted.kill()
        answer = caller.stdout.read()
        assert answer.strip() in (str(errno.ECONNABORTED), str(errno.ENOTCONN))
        refused(errno.ENOTCONN, lambda: os.fstat(fd))
        refused(errno.ENOTCONN, lambda: os.ftruncate(fd, 0))
        refused(errno.ENOTCONN, lambda: os.listdir(mounted.path))
    said = mounted.privfs("status", mounted.path)
    assert said.returncode == 5
    assert "privfs umount" in said.stderr


def _stack(pid: int) -> str:
    """Return where in the kernel a process waits; without the right to know, "fuse"."""
    try:
        return Path(f"/proc/{pid}/stack").read_text()
    except OSError:
        return "fuse"


def test_a_dead_mount_is_explained_and_cleared(mount: Mounter) -> None:
    dead = mount()
    dead.kill()
    refused(errno.ENOTCONN, lambda: os.listdir(dead.path))
    again = mount(at=dead.path, expected_log="killed; clearing its dead mount")
    assert "killed; clearing its dead mount" in again.log()
    sh(": > f", again.path)
    assert os.listdir(again.path) != []


def test_unusable_mount_points_are_explained(mount: Mounter, tmp_path: Path) -> None:
    plain = tmp_path / "file"
    plain.write_text("")
    for place, words in ((plain, "not a directory"), (tmp_path / "none", "mkdir")):
        said = privfs("mount", place)
        assert (said.returncode, words in said.stderr) == (3, True)


def test_a_second_mount_on_the_same_directory_is_refused(mount: Mounter) -> None:
    mounted = mount()
    said = privfs("mount", mounted.path)
    assert said.returncode == 3
    assert "already" in said.stderr
    sh(": > still", mounted.path)


@pytest.mark.parametrize("name", ["with blank", "größe", "back\\slash", "tab\there"])
def test_any_mount_point_will_do(mount: Mounter, tmp_path: Path, name: str) -> None:
    real = tmp_path / name
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    mounted = mount(at=link)
    sh("fallocate -l 1M f", mounted.path)
    assert mounted.stat("f")["held"] == MIB
    assert mounted.ask("status")["mountpoint"] == os.fspath(real)
    mounted.end()
    assert os.listdir(real) == []


def test_umount_works_on_an_idle_mount(mount: Mounter) -> None:
    mounted = mount()
    sh("fallocate -l 1M f", mounted.path)
    with opened(mounted.path / "f"):
        busy = subprocess.run(["umount", mounted.path], capture_output=True, check=False)
        assert busy.returncode == 32
    subprocess.run(["umount", mounted.path], check=True)
    assert mounted.process.wait(10) == 0


@pytest.mark.parametrize("number", [2, 15, 1], ids=["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_leave_nothing(mount: Mounter, number: int) -> None:
    mounted = mount()
    with opened(mounted.path / "f") as fd:
        fallocate(fd, 0, 0, MIB)
        mounted.process.send_signal(number)
        assert mounted.process.wait(10) == 0
        assert not mounted.is_mounted()
        refused(errno.ENOTCONN, lambda: os.fstat(fd))
    assert os.listdir(mounted.path) == []


def test_two_mounts_know_nothing_of_each_other(mount: Mounter) -> None:
    first, second = mount("size=4M"), mount("size=8M", "personality=guest_memfd")
    sh("fallocate -l 1M f", first.path)
    sh("truncate -s 1M f", second.path)
    assert (used(first), used(second)) == (MIB, 0)
    assert first.stat("f")["personality"] == "resizable"
    assert second.stat("f")["personality"] == "guest_memfd"
    refused(errno.EXDEV, lambda: os.rename(first.path / "f", second.path / "g"))
    refused(errno.EXDEV, lambda: os.link(first.path / "f", second.path / "g"))
    first.end()
    with opened(second.path / "f") as fd:
        fallocate(fd, KEEP_SIZE, 0, MIB)
    assert used(second) == MIB


def test_a_scan_ends_although_each_name_it_reads_makes_another(mount: Mounter) -> None:
    place = mount().path
    (place / "0").touch()
    seen = 0
    with os.scandir(place) as entries:
        for entry in entries:
            seen += 1
            (place / f"{entry.name}+{seen}"[-200:]).touch()
            assert seen < 10_000
    assert seen <= 3
