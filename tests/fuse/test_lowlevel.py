# SPDX-License-Identifier: GPL-2.0-or-later
"""The FUSE low-level layer against the running kernel.

The file system under test runs in a process of its own: this file, run as a script. It says what it
was asked on stdout, one JSON object per line, and takes commands on stdin.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import mmap
import os
import queue
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio
import trio.testing

from privfs.fuse import lowlevel
from privfs.fuse.lowlevel import pyfuse3

PAGE = 4096
NAMES = ["private", "slow", "stubborn", "broken", "text"]
PRIVATE = {"private", "slow", "stubborn", "broken"}
TEXT = b"readable\n"


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


class TestFS(lowlevel.Operations):
    """A root directory with NAMES; the inode number of NAMES[i] is i + 2, and so is its fh."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__()
        self.sizes = dict.fromkeys(NAMES, 1 << 20)
        self.sizes["text"] = len(TEXT)
        self.waiting: lowlevel.Request | None = None
        self.released = trio.Event()
        self.throttle = lowlevel.ReadThrottle()

    def name(self, inode: int) -> str:
        return NAMES[inode - 2]

    def entry(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.attr_timeout = entry.entry_timeout = 0
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = stat.S_IFDIR | 0o777
            entry.st_nlink = 2
        else:
            entry.st_mode = stat.S_IFREG | 0o666
            entry.st_size = self.sizes[self.name(inode)]
            entry.st_blocks = 8
        return entry

    async def lookup(self, parent_inode, name, ctx):
        if name.decode() not in NAMES:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.entry(NAMES.index(name.decode()) + 2)

    async def getattr(self, inode, ctx):
        return self.entry(inode)

    async def open(self, inode, flags, ctx):
        if flags & os.O_DIRECT:
            raise pyfuse3.FUSEError(errno.EINVAL)
        if self.name(inode) in PRIVATE:
            return lowlevel.private_file(inode)
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def create(self, parent_inode, name, mode, flags, ctx):
        NAMES.append(name.decode())
        self.sizes[name.decode()] = 0
        inode = NAMES.index(name.decode()) + 2
        return lowlevel.private_file(inode), self.entry(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):
        name = self.name(inode)
        say(op="setattr", file=name, size=attr.st_size, pid=ctx.pid)
        await self.behave(name, ctx.pid)
        if fields.update_size:
            self.sizes[name] = attr.st_size
        return self.entry(inode)

    async def fallocate(self, fh, mode, offset, length):
        name = self.name(fh)
        caller = lowlevel.current_request()
        say(
            op="fallocate", file=name, mode=mode, offset=offset, length=length,
            pid=caller.pid, uid=caller.uid, gid=caller.gid,
        )  # fmt: skip
        await self.behave(name, caller.pid)
        if length < PAGE:  # the test's way to ask for an errno
            raise pyfuse3.FUSEError(length)

    async def behave(self, name, pid):
        if name == "broken":
            raise RuntimeError("a mistake in a handler")
        if name == "slow":
            with lowlevel.interruptible() as scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught
            say(op="interrupted", file=name, killed=lowlevel.caller_killed(pid))
            raise pyfuse3.FUSEError(errno.EINTR)
        if name == "stubborn":
            self.waiting = lowlevel.current_request()
            await self.released.wait()
            self.waiting = None
            self.released = trio.Event()
            say(op="released")

    async def lseek(self, fh, offset, whence):
        say(op="lseek", file=self.name(fh), offset=offset, whence=whence)
        if self.name(fh) == "broken":
            return None  # a mistake of another kind
        if offset >= self.sizes[self.name(fh)]:
            raise pyfuse3.FUSEError(errno.ENXIO)
        return offset if whence == os.SEEK_DATA else self.sizes[self.name(fh)]

    async def read(self, fh, off, size):
        say(op="read", file=self.name(fh), time=trio.current_time())
        if self.name(fh) == "text":
            return TEXT[off : off + size]
        if self.name(fh) == "stubborn":
            await self.behave("stubborn", lowlevel.current_request().pid)
        await self.throttle.wait()
        raise pyfuse3.FUSEError(errno.EPERM)

    async def write(self, fh, off, buf):
        say(op="write", file=self.name(fh))
        raise pyfuse3.FUSEError(errno.EPERM)

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start_id, token):
        for i, name in enumerate(NAMES[start_id:], start_id):
            if not pyfuse3.readdir_reply(token, name.encode(), self.entry(i + 2), i + 1):
                return


