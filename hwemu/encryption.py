# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory encryption: a key for each guest, and the bytes that the others see of its pages.

AES-128-XTS with a page as the unit, tweaked by the page's host-physical address, as the memory
controllers do it (AMD APM vol. 2, 7.10 and 15.34; Intel's TME-MK specification). So the same bytes
look different at every address and under every key, and ciphertext that is moved decrypts to
noise. There is no freshness: ciphertext that was recorded and is put back at the same address
decrypts to what it was. RMP, PAMT and integrity tags are what stands against that, not this.

Models rules. Keys lie in ordinary memory of this process, and nothing here is constant-time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Final, Protocol, Self

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import XTS
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PAGE_SIZE: Final = 4096
SECRET_BYTES: Final = 32
_KEY_BYTES: Final = 32  # two keys of 128 bits
_INFO: Final = b"privfs memory encryption, AES-128-XTS"

Buffer = bytes | bytearray | memoryview


class EncryptionError(Exception):
    """Base of what is raised here; names the key id or the range, never bytes of a page."""


class NoKeyError(EncryptionError):
    """A key id that has no key."""


class KeyDestroyedError(NoKeyError):
    """A key id whose key was destroyed with its guest: nobody can read that memory any more."""


class KeyInUseError(EncryptionError):
    """A key id that has a key already."""


class KeyTable:
    """Keys by key id (HKID, ASID): derived from ``secret``, 32 bytes that the machine drew at boot.

    An id that is used again gets another key: the key of its second life is not that of its first.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a secret of {len(secret)} bytes: {SECRET_BYTES} are needed")
        self._secret = secret
        self._keys: dict[int, bytes] = {}
        self._lives: dict[int, int] = {}

    def create(self, key_id: int) -> None:
        """Give ``key_id``, of 1 to 65535, a key; `KeyInUseError` if it has one."""
        if not 0 < key_id < 1 << 16:
            raise ValueError(f"key id {key_id}: 1 to 65535; 0 is the host's, without encryption")
        if key_id in self._keys:
            raise KeyInUseError(f"create: key id {key_id} has a key")
        life = self._lives.get(key_id, 0) + 1
        self._lives[key_id] = life
        info = _INFO + key_id.to_bytes(2, "little") + life.to_bytes(8, "little")
        self._keys[key_id] = HKDF(SHA256(), _KEY_BYTES, None, info).derive(self._secret)

    def destroy(self, key_id: int) -> None:
        """At teardown; all that was encrypted with it is noise from here on."""
        self._key("destroy", key_id)
        del self._keys[key_id]

    def __contains__(self, key_id: int) -> bool:
        return key_id in self._keys

    def encrypt(self, key_id: int, hpa: int, plain: Buffer) -> bytes:
        """What lies in memory of whole pages of plaintext at ``hpa``."""
        return self._transform("encrypt", key_id, hpa, plain)

    def decrypt(self, key_id: int, hpa: int, cipher: Buffer) -> bytes:
        """What the holder of the key reads of whole pages of memory at ``hpa``."""
        return self._transform("decrypt", key_id, hpa, cipher)

    def _key(self, operation: str, key_id: int) -> bytes:
        key = self._keys.get(key_id)
        if key is None:
            if key_id in self._lives:
                raise KeyDestroyedError(f"{operation}: the key of key id {key_id} was destroyed")
            raise NoKeyError(f"{operation}: key id {key_id} never had a key")
        return key

    def _transform(self, operation: str, key_id: int, hpa: int, data: Buffer) -> bytes:
        if hpa < 0 or hpa % PAGE_SIZE or len(data) % PAGE_SIZE:
            raise ValueError(f"{operation} of {len(data)} bytes at hpa {hpa:#x}: whole pages only")
        algorithm = AES(self._key(operation, key_id))
        result = bytearray(len(data) + 16)  # update_into() wants a block more than it writes
        source, target = memoryview(data), memoryview(result)
        for at in range(0, len(data), PAGE_SIZE):
            cipher = Cipher(algorithm, XTS((hpa + at).to_bytes(16, "little")))
            context = cipher.encryptor() if operation == "encrypt" else cipher.decryptor()
            context.update_into(source[at : at + PAGE_SIZE], target[at : at + PAGE_SIZE + 16])
        return bytes(target[: len(data)])

    def key(self) -> Hashable:
        """The whole state as a hashable value; the keys follow from lives and secret."""
        return (tuple(sorted(self._keys)), tuple(sorted(self._lives.items())))

    def copy(self) -> Self:
        """An independent twin."""
        twin = type(self)(self._secret)
        twin._keys, twin._lives = self._keys.copy(), self._lives.copy()
        return twin


class Memory(Protocol):
    """Bytes by host-physical address: what lies in the file."""

    def read(self, hpa: int, length: int) -> Buffer:
        """Bytes [``hpa``, ``hpa + length``)."""
        ...

    def write(self, hpa: int, data: Buffer) -> None:
        """Store bytes."""
        ...


class PoolFullError(EncryptionError):
    """No shadow page is free; `ShadowPages.drop` some."""


class ShadowPages:
    """Plaintext of encrypted pages, while a guest uses them: what its second stage maps.

    ``pool`` is writable memory of whole pages that begins at ``pool_hpa``; ``memory`` holds
    ciphertext. An invalidation is acknowledged only after `drop` of its range.
    """

    def __init__(
        self, keys: KeyTable, memory: Memory, pool: bytearray | memoryview, pool_hpa: int
    ) -> None:
        self._keys = keys
        self._memory = memory
        self._pool = memoryview(pool).cast("B")
        if len(self._pool) % PAGE_SIZE or pool_hpa % PAGE_SIZE:
            raise ValueError(f"pool of {len(self._pool)} bytes at {pool_hpa:#x}: whole pages only")
        self._pool_hpa = pool_hpa
        self._free = list(range(len(self._pool) // PAGE_SIZE - 1, -1, -1))
        self._open: dict[int, tuple[int, int]] = {}  # hpa → pool page, key id

    def __len__(self) -> int:
        return len(self._open)

    def open(self, key_id: int, hpa: int, *, plain: bool = False) -> int:
        """Where the plaintext of the page at ``hpa`` lies, decrypted if it is not there yet.

        ``plain``: it still lies in place, and is encrypted there now. `PoolFullError`, or that of
        the key; `KeyInUseError` if it is open under another one.
        """
        known = self._open.get(hpa)
        if known is not None:
            if known[1] != key_id:
                raise KeyInUseError(f"open: hpa {hpa:#x} is open with key id {known[1]}")
            return self._pool_hpa + known[0] * PAGE_SIZE
        if not self._free:
            raise PoolFullError(f"open: hpa {hpa:#x}: all {len(self._open)} pages are in use")
        data = bytes(self._memory.read(hpa, PAGE_SIZE))
        if plain:
            self._memory.write(hpa, self._keys.encrypt(key_id, hpa, data))
        else:
            data = self._keys.decrypt(key_id, hpa, data)
        page = self._free.pop()
        self._view(page)[:] = data
        self._open[hpa] = (page, key_id)
        return self._pool_hpa + page * PAGE_SIZE

    def drop(self, hpa: int, npages: int, *, write_back: bool = True) -> int:
        """Close pages of a range, no vCPU being able to reach them; how many were open.

        Written back first unless what lies beneath is to go anyway. If a key was destroyed, all
        that is left of its pages is the ciphertext of their last drop.
        """
        end = hpa + npages * PAGE_SIZE
        closing = [at for at in self._covered(hpa, end) if at in self._open]
        if write_back:
            self.write_back(hpa, npages)
        for at in closing:
            page, _ = self._open.pop(at)
            self._view(page)[:] = bytes(PAGE_SIZE)
            self._free.append(page)
        return len(closing)

    def write_back(self, hpa: int, npages: int) -> None:
        """Store what open pages of a range hold; they stay open, and vCPUs may be at them."""
        for at in self._covered(hpa, hpa + npages * PAGE_SIZE):
            page, key_id = self._open.get(at, (0, 0))
            if key_id in self._keys:
                self._memory.write(at, self._keys.encrypt(key_id, at, self._view(page)))

    def refresh(self, hpa: int, npages: int) -> None:
        """Load open pages of a range again: what lies beneath was changed by another."""
        for at in self._covered(hpa, hpa + npages * PAGE_SIZE):
            page, key_id = self._open.get(at, (0, 0))
            if key_id in self._keys:
                data = self._memory.read(at, PAGE_SIZE)
                self._view(page)[:] = self._keys.decrypt(key_id, at, data)

    def close(self) -> None:
        """Let go of the pool; nothing may be open."""
        if self._open:
            raise EncryptionError(f"close: {len(self._open)} shadow pages are open")
        self._free.clear()
        self._pool.release()

    def _covered(self, hpa: int, end: int) -> Iterator[int]:
        if (end - hpa) // PAGE_SIZE <= len(self._open):
            return iter(range(hpa, end, PAGE_SIZE))
        return iter([at for at in self._open if hpa <= at < end])

    def _view(self, page: int) -> memoryview:
        return self._pool[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
