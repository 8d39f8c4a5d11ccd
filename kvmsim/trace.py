# SPDX-License-Identifier: GPL-2.0-or-later
"""What a trace tells of a VM, and how: the kernel's text, JSON lines, Chrome's JSON.

An event has the name and the text of the kernel's tracepoint where there is one
(:data:`TRACEPOINTS`), so that scripts which read /sys/kernel/tracing/trace read this. Events named
``kvmsim_`` have no tracepoint in the kernel. Page contents are never told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Protocol


@dataclass(frozen=True, slots=True)
class Tracepoint:
    """How an event's fields become text (str.format), and where that text comes from."""

    text: str
    source: str


_X86: Final = "arch/x86/kvm/trace.h"
_GENERIC: Final = "include/trace/events/kvm.h"
_OWN: Final = "this project"

TRACEPOINTS: Final[Mapping[str, Tracepoint]] = MappingProxyType(
    {
        "kvm_entry": Tracepoint("vcpu {vcpu}, rip {rip:#x}", _X86),
        "kvm_exit": Tracepoint(
            "vcpu {vcpu} reason {reason} rip {rip:#x} info1 {info1:#018x} info2 {info2:#018x} "
            "intr_info 0x00000000 error_code 0x00000000",
            _X86,
        ),
        "kvm_page_fault": Tracepoint(
            "vcpu {vcpu} rip {rip:#x} address {address:#018x} error_code {error_code:#x}", _X86
        ),
        "kvm_pio": Tracepoint(
            "pio_{direction} at {port:#x} size {size} count {count} val {val:#x} ", _X86
        ),
        "kvm_hypercall": Tracepoint("nr {nr:#x} a0 {a0:#x} a1 {a1:#x} a2 {a2:#x} a3 {a3:#x}", _X86),
        "kvm_mmio": Tracepoint("mmio {type} len {len} gpa {gpa:#x} val {val:#x}", _GENERIC),
        "kvm_userspace_exit": Tracepoint("reason {reason} ({code})", _GENERIC),
        "kvm_vm_set_mem_attributes": Tracepoint(
            "{start:#016x} -- {end:#016x} [{attributes:#x}]", _GENERIC
        ),
        "kvm_unmap_hva_range": Tracepoint(
            "mmu notifier unmap range: {start:#016x} -- {end:#016x}", _GENERIC
        ),
        "kvm_mmu_set_spte": Tracepoint(
            "gfn {gfn:x} spte {spte:x} ({access}) level {level} at 0 pages {pages}",
            "arch/x86/kvm/mmu/mmutrace.h; one event for all leaves of a call, so with their number",
        ),
        "kvmsim_zap": Tracepoint("gfn {gfn:x} side {side} pages {pages} leaves {leaves}", _OWN),
        "kvmsim_gmem_invalidate": Tracepoint(
            "file {file:x} unmap range: {start:#016x} -- {end:#016x}", _OWN
        ),
        "kvmsim_gmem_set_attributes": Tracepoint(
            "file {file:x} {start:#016x} -- {end:#016x} [{attributes:#x}]", _OWN
        ),
        "kvmsim_gmem_release": Tracepoint("file {file:x}", _OWN),
        "kvmsim_gmem_error": Tracepoint("file {file:x} page {page:#x}", _OWN),
        "kvmsim_migrated": Tracepoint(
            "file {file:x} pages {start:#x} -- {end:#x} hpa {old:#x} -> {new:#x}", _OWN
        ),
        "kvmsim_drained": Tracepoint("epoch {epoch} after {ns} ns", _OWN),
        "kvmsim_get_page": Tracepoint("vcpu {vcpu} file {file:x} page {page:#x}", _OWN),
        "kvmsim_page_arrived": Tracepoint(
            "vcpu {vcpu} file {file:x} pages {start:#x} -- {end:#x} seq {seq} status {status}: "
            "{effect}",
            _OWN,
        ),
        "kvmsim_retry": Tracepoint("vcpu {vcpu} gfn {gfn:x}: {reason}", _OWN),
        "kvmsim_set_memory_region": Tracepoint(
            "{change} slot {slot} gfn {gfn:x} pages {pages} flags {flags:#x} hva {hva:#x}", _OWN
        ),
    }
)

Value = int | str