async def commands(ops: TestFS, quit: trio.CancelScope) -> None:
    async with trio.lowlevel.FdStream(os.dup(0)) as stdin:
        async for line in stdin:
            for command in line.decode().split():
                if command == "release":
                    ops.released.set()
                if command == "terminate":
                    lowlevel.terminate()
                if command == "quit":
                    quit.cancel()
                if command == "probe" and ops.waiting is not None:
                    killed = lowlevel.caller_killed(ops.waiting.pid)
                    say(op="probe", interrupted=ops.waiting.interrupted, killed=killed)
    lowlevel.terminate()  # the test has gone


async def serve(mountpoint: str, mode: str, *options: str) -> None:
    ops = TestFS()
    seekable = "unseekable" not in options
    status = lowlevel.init(ops, mountpoint, mode=lowlevel.Mode(mode), seekable=seekable)
    if "fast" in options:
        lowlevel.install_fastwait()
    try:
        say(
            op="ready", mode=status.mode, daemon_reads=status.daemon_reads,
            passthrough_errno=status.passthrough_errno, libfuse=status.libfuse,
            protocol=status.protocol, kernel_protocol=status.kernel_protocol, pid=os.getpid(),
        )  # fmt: skip
        async with trio.open_nursery() as nursery:
            nursery.start_soon(commands, ops, nursery.cancel_scope)
            await lowlevel.main()
            nursery.cancel_scope.cancel()
    finally:
        lowlevel.close()


# ---- the tests' side


libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """Call once and give the errno: os.posix_fallocate would repeat EINTR."""
    call = libc.fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return 0 if call(fd, mode, offset, length) == 0 else ctypes.get_errno()


def errno_of(call, *args) -> int:
    try:
        call(*args)
    except OSError as exc:
        return exc.errno
    return 0


def mmap_errno(fd: int, flags: int, prot: int = mmap.PROT_READ) -> int:
    try:
        mmap.mmap(fd, PAGE, flags=flags, prot=prot).close()
    except OSError as exc:
        return exc.errno
    return 0


CALLER = """
import ctypes, os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open(sys.argv[1], os.O_RDWR)
if sys.argv[2] == "fallocate":
    r = libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(4096))
else:
    r = libc.ftruncate(fd, ctypes.c_int64(8192))
print(0 if r == 0 else ctypes.get_errno())
"""


