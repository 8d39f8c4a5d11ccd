# SPDX-License-Identifier: GPL-2.0-or-later
"""What the statements of a session script do; every wait is bounded and woken by its event."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from kvmsim.cli.exitcodes import Exit, exit_code
from kvmsim.cli.failure import Failure, check_memory, explained
from kvmsim.cli.hosts import make_host
from kvmsim.cli.vms import make_vm, opened_disk
from kvmsim.confidential.platform import Platform
from kvmsim.console import ConsoleVm, Lines
from kvmsim.control import Control, NoControl, answering
from kvmsim.images import read_kernel
from kvmsim.script import Expect, Holds, Host, Output, Poison, Say, Send, Statement, Stop, Vm, Wait
from kvmsim.uapi import PAGE_SIZE

#: Seconds that a host command may take.
HOST_TIMEOUT: Final = 60.0
_KEPT_LINES: Final = 100_000
_SHOWN: Final = 200
_STOP_TIMEOUT: Final = 15.0
#: What a shell returns for a command that it could not execute or find.
_NOT_RUN: Final = (126, 127)


class NotHeld(Exception):
    """A statement did not hold; the text says what was expected and what was seen."""


class Console:
    """The lines that a VM has printed, and which of them have been expected already."""

    def __init__(self) -> None:
        self.last = ""
        self.ended = False
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._cut = Lines()

    def output(self, data: bytes) -> None:
        """Take console output."""
        with self._lock:
            for line in self._cut.feed(data):
                self.last = line
                self._lines.append(line)
            self._changed.notify_all()

    def end(self) -> None:
        """Wake who waits: there will be no more."""
        with self._lock:
            self.ended = True
            self._changed.notify_all()

    def expect(self, regex: re.Pattern[str], within: float) -> bool:
        """Wait for a line; lines up to it are done with."""
        deadline = time.monotonic() + within
        with self._lock:
            while True:
                while self._lines:
                    if regex.search(self._lines.popleft()):
                        return True
                left = deadline - time.monotonic()
                if self.ended or left <= 0:
                    return False
                self._changed.wait(left)


class Session:
    """A script under way: its VMs, in this one process, and its last host command."""

    def __init__(
        self,
        variables: Mapping[str, str],
        say: Callable[[str], None],
        fence: str,
        control: Control | NoControl,
    ) -> None:
        self._control = control
        self._variables = dict(variables)
        self._say = say
        self._host = make_host(fence)
        self._platform = Platform(self._host)
        self._disks = contextlib.ExitStack()
        self._vms: dict[str, tuple[ConsoleVm, Console]] = {}
        self._output = ""
        self._groups: list[int] = []

    def run(self, statement: Statement) -> None:
        """Do what a statement says; raises NotHeld."""
        try:
            match statement.action:
                case Vm():
                    self._boot(statement.action)
                case Send(vm, text):
                    self._send(vm, text)
                case Expect():
                    self._expect(statement.action)
                case Host(command, fails):
                    self._command(command, fails=fails)
                case Output(regex):
                    if not regex.search(self._output):
                        raise NotHeld(
                            f"expected output like /{regex.pattern}/, the command printed "
                            f"{_tail(self._output)}"
                        )
                case Holds(vm, sides):
                    self._holds(vm, sides)
                case Poison(vm, gpa):
                    self._poison(vm, gpa)
                case Stop(vm):
                    self._stop(vm)
                case Wait():
                    self._wait(statement.action)
                case Say(text):
                    self._say(text)
        except Failure as failure:
            raise NotHeld(str(failure)) from failure

    def _boot(self, wanted: Vm) -> None:
        for memory in wanted.memory:
            check_memory(memory, wanted.kind)
        disk = self._disks.enter_context(opened_disk(wanted.disk))
        console = Console()
        with explained():
            image = read_kernel(wanted.kernel)
            vm = make_vm(
                self._host, wanted, console.output, console.end,
                platform=self._platform, disk=disk,
            )  # fmt: skip
        self._vms[wanted.name] = (vm, console)
        self._control.add(wanted.name, vm.report, vm.tables)
        with explained():
            vm.boot(image)

    def _send(self, name: str, text: str) -> None:
        vm, console = self._vms[name]
        if console.ended:
            raise NotHeld(f"cannot send {text!r}: {self._how_it_ended(name)}")
        vm.feed(text.encode() + b"\n")

    def _expect(self, wanted: Expect) -> None:
        _, console = self._vms[wanted.vm]
        if console.expect(wanted.regex, wanted.within):
            return
        what = f"expected {wanted.vm} to print a line like /{wanted.regex.pattern}/"
        why = f"but not within {wanted.within:g} s"
        if console.ended:
            why = f"but {self._how_it_ended(wanted.vm)}"
        raise NotHeld(f"{what}, {why}; its last line was {_tail(console.last)}")

    def _how_it_ended(self, name: str) -> str:
        ending = self._vms[name][0].ending(0)
        return f"{name} has ended: {ending.message if ending else 'for no known reason'}"

    def _holds(self, name: str, wanted: tuple[tuple[str, int], ...]) -> None:
        with explained():
            slots = self._vms[name][0].allocated().values()
        for side, count in wanted:
            found = sum(getattr(slot, side) for slot in slots) * PAGE_SIZE
            if found != count:
                raise NotHeld(f"expected {name} to hold {side}={count} bytes, it holds {found}")

    def _poison(self, name: str, gpa: int) -> None:
        try:
            self._vms[name][0].inject_memory_error(gpa)
        except ValueError as error:
            raise NotHeld(str(error)) from None

    def _stop(self, name: str) -> None:
        vm, _ = self._vms[name]
        vm.stop("stopped by the script")
        if vm.ending(_STOP_TIMEOUT) is None:
            raise NotHeld(f"expected {name} to stop, but not within {_STOP_TIMEOUT:g} s")
        self._forget(name)

    def _wait(self, wanted: Wait) -> None:
        vm, console = self._vms[wanted.vm]
        ending = vm.ending(wanted.within)
        if ending is None:
            raise NotHeld(
                f"expected {wanted.vm} to end, but not within {wanted.within:g} s; its last line "
                f"was {_tail(console.last)}"
            )
        status = exit_code(ending)
        if status != wanted.status:
            raise NotHeld(
                f"expected {wanted.vm} to end with {wanted.status}, but it ended with "
                f"{int(status)}: {ending.message}"
            )
        self._forget(wanted.vm)

    def _forget(self, name: str) -> None:
        vm, _ = self._vms.pop(name)
        self._control.remove(name)
        vm.close()

    def _command(self, command: str, *, fails: bool) -> None:
        """Run a shell command; its output goes to a file, since it may leave others behind."""
        with tempfile.TemporaryFile() as printed:
            process = subprocess.Popen(
                ["sh", "-uc", command],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                env=os.environ | self._variables,
                start_new_session=True,
            )
            self._groups.append(process.pid)
            try:
                status = process.wait(HOST_TIMEOUT)
            except BaseException as error:
                _kill_group(process.pid)
                process.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise NotHeld(f"{command!r} did not end within {HOST_TIMEOUT:g} s") from None
                raise
            printed.seek(0)
            self._output = printed.read().decode("utf-8", "replace")
        if fails and status in _NOT_RUN:
            raise NotHeld(f"{command!r} was to be refused, but it was not run: {self._printed()}")
        if fails is (status == 0):
            wish = "another status than 0" if fails else "0"
            raise NotHeld(f"{command!r}: expected {wish}, got {status}; it printed "
                          f"{self._printed()}")  # fmt: skip

    def _printed(self) -> str:
        return _tail(self._output)

    def close(self) -> None:
        """End every VM and every process that a host command left in its group."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._disks)  # last of all: no VM uses them any more
            stack.callback(self._host.close)
            for name, (vm, _) in self._vms.items():
                stack.callback(vm.close)
                stack.callback(self._control.remove, name)
            for group in self._groups:
                stack.callback(_kill_group, group)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _tail(text: str) -> str:
    """Return the end of a text as one quoted line."""
    text = text.strip()
    short = text if len(text) <= _SHOWN else "…" + text[-_SHOWN:]
    return repr(short) if short else "nothing"


@contextlib.contextmanager
def session(
    variables: Mapping[str, str], say: Callable[[str], None], fence: str
) -> Iterator[Session]:
    """Return a session that leaves nothing behind."""
    with answering() as control:
        made = Session(variables, say, fence, control)
        try:
            yield made
        finally:
            made.close()


def play(
    path: str,
    statements: tuple[Statement, ...],
    variables: Mapping[str, str],
    say: Callable[[str], None],
    fence: str,
) -> None:
    """Run a script to its end; Failure names file and line of what did not hold."""
    with session(variables, say, fence) as running:
        for statement in statements:
            try:
                running.run(statement)
            except NotHeld as error:
                raise Failure(Exit.FAILED, f"{path}:{statement.line}: {error}") from error
