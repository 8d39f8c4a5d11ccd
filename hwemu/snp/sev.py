# SPDX-License-Identifier: GPL-2.0-or-later
"""Plain SEV, the older sibling: encryption by ASID, and nothing that says whose a page is.

So the host's writes go through: the guest finds garbage, where SNP would have faulted.  There is no
private file either; guest memory is ordinary memory of the host, which KVM pins region by region
(KVM_MEMORY_ENCRYPT_REG_REGION with host-virtual addresses, `Pins`).

Sources: SEV API (55766) for the commands, ``arch/x86/kvm/svm/sev.c`` for what KVM asks first.  The
measurement is the API's HMAC; keys derive from the secret of the machine.
"""

from __future__ import annotations

import enum
import errno
import hashlib
import hmac
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from hwemu.snp.asids import Asids
from hwemu.snp.fwstatus import FirmwareRefused, FwStatus
from hwemu.snp.memory import Memory
from hwemu.snp.rmpentry import PAGE_SIZE

if TYPE_CHECKING:
    from hashlib import _Hash


class SevState(enum.Enum):
    """``GSTATE`` of a SEV guest."""

    LUPDATE = "LUPDATE"
    LSECRET = "LSECRET"
    RUNNING = "RUNNING"

    def __str__(self) -> str:
        return self.value


_U, _S, _R = SevState
#: (state, command) → state afterwards; None: the guest is gone.  Else INVALID_GUEST_STATE.
SEV_TRANSITIONS: Final[dict[tuple[SevState, str], SevState | None]] = {
    (_U, "ACTIVATE"): _U,
    (_U, "LAUNCH_UPDATE_DATA"): _U,
    (_U, "LAUNCH_MEASURE"): _S,
    (_U, "DEACTIVATE"): _U,
    (_U, "DECOMMISSION"): None,
    (_S, "ACTIVATE"): _S,
    (_S, "LAUNCH_FINISH"): _R,
    (_S, "DEACTIVATE"): _S,
    (_S, "DECOMMISSION"): None,
    (_R, "ACTIVATE"): _R,
    (_R, "DEACTIVATE"): _R,
    (_R, "DECOMMISSION"): None,
}

API_MAJOR: Final = 1
API_MINOR: Final = 55
BUILD: Final = 0
#: LAUNCH_UPDATE_DATA works on blocks of this many bytes.
BLOCK: Final = 16


@dataclass(frozen=True, slots=True)
class SevGuest:
    """A guest by its handle; ``asid`` 0 means inactive."""

    state: SevState
    policy: int
    asid: int = 0


@dataclass(frozen=True, slots=True)
class Measurement:
    """What LAUNCH_MEASURE tells the guest's owner."""

    measure: bytes
    mnonce: bytes