class Daemon:
    """A test file system in a process of its own, and what it says."""

    def __init__(self, mountpoint: Path, mode: str, *options: str, unprivileged: bool) -> None:
        self.mountpoint = mountpoint
        command = [sys.executable, __file__, str(mountpoint), mode, *options]
        if unprivileged:
            command = ["unshare", "--user", "--map-root-user", "--mount", *command]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        # nobody can interrupt a caller that the daemon forgot: bound every test
        self._watchdog = threading.Timer(60, self.process.kill)
        self._watchdog.start()
        self._events: queue.Queue[dict] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.children: list[subprocess.Popen] = []
        self.ready = self.expect("ready")
        # seen from outside of its mount namespace too
        self.root = Path(f"/proc/{self.ready['pid']}/root{mountpoint}")

    def _read(self) -> None:
        for line in self.process.stdout:
            self._events.put(json.loads(line))

    def event(self) -> dict:
        return self._events.get(timeout=20)

    def expect(self, op: str) -> dict:
        event = self.event()
        assert event["op"] == op, event
        return event

    def quiet(self) -> bool:
        """Whether nothing reached the daemon until now: a request fences the question."""
        assert errno_of(os.stat, self.root / "text") == 0
        fd = os.open(self.root / "private", os.O_RDWR)
        try:
            assert fallocate(fd, 0, 0, 123 * PAGE) == 0
        finally:
            os.close(fd)
        return self.event().get("length") == 123 * PAGE

    def tell(self, command: str) -> None:
        self.process.stdin.write(command + "\n")

    def call(self, file: str, what: str = "fallocate") -> subprocess.Popen:
        """A process of its own in a system call on ``file`` that the daemon has begun to handle."""
        child = subprocess.Popen(
            [sys.executable, "-c", CALLER, str(self.root / file), what],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.children.append(child)
        event = self.expect("fallocate" if what == "fallocate" else "setattr")
        assert event["pid"] == child.pid
        return child

    def probe_until(self, key: str) -> None:
        for _ in range(2000):
            self.tell("probe")
            if self.expect("probe")[key]:
                return
        raise AssertionError(f"never {key}")

    def close(self) -> int:
        for child in self.children:
            child.kill()
        self.process.stdin.close()
        try:
            return self.process.wait(timeout=20)
        finally:
            self._watchdog.cancel()
            self.process.kill()
            self.process.wait()
            self._reader.join()
            self.process.stdout.close()
            for child in self.children:
                child.communicate()
            if str(self.mountpoint) in Path("/proc/self/mounts").read_text():
                subprocess.run(["umount", "--lazy", self.mountpoint], check=True)
                pytest.fail(f"{self.mountpoint} was left mounted")


def missing() -> str | None:
    """What keeps this machine from mounting, if anything."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no access to /dev/fuse"
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True)
    return "no right to mount (CAP_SYS_ADMIN)" if probe.returncode else None


def initial_root() -> bool:
    whole = Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]
    return os.geteuid() == 0 and whole


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """Start daemons; each must end with exit status 0, unmounted, if the test did not end it."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    daemons: list[Daemon] = []

    def begin(mode: str = "passthrough", *options: str, unprivileged: bool = False):
        mountpoint = tmp_path / f"mnt{len(daemons)}"
        mountpoint.mkdir()
        daemons.append(Daemon(mountpoint, mode, *options, unprivileged=unprivileged))
        return daemons[-1]

    yield begin
    statuses = [daemon.close() for daemon in daemons]
    assert all(status in (0, -signal.SIGKILL) for status in statuses)


@pytest.fixture
def root_only() -> None:
    if not initial_root():
        pytest.skip("FUSE passthrough needs uid 0 in the initial user namespace")


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ZERO = 16  # FALLOC_FL_ZERO_RANGE


@pytest.mark.fuse
@pytest.mark.parametrize("fast", [False, True])
def test_fallocate_arrives_and_its_errno_comes_back(start, fast):
    daemon = start("passthrough", *["fast"] * fast)
    with opened(daemon.root / "private") as fd:
        for mode in (0, 1, PUNCH, ZERO, ZERO | 1):
            for offset, length in ((0, PAGE), (3 * PAGE, 5 * PAGE), (1 << 62, 1 << 40)):
                assert fallocate(fd, mode, offset, length) == 0
                event = daemon.expect("fallocate")
                assert (event["mode"], event["offset"], event["length"]) == (mode, offset, length)
                assert event["pid"] == threading.get_native_id()
                assert (event["uid"], event["gid"]) == (os.getuid(), os.getgid())
        for code in (errno.EINVAL, errno.EPERM, errno.EFBIG, errno.ENOSPC, errno.EINTR):
            assert fallocate(fd, 0, 0, code) == code
            daemon.expect("fallocate")


@pytest.mark.fuse
def test_enosys_of_fallocate_does_not_stick(start):
    daemon = start()
    with opened(daemon.root / "private") as fd:
        for _ in range(2):
            assert fallocate(fd, 0, 0, errno.ENOSYS) == errno.EOPNOTSUPP
            daemon.expect("fallocate")
        assert fallocate(fd, 0, 0, PAGE) == 0


@pytest.mark.fuse
def test_lseek_data_and_hole(start):
    daemon = start()
    with opened(daemon.root / "private") as fd:
        assert os.lseek(fd, 5 * PAGE, os.SEEK_DATA) == 5 * PAGE
        event = daemon.expect("lseek")
        assert (event["offset"], event["whence"]) == (5 * PAGE, os.SEEK_DATA)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 1 << 20
        assert daemon.expect("lseek")["whence"] == os.SEEK_HOLE
        assert errno_of(os.lseek, fd, 1 << 20, os.SEEK_DATA) == errno.ENXIO


@pytest.mark.fuse
def test_extended_attributes_are_refused_without_the_handlers(start):
    daemon = start()
    path = daemon.root / "private"
    assert errno_of(os.getxattr, path, "user.x") == errno.EOPNOTSUPP
    assert errno_of(os.setxattr, path, "user.x", b"1") == errno.EOPNOTSUPP
    assert errno_of(os.removexattr, path, "user.x") == errno.EOPNOTSUPP
    assert errno_of(os.setxattr, path, "", b"1") == errno.ERANGE
    assert errno_of(os.getxattr, path, "") == errno.ERANGE
    assert os.listxattr(path) == []
    assert daemon.quiet()


@pytest.mark.fuse
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("what", ["fallocate", "ftruncate"])
def test_a_signal_interrupts_a_willing_handler(start, what, fast):
    daemon = start("passthrough", *["fast"] * fast)
    child = daemon.call("slow", what)
    os.kill(child.pid, signal.SIGUSR1)
    assert daemon.expect("interrupted")["killed"] is False
    out, _ = child.communicate(timeout=20)
    assert (child.returncode, int(out)) == (0, errno.EINTR)


@pytest.mark.fuse
def test_others_are_served_while_one_waits(start):
    daemon = start()
    child = daemon.call("slow")
    with opened(daemon.root / "private") as fd:
        assert fallocate(fd, 0, 0, PAGE) == 0
        daemon.expect("fallocate")
        assert os.fstat(fd).st_size == 1 << 20
    assert child.poll() is None


@pytest.mark.fuse
@pytest.mark.parametrize("what", ["fallocate", "ftruncate"])
def test_a_killed_caller_is_recognised_and_let_go(start, what):
    daemon = start()
    child = daemon.call("slow", what)
    child.kill()
    assert daemon.expect("interrupted")["killed"] is True
    assert child.wait(timeout=20) == -signal.SIGKILL


@pytest.mark.fuse
@pytest.mark.parametrize("what", ["fallocate", "ftruncate"])
def test_a_handler_may_ignore_interrupts(start, what):
    daemon = start()
    child = daemon.call("stubborn", what)
    daemon.tell("probe")
    assert daemon.expect("probe") == {"op": "probe", "interrupted": False, "killed": False}
    os.kill(child.pid, signal.SIGUSR1)
    daemon.probe_until("interrupted")
    daemon.tell("probe")
    assert daemon.expect("probe")["killed"] is False
    daemon.tell("release")
    daemon.expect("released")
    out, _ = child.communicate(timeout=20)
    assert (child.returncode, int(out)) == (0, 0)


@pytest.mark.fuse
def test_sigkill_is_seen_by_a_handler_that_ignores_interrupts(start):
    daemon = start()
    child = daemon.call("stubborn")
    child.kill()
    daemon.probe_until("killed")
    assert child.poll() is None  # in state D until its answer
    daemon.tell("release")
    daemon.expect("released")
    assert child.wait(timeout=20) == -signal.SIGKILL


@pytest.mark.fuse
@pytest.mark.root
def test_passthrough_refuses_in_the_kernel(start, root_only):
    daemon = start("passthrough")
    if daemon.ready["passthrough_errno"] == errno.EOPNOTSUPP:
        pytest.skip("the kernel has no FUSE passthrough (Linux 6.9, CONFIG_FUSE_PASSTHROUGH)")
    assert daemon.ready["passthrough_errno"] == 0
    assert (daemon.ready["mode"], daemon.ready["daemon_reads"]) == ("passthrough", False)
    for path, flags in (("private", os.O_RDWR), ("born", os.O_RDWR | os.O_CREAT | os.O_EXCL)):
        with opened(daemon.root / path, flags) as fd:
            os.ftruncate(fd, 4 * PAGE)
            daemon.expect("setattr")
            for how in (mmap.MAP_SHARED, mmap.MAP_PRIVATE, mmap.MAP_PRIVATE | mmap.MAP_POPULATE):
                assert mmap_errno(fd, how) == errno.ENODEV
                assert mmap_errno(fd, how, mmap.PROT_READ | mmap.PROT_WRITE) == errno.ENODEV
            assert errno_of(os.read, fd, 10) == errno.EINVAL
            assert errno_of(os.write, fd, b"x") == errno.EINVAL
            assert errno_of(os.preadv, fd, [bytearray(10)], 0) == errno.EINVAL
    assert daemon.quiet()
    assert errno_of(os.open, daemon.root / "private", os.O_RDWR | os.O_DIRECT) == errno.EINVAL
    assert (daemon.root / "text").read_bytes() == TEXT  # beside ordinary files


@pytest.mark.fuse
@pytest.mark.root
def test_passthrough_with_direct_io_lets_the_daemon_choose_the_errno(start, root_only):
    daemon = start("passthrough+direct_io")
    if daemon.ready["passthrough_errno"] == errno.EOPNOTSUPP:
        pytest.skip("the kernel has no FUSE passthrough (Linux 6.9, CONFIG_FUSE_PASSTHROUGH)")
    assert (daemon.ready["mode"], daemon.ready["daemon_reads"]) == ("passthrough", True)
    with opened(daemon.root / "private") as fd:
        assert mmap_errno(fd, mmap.MAP_SHARED) == errno.ENODEV
        assert mmap_errno(fd, mmap.MAP_PRIVATE) == errno.ENODEV
        assert errno_of(os.read, fd, 10) == errno.EPERM
        daemon.expect("read")
        assert errno_of(os.write, fd, b"x") == errno.EPERM
        daemon.expect("write")


def direct_io_rules(daemon: Daemon) -> None:
    assert (daemon.ready["mode"], daemon.ready["daemon_reads"]) == ("direct_io", True)
    with opened(daemon.root / "private") as fd:
        assert fallocate(fd, PUNCH, PAGE, PAGE) == 0
        daemon.expect("fallocate")
        assert mmap_errno(fd, mmap.MAP_SHARED) == errno.ENODEV
        assert mmap_errno(fd, mmap.MAP_PRIVATE) == 0
        assert errno_of(os.read, fd, 10) == errno.EPERM
        daemon.expect("read")
        assert errno_of(os.write, fd, b"x") == errno.EPERM
        daemon.expect("write")


@pytest.mark.fuse
def test_direct_io_on_request(start):
    daemon = start("direct_io")
    assert daemon.ready["passthrough_errno"] == 0
    direct_io_rules(daemon)


@pytest.mark.fuse
def test_direct_io_by_itself_without_privilege(start):
    daemon = start("passthrough", unprivileged=True)
    assert daemon.ready["passthrough_errno"] == errno.EPERM
    direct_io_rules(daemon)


@pytest.mark.fuse
def test_direct_io_files_that_are_not_seekable(start):
    """As files without llseek: every call at an offset is refused and wakes nobody."""
    daemon = start("direct_io", "unseekable")
    with opened(daemon.root / "private") as fd:
        for whence in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE):
            assert errno_of(os.lseek, fd, 0, whence) == errno.ESPIPE
        assert errno_of(os.pread, fd, 10, 0) == errno.ESPIPE
        assert errno_of(os.pwrite, fd, b"x", 0) == errno.ESPIPE
    assert daemon.quiet()
    direct_io_rules(daemon)


