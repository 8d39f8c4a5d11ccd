# SPDX-License-Identifier: GPL-2.0-or-later
"""Who meets what at a private page: owner, host, another guest, a device, on every technology.

One table, and `PrivateMemory`, which makes accesses as it says. Whose a page is, is known to the
technology's own model (PAMT, RMP, page states); here it comes with the access as its key id.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Self

from hwemu.encryption import PAGE_SIZE, Buffer, KeyTable, Memory, ShadowPages


class Technology(enum.Enum):
    """What protects the page."""

    TDX = "tdx"
    SNP = "snp"
    SEV = "sev"
    PKVM = "pkvm"

    @property
    def encrypts(self) -> bool:
        """Whether memory holds ciphertext. pKVM keeps others out, and that is all."""
        return self is not Technology.PKVM


class Actor(enum.Enum):
    """Who makes the access."""

    OWNER = "its guest"
    HOST = "the host"
    OTHER = "another guest"
    DEVICE = "a device"


class Operation(enum.Enum):
    """What is done."""

    READ = "read"
    WRITE = "write"


class Outcome(enum.Enum):
    """What comes of it."""

    DONE = "the guest's own bytes"
    ZEROS = "zeros"
    CIPHERTEXT = "ciphertext"
    NOISE = "ciphertext, decrypted with the wrong key"
    GARBLES = "stored as ciphertext: the guest reads noise"
    POISONS = "stored with a wrong tag: the guest's next access is a machine check"
    MACHINE_CHECK = "machine check: poisoned, or of a wrong key"
    PAGE_FAULT = "refused: #PF with the RMP bit"
    NESTED_FAULT = "refused: the guest leaves with #NPF"
    STAGE2_ABORT = "refused: stage-2 abort; the host's program gets SIGSEGV"
    IO_FAULT = "refused by the IOMMU"


@dataclass(frozen=True, slots=True)
class Rule:
    """One cell, and where it comes from."""

    outcome: Outcome
    source: str


_READ, _WRITE = Operation
_OWNER, _HOST, _OTHER, _DEVICE = Actor
_TDX_TD_BIT = "TDX Module Base spec, 'Cache Line Poisoning': TD bit mismatch reads a fixed pattern"
_TDX_POISON = "the same: the TD bit is cleared, and a TD that consumes it is shut down"
_TDX_KEY = "the same: a MAC of another HKID does not match"
_RMP_WRITE = "APM vol. 2, 15.36.10 'RMP and VMPL Access Checks': a write of the host's"
_RMP_READ = "the same: reads of the host are not checked"
_RMP_ASID = "the same: another ASID's page"
_RMP_IO = "the same: writes of devices are checked by the IOMMU"
_SEV = "APM vol. 2, 15.34.1: encryption alone, no integrity"
_PKVM = "handle_host_mem_abort(), mem_protect.c: the page has another owner"
_PKVM_GUEST = "the page is in no other guest's stage 2"
_PKVM_IO = "kvm_iommu_host_stage2_idmap(), Android: a device reaches what the host reaches"

RULES: Final[Mapping[tuple[Technology, Actor, Operation], Rule]] = MappingProxyType(
    {
        **{(tech, _OWNER, op): Rule(Outcome.DONE, "") for tech in Technology for op in Operation},
        (Technology.TDX, _HOST, _READ): Rule(Outcome.ZEROS, _TDX_TD_BIT),
        (Technology.TDX, _HOST, _WRITE): Rule(Outcome.POISONS, _TDX_POISON),
        (Technology.TDX, _OTHER, _READ): Rule(Outcome.MACHINE_CHECK, _TDX_KEY),
        (Technology.TDX, _OTHER, _WRITE): Rule(Outcome.POISONS, _TDX_KEY),
        (Technology.TDX, _DEVICE, _READ): Rule(Outcome.ZEROS, _TDX_TD_BIT),
        (Technology.TDX, _DEVICE, _WRITE): Rule(Outcome.POISONS, _TDX_POISON),
        (Technology.SNP, _HOST, _READ): Rule(Outcome.CIPHERTEXT, _RMP_READ),
        (Technology.SNP, _HOST, _WRITE): Rule(Outcome.PAGE_FAULT, _RMP_WRITE),
        (Technology.SNP, _OTHER, _READ): Rule(Outcome.NESTED_FAULT, _RMP_ASID),
        (Technology.SNP, _OTHER, _WRITE): Rule(Outcome.NESTED_FAULT, _RMP_ASID),
        (Technology.SNP, _DEVICE, _READ): Rule(Outcome.CIPHERTEXT, _RMP_READ),
        (Technology.SNP, _DEVICE, _WRITE): Rule(Outcome.IO_FAULT, _RMP_IO),
        (Technology.SEV, _HOST, _READ): Rule(Outcome.CIPHERTEXT, _SEV),
        (Technology.SEV, _HOST, _WRITE): Rule(Outcome.GARBLES, _SEV),
        (Technology.SEV, _OTHER, _READ): Rule(Outcome.NOISE, _SEV),
        (Technology.SEV, _OTHER, _WRITE): Rule(Outcome.GARBLES, _SEV),
        (Technology.SEV, _DEVICE, _READ): Rule(Outcome.CIPHERTEXT, _SEV),
        (Technology.SEV, _DEVICE, _WRITE): Rule(Outcome.GARBLES, _SEV),
        (Technology.PKVM, _HOST, _READ): Rule(Outcome.STAGE2_ABORT, _PKVM),
        (Technology.PKVM, _HOST, _WRITE): Rule(Outcome.STAGE2_ABORT, _PKVM),
        (Technology.PKVM, _OTHER, _READ): Rule(Outcome.STAGE2_ABORT, _PKVM_GUEST),
        (Technology.PKVM, _OTHER, _WRITE): Rule(Outcome.STAGE2_ABORT, _PKVM_GUEST),
        (Technology.PKVM, _DEVICE, _READ): Rule(Outcome.IO_FAULT, _PKVM_IO),
        (Technology.PKVM, _DEVICE, _WRITE): Rule(Outcome.IO_FAULT, _PKVM_IO),
    }
)


class Encrypt(enum.Enum):
    """Where the ciphertext is (``encrypt=``)."""

    VIEW = "view"  #: computed when the host looks; plaintext lies in the file
    BACKING = "backing"  #: it lies in the file; plaintext is in shadow pages


@dataclass(frozen=True, slots=True)
class Met:
    """What an access met; ``data`` of a read that yields any."""

    outcome: Outcome
    data: bytes | None = None


class PrivateMemory:
    """Private pages in ``memory`` and what each access to them does. Addresses are bytes of hpa.

    An access that yields nothing but a refusal needs no key; the others raise what `KeyTable`
    does: `KeyDestroyedError` once the guest is gone.

    ``shadow`` is needed for ``Encrypt.BACKING`` alone. A range may cross pages.
    """

    def __init__(
        self,
        technology: Technology,
        keys: KeyTable,
        memory: Memory,
        shadow: ShadowPages | None = None,
    ) -> None:
        self.technology = technology
        self.mode = Encrypt.VIEW if shadow is None else Encrypt.BACKING
        self._keys = keys
        self._memory = memory
        self._shadow = shadow
        self._poisoned: set[int] = set()  # pages; there are none in an orderly life

    def read(
        self, actor: Actor, key_id: int, hpa: int, length: int, *, using: int | None = None
    ) -> Met:
        """Read pages of the guest with ``key_id``; ``using`` is the key id of another guest."""
        if actor is Actor.OWNER and self.poisoned(hpa, length):
            return Met(Outcome.MACHINE_CHECK)
        outcome = RULES[self.technology, actor, Operation.READ].outcome
        if outcome is Outcome.ZEROS:
            return Met(outcome, bytes(length))
        if outcome not in (Outcome.DONE, Outcome.CIPHERTEXT, Outcome.NOISE):
            return Met(outcome)
        start, end = _pages(hpa, length)
        if outcome is Outcome.DONE:
            data = self._plain(key_id, start, end)
        else:
            data = self._cipher(key_id, start, end)
            if outcome is Outcome.NOISE:
                data = self._keys.decrypt(_other(using), start, data)
        return Met(outcome, data[hpa - start : hpa - start + length])

    def write(
        self, actor: Actor, key_id: int, hpa: int, data: Buffer, *, using: int | None = None
    ) -> Met:
        """Write to pages of the guest with ``key_id``."""
        if actor is Actor.OWNER and self.poisoned(hpa, len(data)):
            return Met(Outcome.MACHINE_CHECK)
        outcome = RULES[self.technology, actor, Operation.WRITE].outcome
        start, end = _pages(hpa, len(data))
        inner = slice(hpa - start, hpa - start + len(data))
        if outcome is Outcome.DONE:
            plain = bytearray(self._plain(key_id, start, end))
            plain[inner] = data
            self._store_plain(key_id, start, plain)
        elif outcome is Outcome.GARBLES:
            cipher = bytearray(self._cipher(key_id, start, end))
            if actor is Actor.OTHER:  # its own key encrypts what it stores
                view = bytearray(self._keys.decrypt(_other(using), start, cipher))
                view[inner] = data
                stored = self._keys.encrypt(_other(using), start, view)
                cipher[_blocks(inner)] = stored[_blocks(inner)]
            else:
                cipher[inner] = data
            self._store_cipher(key_id, start, cipher)
        elif outcome is Outcome.POISONS:
            self._poisoned.update(range(start, end, PAGE_SIZE))
        return Met(outcome)

    def assign(self, hpa: int, npages: int) -> None:
        """Pages go to a guest anew: full-line writes (MOVDIR64B) heal what was poisoned."""
        if self._poisoned:
            self._poisoned.difference_update(range(hpa, hpa + npages * PAGE_SIZE, PAGE_SIZE))

    def moved(self, hpa: int, target: int, npages: int) -> None:
        """Pages of a guest have another place: a wrong tag stays wrong there."""
        if self._poisoned:
            gone = self._poisoned.intersection(range(hpa, hpa + npages * PAGE_SIZE, PAGE_SIZE))
            self._poisoned -= gone
            self._poisoned.update(page - hpa + target for page in gone)

    def poisoned(self, hpa: int, length: int) -> bool:
        """Whether the guest's access to a range is a machine check."""
        if not self._poisoned:
            return False
        start, end = _pages(hpa, length)
        return not self._poisoned.isdisjoint(range(start, end, PAGE_SIZE))

    def _plain(self, key_id: int, start: int, end: int) -> bytes:
        self._settle(start, end)
        data = bytes(self._memory.read(start, end - start))
        if self.mode is Encrypt.VIEW or not self.technology.encrypts:
            return data
        return self._keys.decrypt(key_id, start, data)

    def _cipher(self, key_id: int, start: int, end: int) -> bytes:
        self._settle(start, end)
        data = bytes(self._memory.read(start, end - start))
        return data if self.mode is Encrypt.BACKING else self._keys.encrypt(key_id, start, data)

    def _store_plain(self, key_id: int, start: int, data: Buffer) -> None:
        stored = self.mode is Encrypt.VIEW or not self.technology.encrypts
        self._store(start, data if stored else self._keys.encrypt(key_id, start, data))

    def _store_cipher(self, key_id: int, start: int, data: Buffer) -> None:
        stored = self.mode is Encrypt.BACKING
        self._store(start, data if stored else self._keys.decrypt(key_id, start, data))

    def _settle(self, start: int, end: int) -> None:
        """What guests stored in shadow pages reaches the file before anybody looks there."""
        if self._shadow is not None:
            self._shadow.write_back(start, (end - start) // PAGE_SIZE)

    def _store(self, start: int, data: Buffer) -> None:
        self._memory.write(start, data)
        if self._shadow is not None:
            self._shadow.refresh(start, len(data) // PAGE_SIZE)

    def key(self) -> Hashable:
        """State of its own; keys, memory and shadow pages have theirs."""
        return (self.technology, self.mode, frozenset(self._poisoned))

    def copy(self, keys: KeyTable, memory: Memory, shadow: ShadowPages | None = None) -> Self:
        """An independent twin on copies of what it works with."""
        twin = type(self)(self.technology, keys, memory, shadow)
        twin._poisoned = self._poisoned.copy()
        return twin


def _pages(hpa: int, length: int) -> tuple[int, int]:
    """The whole pages [start, end) around a range."""
    if hpa < 0 or length < 1:
        raise ValueError(f"access of {length} bytes at hpa {hpa:#x}")
    return hpa - hpa % PAGE_SIZE, hpa + length + -(hpa + length) % PAGE_SIZE


def _blocks(inner: slice) -> slice:
    """A range widened to blocks of AES: no smaller piece of memory is ever stored."""
    return slice(inner.start // 16 * 16, -(-inner.stop // 16) * 16)


def _other(using: int | None) -> int:
    if using is None:
        raise ValueError("an access of another guest needs its key id (using=)")
    return using