class Sev:
    """The AMD-SP's commands for SEV guests with ASIDs from 1 to ``last_asid``."""

    def __init__(self, memory: Memory, *, last_asid: int, secret: bytes = b"privfs") -> None:
        self._memory = memory
        self._secret = secret
        self._asids = Asids(last_asid)
        self._guests: dict[int, SevGuest] = {}
        self._digests: dict[int, _Hash] = {}
        self._next = 1

    def _guest(self, handle: int, command: str) -> SevGuest:
        guest = self._guests.get(handle)
        if guest is None:
            raise FirmwareRefused(FwStatus.INVALID_GUEST, f"{command} of handle {handle}")
        if (guest.state, command) not in SEV_TRANSITIONS:
            raise FirmwareRefused(
                FwStatus.INVALID_GUEST_STATE, f"{command} of handle {handle} in {guest.state}"
            )
        return guest

    def _advance(self, handle: int, command: str, guest: SevGuest) -> None:
        state = SEV_TRANSITIONS[guest.state, command]
        assert state is not None
        self._guests[handle] = replace(guest, state=state)

    def launch_start(self, policy: int) -> int:
        """LAUNCH_START: return the handle of a new guest."""
        handle = self._next
        self._next += 1
        self._guests[handle] = SevGuest(SevState.LUPDATE, policy)
        self._digests[handle] = hashlib.sha256()
        return handle

    def state(self, handle: int) -> SevState:
        """GUEST_STATUS; FirmwareRefused(INVALID_GUEST) for an unknown handle."""
        guest = self._guests.get(handle)
        if guest is None:
            raise FirmwareRefused(FwStatus.INVALID_GUEST, f"GUEST_STATUS of handle {handle}")
        return guest.state

    def activate(self, handle: int, asid: int) -> None:
        """ACTIVATE."""
        guest = self._guest(handle, "ACTIVATE")
        if guest.asid:
            raise FirmwareRefused(
                FwStatus.ACTIVE, f"ACTIVATE of handle {handle}: it has ASID {guest.asid}"
            )
        self._asids.activate(asid)
        self._advance(handle, "ACTIVATE", replace(guest, asid=asid))

    def deactivate(self, handle: int) -> None:
        """DEACTIVATE; nothing if it is inactive."""
        guest = self._guest(handle, "DEACTIVATE")
        if guest.asid:
            self._asids.deactivate(guest.asid)
        self._advance(handle, "DEACTIVATE", replace(guest, asid=0))

    def decommission(self, handle: int) -> None:
        """DECOMMISSION: forget a guest; ACTIVE while it has an ASID."""
        guest = self._guest(handle, "DECOMMISSION")
        if guest.asid:
            raise FirmwareRefused(
                FwStatus.ACTIVE, f"DECOMMISSION of handle {handle}: it has ASID {guest.asid}"
            )
        del self._guests[handle], self._digests[handle]

    def wbinvd(self) -> None:
        """WBINVD on every core."""
        self._asids.wbinvd()

    def df_flush(self) -> None:
        """DF_FLUSH."""
        self._asids.df_flush()

    def launch_update_data(self, handle: int, pfn: int, offset: int, length: int) -> None:
        """LAUNCH_UPDATE_DATA: encrypt and measure ``length`` bytes from ``offset`` of a frame on.

        INVALID_LENGTH unless the length is a multiple of 16, INVALID_ADDRESS unless the offset is.
        """
        guest = self._guest(handle, "LAUNCH_UPDATE_DATA")
        what = f"LAUNCH_UPDATE_DATA of handle {handle}: {length} bytes at {pfn:#x}+{offset:#x}"
        if not guest.asid:
            raise FirmwareRefused(FwStatus.INACTIVE, what)
        if length <= 0 or length % BLOCK:
            raise FirmwareRefused(FwStatus.INVALID_LENGTH, what)
        if not 0 <= offset < PAGE_SIZE or offset % BLOCK:
            raise FirmwareRefused(FwStatus.INVALID_ADDRESS, what)
        digest = self._digests[handle]
        while length:
            part = min(length, PAGE_SIZE - offset)
            contents = self._memory.read(pfn)[offset : offset + part]
            digest.update(contents)
            pfn, offset, length = pfn + 1, 0, length - part
        self._advance(handle, "LAUNCH_UPDATE_DATA", guest)

    def launch_measure(self, handle: int) -> Measurement:
        """LAUNCH_MEASURE: HMAC(0x04, API version, build, policy, digest, nonce) with the TIK."""
        guest = self._guest(handle, "LAUNCH_MEASURE")
        nonce = self._derive(b"mnonce", handle)[:16]
        head = struct.pack("<BBBBI", 4, API_MAJOR, API_MINOR, BUILD, guest.policy)
        words = head + self._digests[handle].digest() + nonce
        self._advance(handle, "LAUNCH_MEASURE", guest)
        return Measurement(hmac.new(self.tik(handle), words, hashlib.sha256).digest(), nonce)

    def launch_finish(self, handle: int) -> None:
        """LAUNCH_FINISH."""
        guest = self._guest(handle, "LAUNCH_FINISH")
        self._advance(handle, "LAUNCH_FINISH", guest)

    def tik(self, handle: int) -> bytes:
        """Return the integrity key that the guest's owner shares (55766, "Transport keys")."""
        return self._derive(b"tik", handle)[:16]

    def _derive(self, label: bytes, handle: int) -> bytes:
        words = label + handle.to_bytes(8, "little")
        return hmac.new(self._secret, words, hashlib.sha256).digest()

    def key(self) -> tuple[object, ...]:
        """Return a hashable value, equal for machines that behave alike."""
        guests = tuple(
            (handle, guest.state.value, guest.policy, guest.asid, self._digests[handle].digest())
            for handle, guest in sorted(self._guests.items())
        )
        return guests, self._asids.key(), self._next

    def copy(self) -> Sev:
        """Return an independent copy over the same memory."""
        other = Sev.__new__(Sev)
        other.__dict__.update(self.__dict__)
        other._asids = self._asids.copy()
        other._guests = dict(self._guests)
        other._digests = {handle: digest.copy() for handle, digest in self._digests.items()}
        return other