@pytest.mark.fuse
def test_a_reader_does_not_wait_for_another_where_there_is_no_position(start):
    """FOPEN_STREAM: no lock of f_pos is held while a READ is under way (FMODE_ATOMIC_POS)."""
    daemon = start("direct_io", "unseekable")
    with opened(daemon.root / "stubborn") as fd, ThreadPoolExecutor(2) as pool:
        both = [pool.submit(errno_of, os.read, fd, 10) for _ in range(2)]
        daemon.expect("read")
        daemon.expect("read")  # while the first one is not answered
        daemon.tell("release")
        assert [one.result(timeout=20) for one in both] == [errno.EPERM, errno.EPERM]
        daemon.expect("released")
        daemon.expect("released")


@pytest.mark.fuse
@pytest.mark.root
def test_passthrough_leaves_files_seekable(start, root_only):
    daemon = start("passthrough", "unseekable")
    if daemon.ready["passthrough_errno"] == errno.EOPNOTSUPP:
        pytest.skip("the kernel has no FUSE passthrough (Linux 6.9, CONFIG_FUSE_PASSTHROUGH)")
    with opened(daemon.root / "private") as fd:
        assert os.lseek(fd, PAGE, os.SEEK_SET) == PAGE
        assert errno_of(os.pread, fd, 10, 0) == errno.EINVAL


