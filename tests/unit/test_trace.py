# SPDX-License-Identifier: GPL-2.0-or-later
"""Traces: what each format writes, and that a VM tells the kernel's story."""

from __future__ import annotations

import itertools
import json
import re
import string
from pathlib import Path
from typing import Any

import pytest

from kvmsim.trace import FORMATS, TRACEPOINTS, ChromeJson, Event, JsonLines, Text, format_of

ENTRY = Event(5_000_000_999, "kvm_entry", "a", 1, "runner a", 77, {"rip": 0x1000})
EXIT = Event(
    5_000_002_999, "kvm_exit", "a", 1, "runner a", 77,
    {"reason": "npf", "rip": 0x1004, "info1": 0x100000006, "info2": 0x8000000000},
)  # fmt: skip
FAULT = Event(
    5_000_003_999, "kvm_page_fault", "a", 1, "runner a", 77,
    {"rip": 0x1004, "address": 0x8000000000, "error_code": 0x100000006},
)  # fmt: skip
ATTRIBUTES = Event(
    6_000_000_000, "kvm_vm_set_mem_attributes", "b", None, "MainThread", 70,
    {"start": 0x800, "end": 0x804, "attributes": 8},
)  # fmt: skip
DRAINED = Event(7_000_000_000, "kvmsim_drained", "a", None, "lane a", 78, {"epoch": 3, "ns": 2000})
EVENTS = [ENTRY, EXIT, FAULT, ATTRIBUTES, DRAINED]

#: A line of tracefs as trace-cmd and perf read it: task-pid [cpu] flags seconds: event: text.
LINE = re.compile(r" *(?P<task>.{1,15})-(?P<pid>\d+) +\[(?P<cpu>\d{3})\] (?P<flags>\S{5}) "
                  r"+(?P<seconds>\d+\.\d{6}): (?P<event>\w+): (?P<text>.*)")  # fmt: skip


def written(format: str, events: list[Event]) -> str:
    made = FORMATS[format]()
    return made.begin() + "".join(map(made.event, events)) + made.end()


def fields_of(name: str) -> dict[str, Any]:
    """Fields for any tracepoint: what its text names, words where it takes no number."""
    parts = string.Formatter().parse(TRACEPOINTS[name].text)
    return {
        field: 3 if spec else "word" for _, field, spec, _ in parts if field and field != "vcpu"
    }


# --- text ---------------------------------------------------------------------------------------


def test_text_is_what_the_kernel_prints() -> None:
    assert [Text().event(event) for event in EVENTS] == [
        "        runner a-77      [001] .....     5.000000: kvm_entry: vcpu 1, rip 0x1000\n",
        "        runner a-77      [001] .....     5.000002: kvm_exit: vcpu 1 reason npf rip 0x1004 "
        "info1 0x0000000100000006 info2 0x0000008000000000 intr_info 0x00000000 error_code "
        "0x00000000\n",
        "        runner a-77      [001] .....     5.000003: kvm_page_fault: vcpu 1 rip 0x1004 "
        "address 0x0000008000000000 error_code 0x100000006\n",
        "      MainThread-70      [000] .....     6.000000: kvm_vm_set_mem_attributes: "
        "0x00000000000800 -- 0x00000000000804 [0x8]\n",
        "          lane a-78      [000] .....     7.000000: kvmsim_drained: epoch 3 "
        "after 2000 ns\n",
    ]