class SevSees(enum.Enum):
    """What an access to memory of a SEV guest ends in; none of them is a fault."""

    PLAIN = "the contents"
    CIPHERTEXT = "ciphertext"
    GARBLED = "a page that is garbage from now on"


def sev_access(*, encrypted: bool, own_key: bool, write: bool) -> SevSees:
    """Return what an access gets, or makes of, a page that is ``encrypted`` by its guest.

    ``own_key`` is an access of that guest with C-bit 1; of a page that is not,
    C-bit 0 or the host.
    """
    if encrypted == own_key:
        return SevSees.PLAIN
    return SevSees.GARBLED if write else SevSees.CIPHERTEXT


class PinRefused(OSError):
    """KVM_MEMORY_ENCRYPT_(UN)REG_REGION refused; nothing is pinned or let go."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """A region of host-virtual addresses, in bytes."""

    addr: int
    size: int

    @property
    def npages(self) -> int:
        """Pages that it touches."""
        return (self.addr + self.size - 1 >> 12) - (self.addr >> 12) + 1


class Pins:
    """What KVM has pinned of a SEV guest's memory (``sev_mem_enc_register_region``).

    Regions may overlap; each is counted, against ``limit`` pages (RLIMIT_MEMLOCK).
    """

    def __init__(self, *, sev: bool = True, limit: int = 1 << 40) -> None:
        self._sev = sev
        self._limit = limit
        self._regions: list[Pinned] = []

    @property
    def npages(self) -> int:
        """Pages that are pinned."""
        return sum(region.npages for region in self._regions)

    def _refuse(self, code: int, operation: str, addr: int, size: int) -> PinRefused:
        what = f"{operation} of {size} bytes at hva {addr:#x} with {self.npages} pages pinned"
        return PinRefused(code, what)

    def register(self, addr: int, size: int) -> Pinned:
        """Pin a region: ENOTTY for a VM without SEV, EINVAL for none or a wrap, ENOMEM over."""
        name = "KVM_MEMORY_ENCRYPT_REG_REGION"
        if not self._sev:
            raise self._refuse(errno.ENOTTY, name, addr, size)
        if size <= 0 or addr < 0 or addr + size > 1 << 64:
            raise self._refuse(errno.EINVAL, name, addr, size)
        region = Pinned(addr, size)
        if self.npages + region.npages > self._limit:
            raise self._refuse(errno.ENOMEM, name, addr, size)
        self._regions.append(region)
        return region

    def unregister(self, addr: int, size: int) -> Pinned:
        """Let a region go that was registered exactly so; else EINVAL."""
        name = "KVM_MEMORY_ENCRYPT_UNREG_REGION"
        region = Pinned(addr, size)
        if not self._sev:
            raise self._refuse(errno.ENOTTY, name, addr, size)
        if region not in self._regions:
            raise self._refuse(errno.EINVAL, name, addr, size)
        self._regions.remove(region)
        return region
