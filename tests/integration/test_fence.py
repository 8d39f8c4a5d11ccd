# SPDX-License-Identifier: GPL-2.0-or-later
"""What userfaultfd can do for us: the kernel itself stops a user that did not unmap.

The user maps an extent under MISSING|MINOR and hands a copy of the userfaultfd to the owner.
After a punch, a touch through the stale mapping sleeps and allocates nothing, whatever the user
does; what the kernel touches on its behalf fails.  Installation is then CONTINUE of the granted
pages before the table entry is stored, also from an engine's fault hook.  Only a program that goes
on can lift the fence, by the same CONTINUE: so a fence proves something once its user is killed.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hwemu.cpu.api import Access, HltExit
from hwemu.testing import HEAP, Machine
from kvmsim.fence.userfault import Userfault

try:
    Userfault().close()
except OSError as error:
    pytestmark = pytest.mark.skip(reason=f"no fence: {error.strerror}")

PAGE = 4096
PAGES = 16
_PUNCH = 3
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

USER = """
import array, mmap, os, socket, sys, ctypes
sys.path.insert(0, sys.argv[2])
from kvmsim.fence.userfault import Userfault
libc = ctypes.CDLL(None, use_errno=True)
sock = socket.socket(fileno=int(sys.argv[1]))
_, anc, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(4))
fd = array.array("i", anc[0][2])[0]
memory = mmap.mmap(fd, 16 * 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
userfault = Userfault()
userfault.register(address, 16 * 4096)
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [userfault.fd]))]
sock.sendmsg([address.to_bytes(8, "little")], rights)
while True:
    command = sock.recv(1)
    if not command:
        break
    if command == b"c":  # a grant: install
        userfault.resume(address, 4096)
        sock.send(b"k")
    if command == b"r":  # a system call that stores to it
        pipe = os.pipe()
        os.write(pipe[1], b"x")
        failed = libc.read(pipe[0], ctypes.c_void_p(address), 1) < 0
        sock.send(bytes([ctypes.get_errno() if failed else 0]))
    if command == b"t":  # a touch, granted or not
        sock.send(memory[0:1])
    if command == b"w":
        memory[0] = 0x55
        sock.send(b"k")