def test_every_line_of_text_is_a_line_of_tracefs() -> None:
    lines = written("text", EVENTS).splitlines()
    found = [LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    assert [match and match["event"] for match in found] == [event.name for event in EVENTS]
    assert lines[0] == "# tracer: nop"


@pytest.mark.parametrize("name", TRACEPOINTS)
def test_every_tracepoint_has_text_and_a_source(name: str) -> None:
    event = Event(1, name, "vm", 0, "task", 1, fields_of(name))
    assert LINE.fullmatch(Text().event(event).rstrip("\n"))
    assert TRACEPOINTS[name].source
    own = TRACEPOINTS[name].source == "this project"
    assert own is name.startswith("kvmsim_")


def test_a_long_name_is_cut_as_the_kernel_cuts_it() -> None:
    event = Event(1, "kvmsim_drained", "vm", None, "a thread with a long name", 1, DRAINED.fields)
    match = LINE.fullmatch(Text().event(event).rstrip("\n"))
    assert match is not None
    assert match["task"] == "a thread with a"


def drawn() -> str:
    """The table of docs/traces.md."""
    rows = "".join(
        f"| `{name}` | `{point.text.strip()}` | {point.source} |\n"
        for name, point in TRACEPOINTS.items()
    )
    return "| event | text | from |\n|---|---|---|\n" + rows


def test_the_manual_has_the_table() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    start = manual.index("<!-- tracepoints -->\n") + len("<!-- tracepoints -->\n")
    assert manual[start : manual.index("<!-- end -->")] == drawn()


# --- JSON lines ---------------------------------------------------------------------------------


def test_json_lines_hold_every_field() -> None:
    lines = [json.loads(line) for line in written("jsonl", EVENTS).splitlines()]
    assert lines[2] == {
        "time": 5_000_003_999, "event": "kvm_page_fault", "vm": "a", "vcpu": 1,
        "task": "runner a", "tid": 77, "rip": 0x1004, "address": 0x8000000000,
        "error_code": 0x100000006,
    }  # fmt: skip
    assert "vcpu" not in lines[3]
    assert len(lines) == len(EVENTS)


# --- Chrome -------------------------------------------------------------------------------------


def check_chrome(events: list[dict[str, Any]]) -> None:
    """The rules of the Trace Event Format for the phases that are used."""
    names = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    processes = {e["pid"] for e in events if e["name"] == "process_name"}
    for event in events:
        assert isinstance(event["name"], str)
        assert event["ph"] in ("X", "i", "M")
        assert event["pid"] in processes or event["name"] in ("process_name", "lost_events")
        if event["ph"] == "M":
            continue
        assert (event["pid"], event["tid"]) in names
        assert isinstance(event["ts"], float)
        assert event["ts"] > 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
        else:
            assert event["s"] in ("g", "p", "t")


def test_chrome_gets_an_array_of_slices_and_instants() -> None:
    events = json.loads(written("chrome", EVENTS))
    check_chrome(events)
    slices = {e["name"]: (e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert slices == {"guest": (5_000_000.999, 2.0), "kvmsim_drained": (6_999_998.0, 2.0)}
    assert [e["name"] for e in events if e["ph"] == "i"] == [
        "kvm_page_fault", "kvm_vm_set_mem_attributes",
    ]  # fmt: skip
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {
        "a", "b", "vCPU 1", "MainThread", "lane a",
    }  # fmt: skip


def test_an_exit_without_its_entry_is_an_instant() -> None:
    events = json.loads(written("chrome", [EXIT]))
    check_chrome(events)
    assert events[-1]["ph"] == "i"


def test_slices_of_one_thread_do_not_overlap() -> None:
    entered = [
        Event(1000 * number, name, "a", 0, "t", 1, fields_of(name))
        for number, name in enumerate(["kvm_entry", "kvm_exit"] * 20, 1)
    ]
    slices = [e for e in json.loads(written("chrome", entered)) if e["ph"] == "X"]
    assert len(slices) == 20
    for before, after in itertools.pairwise(slices):
        assert before["ts"] + before["dur"] <= after["ts"]


@pytest.mark.parametrize("format", FORMATS)
def test_no_event_is_a_file_too(format: str) -> None:
    empty = written(format, [])
    assert json.loads(empty) == [] if format == "chrome" else "kvm" not in empty


def test_what_was_lost_is_said() -> None:
    assert Text().lost(5) == "CPU:0 [LOST 5 EVENTS]\n"
    assert json.loads(JsonLines().lost(5)) == {"event": "lost", "count": 5}
    made = ChromeJson()
    events = json.loads(made.begin() + made.event(ENTRY) + made.lost(5) + made.end())
    check_chrome(events)
    assert events[-1]["args"] == {"count": 5}


@pytest.mark.parametrize(
    ("path", "format"),
    [("a.json", "chrome"), ("a.jsonl", "jsonl"), ("a.ndjson", "jsonl"), ("a.txt", "text"),
     ("trace", "text"), ("a.json.d/b", "text")],
)  # fmt: skip
def test_the_format_is_in_the_name(path: str, format: str) -> None:
    assert format_of(path) == format