@dataclass(frozen=True, slots=True)
class Event:
    """One event: ``time`` in ns of CLOCK_MONOTONIC, ``vcpu`` None for what no vCPU does.

    ``task`` and ``tid`` are the thread's. A field ``ns`` says how long it took, up to ``time``.
    """

    time: int
    name: str
    vm: str
    vcpu: int | None
    task: str
    tid: int
    fields: Mapping[str, Value] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What the kernel would print behind the name."""
        return TRACEPOINTS[self.name].text.format(vcpu=self.vcpu, **self.fields)


class Format(Protocol):
    """A file format; what the methods return is written one after the other."""

    def begin(self) -> str:
        """The head of the file."""
        ...

    def event(self, event: Event) -> str:
        """One event."""
        ...

    def lost(self, count: int) -> str:
        """Events are missing before this, since the writer did not keep up."""
        ...

    def end(self) -> str:
        """The end of the file."""
        ...


class Text:
    """As /sys/kernel/tracing/trace: thread, CPU (here: the vCPU), flags, seconds, event."""

    def begin(self) -> str:
        """The kernel's own head."""
        return (
            "# tracer: nop\n"
            "#\n"
            "#                                _-----=> irqs-off/BH-disabled\n"
            "#                               / _----=> need-resched\n"
            "#                              | / _---=> hardirq/softirq\n"
            "#                              || / _--=> preempt-depth\n"
            "#                              ||| / _-=> migrate-disable\n"
            "#                              |||| /     delay\n"
            "#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION\n"
            "#              | |         |   |||||     |         |\n"
        )

    def event(self, event: Event) -> str:
        """One line."""
        seconds, rest = divmod(event.time // 1000, 1_000_000)
        cpu = event.vcpu or 0
        return (
            f"{event.task[:15]:>16}-{event.tid:<7} [{cpu:03}] ..... {seconds:5}.{rest:06}: "
            f"{event.name}: {event.text}\n"
        )

    def lost(self, count: int) -> str:
        """The line that the kernel prints then."""
        return f"CPU:0 [LOST {count} EVENTS]\n"

    def end(self) -> str:
        """Nothing."""
        return ""


class JsonLines:
    """One object a line: time in ns, event, vm, vcpu, task, tid, and the event's fields."""

    def begin(self) -> str:
        """Nothing."""
        return ""

    def event(self, event: Event) -> str:
        """One object."""
        head: dict[str, object] = {"time": event.time, "event": event.name, "vm": event.vm}
        if event.vcpu is not None:
            head["vcpu"] = event.vcpu
        head |= {"task": event.task, "tid": event.tid}
        return json.dumps(head | dict(event.fields)) + "\n"

    def lost(self, count: int) -> str:
        """An object without a time."""
        return json.dumps({"event": "lost", "count": count}) + "\n"

    def end(self) -> str:
        """Nothing."""
        return ""


class ChromeJson:
    """An array for Perfetto and chrome://tracing: a process for each VM, a thread for each vCPU.

    Time in guest code is a slice, from kvm_entry to kvm_exit, and so is what says how long it
    took; everything else is an instant. Format: "Trace Event Format", the JSON array form, with
    events X, i and M.
    """

    _FIRST_TASK: Final = 1000  #: thread ids of threads that are no vCPUs, above any vCPU

    def __init__(self) -> None:
        self._vms: dict[str, int] = {}
        self._threads: dict[tuple[int, int], str] = {}
        self._entered: dict[tuple[int, int], int] = {}
        self._first = True

    def begin(self) -> str:
        """Open the array."""
        return "["

    def event(self, event: Event) -> str:
        """One or more objects; none for an entry, whose slice is written at its exit."""
        pid, text = self._process(event.vm)
        tid, more = self._thread(pid, event)
        text += more
        args = dict(event.fields) | {"text": event.text}
        if event.name == "kvm_entry":
            self._entered[pid, tid] = event.time
            return text
        entered = self._entered.pop((pid, tid), None) if event.name == "kvm_exit" else None
        if entered is not None:
            return text + self._slice("guest", pid, tid, entered, event.time, args)
        if isinstance(took := event.fields.get("ns"), int):
            return text + self._slice(event.name, pid, tid, event.time - took, event.time, args)
        return text + self._object(
            {"name": event.name, "ph": "i", "s": "t", "ts": event.time / 1000}
            | {"pid": pid, "tid": tid, "cat": "kvm", "args": args}
        )

    def lost(self, count: int) -> str:
        """A metadata event, which has no time."""
        return self._object({"name": "lost_events", "ph": "M", "pid": 0, "args": {"count": count}})

    def end(self) -> str:
        """Close the array."""
        return "\n]\n"

    def _slice(
        self, name: str, pid: int, tid: int, start: int, end: int, args: dict[str, Value]
    ) -> str:
        return self._object(
            {"name": name, "ph": "X", "ts": start / 1000, "dur": (end - start) / 1000}
            | {"pid": pid, "tid": tid, "cat": "kvm", "args": args}
        )

    def _process(self, vm: str) -> tuple[int, str]:
        if vm in self._vms:
            return self._vms[vm], ""
        self._vms[vm] = pid = len(self._vms) + 1
        return pid, self._name("process_name", pid, 0, vm)

    def _thread(self, pid: int, event: Event) -> tuple[int, str]:
        if event.vcpu is not None:
            tid, name = event.vcpu, f"vCPU {event.vcpu}"
        else:
            tid, name = self._FIRST_TASK + event.tid, event.task
        if (pid, tid) in self._threads:
            return tid, ""
        self._threads[pid, tid] = name
        return tid, self._name("thread_name", pid, tid, name)

    def _name(self, what: str, pid: int, tid: int, name: str) -> str:
        return self._object(
            {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
        )

    def _object(self, value: Mapping[str, object]) -> str:
        comma, self._first = ("" if self._first else ","), False
        return f"{comma}\n{json.dumps(value)}"


FORMATS: Final[Mapping[str, type[Text] | type[JsonLines] | type[ChromeJson]]] = MappingProxyType(
    {"text": Text, "jsonl": JsonLines, "chrome": ChromeJson}
)


def format_of(path: str) -> str:
    """The format that a file's name asks for: .jsonl, .json (Chrome's), any other is text."""
    if path.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    return "chrome" if path.endswith(".json") else "text"