"""


class Copy(Userfault):
    """The owner's copy of a user's userfaultfd."""

    def __init__(self, fd: int) -> None:
        self.fd = fd


class User:
    """A user process that maps one extent under a fence."""

    def __init__(self) -> None:
        self.memfd = os.memfd_create("extent", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memfd, PAGES * PAGE)
        fcntl.fcntl(self.memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        self.sock, theirs = socket.socketpair()
        root = str(Path(__file__).parents[2])
        arguments = [sys.executable, "-c", USER, str(theirs.fileno()), root]
        self.process = subprocess.Popen(arguments, pass_fds=[theirs.fileno()])
        theirs.close()
        self.sock.settimeout(20)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self.memfd]))]
        self.sock.sendmsg([b"f"], rights)
        data, ancillary, _, _ = self.sock.recvmsg(8, socket.CMSG_SPACE(4))
        self.address = int.from_bytes(data, "little")
        self.copy = Copy(array.array("i", ancillary[0][2])[0])

    def say(self, command: bytes) -> bytes:
        self.sock.send(command)
        return self.sock.recv(1)

    def fault(self) -> int:
        """Wait until the user sleeps in a touch; return where."""
        poll = select.poll()
        poll.register(self.copy.fd, select.POLLIN)
        assert poll.poll(20_000), "no fault was reported"
        address = self.copy.next_fault()
        assert address is not None
        return address

    @property
    def blocks(self) -> int:
        return os.fstat(self.memfd).st_blocks

    def allocate(self) -> None:
        assert _libc.fallocate(self.memfd, 0, 0, PAGE) == 0

    def punch(self) -> None:
        assert _libc.fallocate(self.memfd, _PUNCH, 0, PAGE) == 0

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.sock.close()
        self.copy.close()
        os.close(self.memfd)


@pytest.fixture
def user() -> Iterator[User]:
    user = User()
    yield user
    user.close()


def test_a_granted_page_is_installed_by_continue(user: User) -> None:
    user.allocate()
    assert user.say(b"c") == b"k"
    assert user.say(b"w") == b"k"
    assert user.say(b"t") == b"\x55"


def test_a_touch_after_the_punch_sleeps_and_allocates_nothing(user: User) -> None:
    user.allocate()
    user.say(b"c")
    user.say(b"w")
    user.punch()
    user.sock.send(b"w")  # the user did not unmap: a store through the stale mapping
    assert user.fault() & -PAGE == user.address
    assert user.blocks == 0


def test_the_owner_answers_the_touch_from_its_own_process(user: User) -> None:
    user.allocate()
    user.say(b"c")
    user.say(b"w")
    user.punch()
    user.sock.send(b"t")
    user.fault()
    user.allocate()
    user.copy.resume(user.address, PAGE)
    assert user.sock.recv(1) == b"\0"


def test_a_touch_of_a_page_that_was_never_granted_sleeps(user: User) -> None:
    user.allocate()
    user.sock.send(b"t")
    user.fault()
    assert user.blocks == PAGE // 512


def test_killing_the_sleeper_leaves_the_fence_and_no_page(user: User) -> None:
    user.sock.send(b"w")
    user.fault()
    user.process.kill()
    user.process.wait()
    assert user.blocks == 0


@pytest.mark.parametrize("owned", [False, True])
def test_what_the_kernel_stores_for_the_user_is_refused_as_well(user: User, owned: bool) -> None:
    """The rest of a system call, say, of a process that was killed meanwhile."""
    user.allocate()
    user.say(b"c")
    user.punch()
    if owned:
        user.allocate()  # the next owner's
    assert user.say(b"r") == bytes([errno.EFAULT])
    assert user.blocks == (PAGE // 512 if owned else 0)
    assert os.pread(user.memfd, 1, 0) == b"\0"


def test_a_user_that_goes_on_can_lift_its_own_fence(user: User) -> None:
    """Why a stopped user is no proof: it may install what it was granted before it stopped.

    Its own check came before the punch; CONTINUE looks only at what the file has now.
    """
    user.allocate()
    user.process.send_signal(signal.SIGSTOP)
    user.sock.send(b"c")  # stopped between the check and this
    user.punch()
    user.allocate()
    os.pwrite(user.memfd, b"next", 0)
    user.process.send_signal(signal.SIGCONT)
    assert user.sock.recv(1) == b"k"
    assert user.say(b"t") == b"n"


class FencedMachine(Machine):
    """A machine whose memory is fenced: its fault hook continues what it is about to map."""

    userfault: Userfault | None = None

    def on_fault(self, gpa: int, access: Access) -> bool:
        if self.userfault is not None:
            page = gpa & -PAGE
            assert _libc.fallocate(self.fd, 0, page, PAGE) == 0
            self.userfault.resume(self.address + page, PAGE)
        return super().on_fault(gpa, access)

    @property
    def address(self) -> int:
        return self.arena.address + self.hpa - self.arena.hpa_base


def test_an_engine_runs_over_a_fenced_arena() -> None:
    """The fault hook allocates, continues, then stores the entry: the engine never sleeps."""
    with FencedMachine(size=2 << 20) as machine:
        machine.userfault = Userfault()
        try:
            machine.userfault.register(machine.address, machine.size)
            store = "48c7042500000400" + "77000000" + "f4"  # mov qword [0x40000], 0x77; hlt
            cpu = machine.boot(bytes.fromhex(store))
            assert isinstance(cpu.run(), HltExit)
            assert machine.word(HEAP) == 0x77
        finally:
            machine.userfault.close()