@pytest.mark.fuse
def test_populate_in_direct_io_mode_is_throttled_and_can_be_killed(start):
    daemon = start("direct_io")
    path = str(daemon.root / "private")
    script = (
        "import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDWR); "
        "mmap.mmap(fd, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE, prot=mmap.PROT_READ)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, path])
    daemon.children.append(child)
    times = [daemon.expect("read")["time"] for _ in range(12)]
    child.kill()
    assert child.wait(timeout=20) == -signal.SIGKILL
    assert times[-1] - times[1] >= 0.02 * 9.5


@pytest.mark.fuse
def test_mistakes_in_handlers_do_not_end_the_mount(start):
    daemon = start()
    with opened(daemon.root / "broken") as fd:
        assert fallocate(fd, 0, 0, PAGE) == errno.EIO
        assert errno_of(os.ftruncate, fd, PAGE) == errno.EIO
        assert errno_of(os.lseek, fd, 0, os.SEEK_DATA) == errno.EIO
    for op in ("fallocate", "setattr", "lseek"):
        daemon.expect(op)
    assert daemon.quiet()


@pytest.mark.fuse
def test_status_names_versions(start):
    ready = start().ready
    assert ready["libfuse"].startswith("3.")
    assert ready["protocol"][0] == ready["kernel_protocol"][0] == 7
    assert 19 <= ready["protocol"][1] <= ready["kernel_protocol"][1]


@pytest.mark.fuse
def test_a_caller_in_a_request_is_freed_when_the_daemon_dies(start):
    daemon = start(unprivileged=True)  # its mount dies with its namespace
    child = daemon.call("stubborn")
    daemon.process.kill()
    out, _ = child.communicate(timeout=20)
    assert int(out) == errno.ECONNABORTED
    assert daemon.close() == -signal.SIGKILL


@pytest.mark.fuse
@pytest.mark.parametrize("fast", [False, True])
def test_terminate_interrupts_the_willing_and_waits_for_the_others(start, fast):
    daemon = start("passthrough", *["fast"] * fast)
    willing, other = daemon.call("slow"), daemon.call("stubborn")
    daemon.tell("terminate")
    assert daemon.expect("interrupted")["killed"] is False
    out, _ = willing.communicate(timeout=20)
    assert int(out) == errno.EINTR
    assert (daemon.process.poll(), other.poll()) == (None, None)
    daemon.tell("release")
    out, _ = other.communicate(timeout=20)
    assert int(out) == 0
    assert daemon.process.wait(timeout=20) == 0


@pytest.mark.fuse
def test_a_withdrawn_request_cannot_block_the_daemon(start):
    process = Path(f"/proc/{start().ready['pid']}")
    links = [fd.name for fd in (process / "fd").iterdir() if os.readlink(fd) == "/dev/fuse"]
    assert len(links) == 1  # the descriptor borrowed during INIT is given back
    fields = dict(
        line.split(":", 1) for line in (process / "fdinfo" / links[0]).read_text().splitlines()
    )
    assert int(fields["flags"], 8) & os.O_NONBLOCK


@pytest.mark.fuse
def test_leaving_main_by_cancellation_frees_callers_and_unmounts(start):
    daemon = start()
    child = daemon.call("stubborn")
    daemon.tell("quit")
    out, _ = child.communicate(timeout=20)
    assert int(out) == errno.ECONNABORTED
    assert daemon.process.wait(timeout=20) == 0


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
    )


