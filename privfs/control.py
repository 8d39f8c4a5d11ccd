# SPDX-License-Identifier: GPL-2.0-or-later
"""Questions to a running mount: one JSON line each way over ``.privfs/control``.

A request is ``{"ask": NAME, ...}``; the answer is ``{"ok": {...}}`` or
``{"errno": N, "error": TEXT}``.  :data:`QUESTIONS` lists what can be asked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio
from pyroaring import BitMap

from privfs import compaction, views
from privfs.backing.store import Promise
from privfs.notifier.lane import NoMountAbove, connect, find_socket
from privfs.personality import Refused
from privfs.service import Service

log = logging.getLogger(__name__)

SOCKET: Final = ".privfs/control"
_MAX_LINE: Final = 65_536
_TIMEOUT: Final = 10.0
_DEAD: Final = (errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNREFUSED)
_ENDED: Final = "the mount ended while it was asked; see: privfs status"


@dataclass(frozen=True, slots=True)
class MountInfo:
    """What a mount says of itself."""

    mountpoint: str
    pid: int
    mode: str  #: how private files refuse: ``passthrough`` or ``direct_io``
    passthrough_errno: int
    versions: dict[str, str]
    pinned: bool = False  #: its own sockets keep it busy: umount(8) needs --lazy


class ControlError(OSError):
    """A mount refused a question, or there is no mount; ``errno`` says why."""


# --- the mount's side --------------------------------------------------------------------------


def _map(service: Service, info: MountInfo, ask: dict[str, Any]) -> dict[str, Any]:
    return views.file_map(service.owner, _ino(service, ask), int(ask.get("start", 0)))


def _stat(service: Service, info: MountInfo, ask: dict[str, Any]) -> dict[str, Any]:
    ino = _ino(service, ask)
    service.host_mapped.adopt(ino)
    held = service.backing.blocks(ino) * 512
    return views.file_stat(service.owner, ino) | {"held": held, "backing": _backing(service)}


def _backing(service: Service) -> dict[str, Any]:
    store = service.backing.store
    promises = {promise.name.lower(): promise in store.promises for promise in Promise}
    return {"store": store.name, "page_size": store.page_size, "promises": promises}


def _status(service: Service, info: MountInfo, ask: dict[str, Any]) -> dict[str, Any]:
    latencies = service.latencies
    hub = service.hub.statistics()
    return {
        "mountpoint": info.mountpoint,
        "pid": info.pid,
        "personality": service.owner.personality.name,
        "backing": _backing(service),
        "mode": info.mode,
        "passthrough_errno": info.passthrough_errno,
        "host_mappable": service.host_mapped.possible,
        "versions": info.versions,
        "pinned": info.pinned,
        "memory": views.meminfo(service.owner),
        "files": len(service.owner.files),
        "extents": service.backing.alive,
        "sessions": views.sessions(service.owner, service.waited),
        "invalidations": {
            "total": latencies.total,
            "p50_us": latencies.percentile(0.5) * 1e6,
            "p90_us": latencies.percentile(0.9) * 1e6,
            "p99_us": latencies.percentile(0.99) * 1e6,
            "max_us": latencies.percentile(1.0) * 1e6,
        },
        "kills": service.kills,
        "failures": service.failures,
        "moves": service.moves,
        "strays": service.strays.view(),
        "incidents": service.incidents.view(),
        "asking": service.asking,
        "frames": {"in": hub.frames_in, "out": hub.frames_out},
    }


def _audit(service: Service, info: MountInfo, ask: dict[str, Any]) -> dict[str, Any]:
    """Compare the bitmaps with the memory, file by file; only idle files can be compared.

    Files whose pages the host may touch are left out: nothing says who touched.

    ``unaudited`` says what no audit of such memory can find.
    """
    findings: list[dict[str, Any]] = []
    touched: list[int] = []
    skipped = 0
    for ino, file in service.owner.files.items():
        if file.shared:
            continue
        if not file.idle:
            skipped += 1
            continue
        found = service.backing.audit(ino, file.allocated, partial(_holds, file.pages))
        touched += [ino] if found else []
        findings += [
            {"finding": f.name, "inode": f.ino, "start": f.start, "end": f.end, "detail": f.detail}
            for f in found
        ]
    for ino in touched:
        service.look_over(ino)
    broken = [promise.value for promise in Promise if promise not in service.backing.store.promises]
    return {"findings": findings, "skipped": skipped, "unaudited": broken}


def _holds(pages: BitMap, start: int, end: int) -> bool:
    return pages.range_cardinality(start, end) == end - start


def _seal(service: Service, info: MountInfo, ask: dict[str, Any]) -> dict[str, Any]:
    ino = _ino(service, ask)
    try:
        service.owner.seal(ino, int(ask["seals"]))
    except Refused as refused:
        raise ControlError(refused.errno, str(refused)) from refused
    return {"seals": views.file_stat(service.owner, ino)["seals"]}


def _map_by_host(service: Service, info: MountInfo, ask: dict[str, Any]) -> dict[str, Any]:
    ino = _ino(service, ask)
    try:
        service.host_mapped.make(ino, shared=bool(ask["shared"]))
    except Refused as refused:
        raise ControlError(refused.errno, str(refused)) from refused
    return {}


#: Every question: its handler, and the arguments that it takes.
QUESTIONS: Final[dict[str, Callable[[Service, MountInfo, dict[str, Any]], dict[str, Any]]]] = {
    "map": _map,  # ino, start (page)
    "stat": _stat,  # ino
    "status": _status,
    "audit": _audit,
    "seal": _seal,  # ino, seals (bits)
    "map_by_host": _map_by_host,  # ino, shared
}


def _ino(service: Service, ask: dict[str, Any]) -> int:
    ino = ask.get("ino")
    if not isinstance(ino, int) or ino not in service.owner.files:
        raise ControlError(errno.ENOENT, f"inode {ino} is no private file of this mount; name one")
    return ino


def answer(service: Service, info: MountInfo, line: bytes) -> bytes:
    """Answer one line; whatever it holds, the answer is one line too."""
    try:
        ask = json.loads(line)
        if not isinstance(ask, dict) or ask.get("ask") not in QUESTIONS:
            raise ControlError(errno.EINVAL, f"ask one of: {', '.join(QUESTIONS)}")
        reply: dict[str, Any] = {"ok": QUESTIONS[ask["ask"]](service, info, ask)}
    except ControlError as refused:
        reply = {"errno": refused.errno, "error": refused.strerror}
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        reply = {"errno": errno.EINVAL, "error": f"not a question: {error}"}
    return json.dumps(reply).encode() + b"\n"


async def serve(service: Service, info: MountInfo, listener: socket.socket) -> None:
    """Answer questions until cancelled."""

    async def talk(stream: trio.SocketStream) -> None:
        buffer = bytearray()
        service.asking += 1
        try:
            async for chunk in stream:
                buffer += chunk
                while (end := buffer.find(b"\n")) >= 0:
                    line = bytes(buffer[:end])
                    del buffer[: end + 1]
                    faults = _wants_events(line)
                    if faults is not None:
                        await _stream_events(service, stream, faults=faults)
                        return
                    if _wants(line, "compact"):
                        await compaction.serve(service, stream, line)
                        return
                    await stream.send_all(answer(service, info, line))
                if len(buffer) > _MAX_LINE:
                    return
        except trio.BrokenResourceError:
            return  # the asker has left
        finally:
            service.asking -= 1

    trio_listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    await trio.serve_listeners(talk, [trio_listener])


def _wants_events(line: bytes) -> bool | None:
    """Return whether a question for events asks for faults too, None if it is another one."""
    return bool(json.loads(line).get("faults")) if _wants(line, "events") else None


def _wants(line: bytes, question: str) -> bool:
    """Return whether a line is a question that is answered by many lines."""
    try:
        ask = json.loads(line)
    except (ValueError, RecursionError):  # brackets in brackets, a thousand deep
        return False
    return isinstance(ask, dict) and ask.get("ask") == question


async def _stream_events(service: Service, stream: trio.SocketStream, *, faults: bool) -> None:
    """Send a line for every event until the listener leaves."""
    listener = service.events.listen(faults=faults)
    try:
        async with trio.open_nursery() as nursery:

            async def until_it_leaves() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    while await stream.receive_some():
                        pass
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_it_leaves)
            with contextlib.suppress(trio.BrokenResourceError):
                while True:
                    await listener.wake.wait()
                    lines = [json.dumps(event) + "\n" for event in listener.take()]
                    await stream.send_all("".join(lines).encode())
            nursery.cancel_scope.cancel()
    finally:
        service.events.leave(listener)


# --- the asker's side --------------------------------------------------------------------------


def ask(path: str | os.PathLike[str], question: str, **arguments: Any) -> dict[str, Any]:
    """Ask the mount that holds ``path``; raises ControlError."""
    try:
        place = find_socket(path, SOCKET)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_TIMEOUT)
            connect(sock, place)
            sock.sendall(json.dumps({"ask": question, **arguments}).encode() + b"\n")
            with sock.makefile("rb") as stream:
                line = stream.readline()
    except OSError as error:
        raise _silent(path, error) from error
    if not line:
        raise ControlError(errno.ECONNRESET, f"{path}: {_ENDED}")
    reply = json.loads(line)
    if "ok" not in reply:
        raise ControlError(reply["errno"], reply["error"])
    found: dict[str, Any] = reply["ok"]
    return found


def _silent(path: str | os.PathLike[str], error: OSError) -> ControlError:
    """Why the mount that should hold ``path`` gives no answer."""
    if isinstance(error, NoMountAbove):
        return ControlError(error.errno, error.strerror)
    why = error.strerror or str(error)
    if error.errno in _DEAD:
        why = "its privfs was killed; clear the dead mount with: privfs umount DIR"
    return ControlError(error.errno or errno.ETIMEDOUT, f"{path}: the mount does not answer: {why}")


def events(path: str | os.PathLike[str], *, faults: bool = False) -> Iterator[dict[str, Any]]:
    """Yield what happens on the mount that holds ``path`` until it ends; raises ControlError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            connect(sock, find_socket(path, SOCKET))
            sock.sendall(json.dumps({"ask": "events", "faults": faults}).encode() + b"\n")
            with sock.makefile("rb") as stream:
                for line in stream:
                    yield json.loads(line)
    except OSError as error:
        raise _silent(path, error) from error


def compact(
    path: str | os.PathLike[str], start: int, end: int, told: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Move the memory of file pages ``[start, end)``; ``told`` how far it is; ControlError.

    Whatever ends the wait early leaves the extent that is under way where it is.
    """
    ino = Path(path).stat().st_ino
    question = {"ask": "compact", "ino": ino, "start": start, "end": end}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_TIMEOUT)  # progress comes more often
            connect(sock, find_socket(path, SOCKET))
            sock.sendall(json.dumps(question).encode() + b"\n")
            with sock.makefile("rb") as stream:
                for line in stream:
                    reply = json.loads(line)
                    if "progress" not in reply:
                        break
                    told(reply["progress"])
                else:
                    raise ControlError(errno.ECONNRESET, f"{path}: {_ENDED}")
    except ControlError:
        raise
    except OSError as error:
        raise _silent(path, error) from error
    if "ok" not in reply:
        raise ControlError(reply["errno"], f"{path}: {reply['error']}")
    found: dict[str, Any] = reply["ok"]
    return found


def ask_file(path: str | os.PathLike[str], question: str, **arguments: Any) -> dict[str, Any]:
    """Ask about one private file."""
    ino = Path(path).stat().st_ino
    return ask(path, question, ino=ino, **arguments)
