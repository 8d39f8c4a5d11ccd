# SPDX-License-Identifier: GPL-2.0-or-later
"""Where attacks are tried: one host, one mount, one victim at a time.

The victim's RAM lies in two files: ``ram``, where its kernel is, and ``victim``, whose pages are
attacked. A file ``other`` of the same size is the attacker's to offer in its place.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from kvmsim.attack.guest import FORGED, SECRET, LabGuest
from kvmsim.attack.hostkernel import HostKernel, make_kernel
from kvmsim.attack.sevhost import SevHost
from kvmsim.confidential.platform import Platform
from kvmsim.emulator import MemoryBackend, VmConfig
from kvmsim.hostmem import HostMemory
from kvmsim.uapi import PAGE_SIZE
from kvmsim.vmm.bootparams import Technology
from kvmsim.vmm.bounce import SECTOR
from kvmsim.vmm.loader import LOW_SIZE

RAM_SIZE: Final = 16 << 20
VICTIM_SIZE: Final = 6 << 20
_UNIT: Final = 2 << 20
_FIRST: Final = 5
TECHNOLOGIES: Final = {technology.kind: technology for technology in Technology}


class LabDisk:
    """A disk whose attacker may do something between a device's check and its store."""

    sectors = 64

    def __init__(self) -> None:
        self.meanwhile: Callable[[], object] = lambda: None

    def read(self, sector: int, count: int) -> bytes:
        """Sectors that say whose they are."""
        self.meanwhile()
        return FORGED.to_bytes(8, "little") * (count * SECTOR // 8)

    def write(self, sector: int, data: bytes) -> None:
        """Nothing is kept."""


class Lab:
    """Attacks on guests of one kind, on the mount at ``folder``. Use as a context manager.

    A guest is booted when the first attack needs one, and serves until one spoils it.
    """

    def __init__(self, kind: str, folder: Path, image: bytes) -> None:
        self.kind = kind
        self.folder = folder
        self.image = image
        self.disk = LabDisk()
        self.technology = TECHNOLOGIES.get(kind)
        self.host = HostMemory()
        self.platform = Platform(self.host)
        self._guest: LabGuest | None = None
        self._sev: SevHost | None = None
        self._booted = 0
        self._turns = 0
        self._page = _FIRST

    # --- addresses ------------------------------------------------------------------------------

    @property
    def victim_gpa(self) -> int:
        """Where the file ``victim`` begins."""
        low = 0 if self.technology is not None and self.technology.confidential else LOW_SIZE
        return low + RAM_SIZE

    @property
    def gpa(self) -> int:
        """The page that is attacked, with the guest's `SECRET` in it; see `turn`."""
        return self.victim_gpa + self._page * PAGE_SIZE

    @property
    def spare_gpa(self) -> int:
        """A page in 2 MiB that the guest has not touched."""
        return self.victim_gpa + 2 * _UNIT + self._turns * PAGE_SIZE

    @property
    def offset(self) -> int:
        """Where the page lies in its file."""
        return self.gpa - self.victim_gpa

    def turn(self, *, whole: bool) -> None:
        """Go on to a page that no attack has had; ``whole``: in 2 MiB that is still one page."""
        self._turns += 1
        self._page = _FIRST + 2 * self._turns + (_UNIT // PAGE_SIZE if whole else 0)

    # --- the victim -----------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """A file of the present guest."""
        return self.folder / f"{name}{self._booted}"

    def config(self, label: str, *names: str) -> VmConfig:
        """A VM whose RAM is these files."""
        assert self.technology is not None
        backends = tuple(
            MemoryBackend(os.fspath(self.path(name)), slots=1, prealloc=name == "victim")
            for name in names
        )
        return VmConfig(backends, 1, label, technology=self.technology)

    def make_files(self, *names: str) -> None:
        """New files, all holes."""
        for name in names:
            with open(self.path(name), "xb") as file:
                file.truncate(RAM_SIZE if name.startswith("ram") else VICTIM_SIZE)

    def guest(self) -> LabGuest:
        """The guest, its secret in place."""
        if self._guest is None:
            self._booted += 1
            self.make_files("ram", "victim", "other")
            self._guest = self.boot(self.config("victim", "ram", "victim"))
        self._guest.poke(self.gpa, SECRET)
        return self._guest

    @property
    def over(self) -> bool:
        """Whether the guest has ended."""
        return self._guest is not None and self._guest.running.stopping

    def spend(self) -> None:
        """The guest is not what it was: the next attack gets another."""
        guest, self._guest = self._guest, None
        self.disk.meanwhile = lambda: None
        if guest is not None:
            guest.close()
            for name in ("ram", "victim", "other"):
                self.path(name).unlink()

    def boot(self, config: VmConfig, image: bytes = b"") -> LabGuest:
        """Boot a guest on this host; the caller closes it."""
        guest = LabGuest(self.host, config, self.platform, disk=self.disk)
        try:
            guest.boot(image or self.image)
        except BaseException:
            guest.close()
            raise
        return guest

    @contextlib.contextmanager
    def beside(self, *names: str, image: bytes = b"") -> Iterator[LabGuest]:
        """Another guest on this host, whose RAM is these files; those named ``*-`` are new."""
        new = [name for name in names if name.endswith("-")]
        self.make_files(*new)
        try:
            guest = self.boot(self.config("rival", *names), image)
            try:
                yield guest
            finally:
                guest.close()
        finally:
            for name in new:
                self.path(name).unlink()

    def sev(self) -> SevHost:
        """The model of plain SEV."""
        self._sev = self._sev or SevHost()
        return self._sev

    def kernel(self) -> HostKernel:
        """What the host's kernel can do to the frame of the victim's page."""
        if self.technology is None:
            return self.sev()
        return make_kernel(self.kind, self.guest(), self.platform)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.spend()
        finally:
            self.host.close()