def test_pyfuse3_may_not_be_imported_first():
    done = python("import pyfuse3\nimport privfs.fuse.lowlevel")
    assert done.returncode == 1
    assert "ImportError: pyfuse3 was imported before privfs.fuse.lowlevel" in done.stderr


@pytest.mark.fuse
def test_init_notices_a_pyfuse3_that_goes_past_it(tmp_path):
    if (reason := missing()) is not None:
        pytest.skip(reason)
    code = f"""
import sys, pyfuse3
del sys.modules["pyfuse3"]
from privfs.fuse import lowlevel
lowlevel.init(lowlevel.Operations(), {str(tmp_path)!r})
"""
    done = python(code, LD_BIND_NOW="1")
    assert done.returncode == 1
    assert "does not call libfuse" in done.stderr
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_caller_killed():
    assert not lowlevel.caller_killed(os.getpid())
    assert not lowlevel.caller_killed(threading.get_native_id())
    assert not lowlevel.caller_killed(0)
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    assert not lowlevel.caller_killed(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert lowlevel.caller_killed(child.pid)  # a zombie
    child.communicate()
    assert lowlevel.caller_killed(child.pid)  # gone


def test_outside_a_request():
    with pytest.raises(LookupError):
        lowlevel.current_request()
    with pytest.raises(RuntimeError, match=r"lowlevel\.init"):
        lowlevel.status()

    async def body() -> None:
        with lowlevel.interruptible() as scope:
            await trio.lowlevel.checkpoint()
        assert not scope.cancelled_caught

    trio.run(body)


def test_read_throttle_spaces_back_to_back_reads():
    async def body() -> list[float]:
        throttle = lowlevel.ReadThrottle(0.02)
        times = []
        for pause in (0, 0, 0, 1.0, 0):
            await trio.sleep(pause)
            await throttle.wait()
            times.append(trio.current_time() - began)
        return times

    clock = trio.testing.MockClock(autojump_threshold=0)
    began = clock.current_time()
    times = trio.run(body, clock=clock)
    assert times == pytest.approx([0, 0.02, 0.04, 1.04, 1.06], abs=1e-6)


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr)
    trio.run(serve, *sys.argv[1:])
