# SPDX-License-Identifier: GPL-2.0-or-later
"""Keys of guests, and what everybody else sees of their pages."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from hwemu.encryptedaccess import (
    RULES,
    Actor,
    Encrypt,
    Met,
    Operation,
    Outcome,
    PrivateMemory,
    Technology,
)
from hwemu.encryption import (
    EncryptionError,
    KeyDestroyedError,
    KeyInUseError,
    KeyTable,
    NoKeyError,
    PoolFullError,
    ShadowPages,
)

P = 4096
SECRET = bytes(range(32))
HPA = 1 << 39
POOL = 1 << 28
MINE, THEIRS = 5, 6
PLAIN = bytes(n * 7 % 251 for n in range(2 * P))


class File:
    """Eight pages from HPA."""

    def __init__(self) -> None:
        self.data = bytearray(8 * P)

    def read(self, hpa: int, length: int) -> memoryview:
        return memoryview(self.data)[hpa - HPA : hpa - HPA + length].toreadonly()

    def write(self, hpa: int, data: bytes | bytearray | memoryview) -> None:
        self.data[hpa - HPA : hpa - HPA + len(data)] = data


@pytest.fixture
def keys() -> KeyTable:
    table = KeyTable(SECRET)
    table.create(MINE)
    table.create(THEIRS)
    return table


# --- keys -----------------------------------------------------------------------------------------


def test_round_trip_at_every_length(keys: KeyTable) -> None:
    for npages in (0, 1, 2):
        plain = PLAIN[: npages * P]
        cipher = keys.encrypt(MINE, HPA, plain)
        assert len(cipher) == len(plain)
        assert keys.decrypt(MINE, HPA, memoryview(cipher)) == plain


def test_a_range_is_its_pages(keys: KeyTable) -> None:
    whole = keys.encrypt(MINE, HPA, PLAIN)
    assert whole[:P] == keys.encrypt(MINE, HPA, PLAIN[:P])
    assert whole[P:] == keys.encrypt(MINE, HPA + P, PLAIN[P:])


def test_the_tweak_is_the_address_and_the_unit_a_page() -> None:
    table = KeyTable(SECRET)
    table.create(MINE)
    table._keys[MINE] = key = bytes(range(100, 132))
    plain = Cipher(algorithms.AES(key), modes.XTS(HPA.to_bytes(16, "little"))).encryptor()
    assert table.encrypt(MINE, HPA, PLAIN[:P]) == plain.update(PLAIN[:P])


def test_equal_pages_differ_by_address_and_by_key(keys: KeyTable) -> None:
    page = bytes(P)
    seen = {keys.encrypt(key, HPA + n * P, page) for key in (MINE, THEIRS) for n in range(4)}
    assert len(seen) == 8
    assert all(one[at : at + 16] != bytes(16) for one in seen for at in range(0, P, 16))


def test_moved_ciphertext_is_noise_and_replayed_ciphertext_is_not(keys: KeyTable) -> None:
    old = keys.encrypt(MINE, HPA, PLAIN[:P])
    moved = keys.decrypt(MINE, HPA + P, old)
    assert all(moved[at : at + 16] != PLAIN[at : at + 16] for at in range(0, P, 16))
    keys.encrypt(MINE, HPA, bytes(P))  # the guest stores something newer
    assert keys.decrypt(MINE, HPA, old) == PLAIN[:P], "no freshness: RMP and PAMT are for that"


def test_a_destroyed_key_is_gone_and_its_id_gets_another(keys: KeyTable) -> None:
    cipher = keys.encrypt(MINE, HPA, PLAIN)
    keys.destroy(MINE)
    assert MINE not in keys
    uses: list[Callable[[], object]] = [
        lambda: keys.encrypt(MINE, HPA, PLAIN),
        lambda: keys.decrypt(MINE, HPA, PLAIN),
        lambda: keys.destroy(MINE),
    ]
    for use in uses:
        with pytest.raises(KeyDestroyedError, match="key id 5 was destroyed"):
            use()
    keys.create(MINE)
    assert keys.decrypt(MINE, HPA, cipher) != PLAIN
    assert keys.decrypt(THEIRS, HPA, keys.encrypt(THEIRS, HPA, PLAIN)) == PLAIN


def test_keys_follow_from_secret_id_and_life() -> None:
    def first(secret: bytes, key_id: int, lives: int) -> bytes:
        table = KeyTable(secret)
        for _ in range(lives - 1):
            table.create(key_id)
            table.destroy(key_id)
        table.create(key_id)
        return table.encrypt(key_id, HPA, bytes(P))

    assert first(SECRET, 1, 1) == first(SECRET, 1, 1)
    cases = [(SECRET, 1, 1), (SECRET, 2, 1), (SECRET, 1, 2), (bytes(32), 1, 1)]
    assert len({first(*case) for case in cases}) == 4


def test_what_a_key_table_refuses(keys: KeyTable) -> None:
    with pytest.raises(KeyInUseError, match="key id 5 has a key"):
        keys.create(MINE)
    with pytest.raises(NoKeyError, match="key id 9 never"):
        keys.encrypt(9, HPA, PLAIN)
    for bad in (0, 1 << 16, -1):
        with pytest.raises(ValueError, match="key id"):
            keys.create(bad)
    for hpa, data in ((HPA + 1, PLAIN), (HPA, PLAIN[1:]), (-P, PLAIN)):
        with pytest.raises(ValueError, match="whole pages"):
            keys.encrypt(MINE, hpa, data)
    with pytest.raises(ValueError, match="32 are needed"):
        KeyTable(b"short")


def test_copies_of_key_tables_go_apart(keys: KeyTable) -> None:
    twin = keys.copy()
    assert twin.key() == keys.key()
    assert twin.encrypt(MINE, HPA, PLAIN) == keys.encrypt(MINE, HPA, PLAIN)
    twin.destroy(MINE)
    assert twin.key() != keys.key()
    assert MINE in keys


# --- shadow pages ---------------------------------------------------------------------------------


class Backed:
    """A file of ciphertext, and two shadow pages."""

    def __init__(self, keys: KeyTable) -> None:
        self.file = File()
        self.pool = bytearray(2 * P)
        self.shadow = ShadowPages(keys, self.file, self.pool, POOL)
        self.file.write(HPA, keys.encrypt(MINE, HPA, PLAIN))

    def at(self, hpa: int) -> memoryview:
        return memoryview(self.pool)[hpa - POOL : hpa - POOL + P]


def test_a_shadow_page_is_plaintext_and_the_file_is_not(keys: KeyTable) -> None:
    backed = Backed(keys)
    shadow = backed.shadow.open(MINE, HPA)
    assert bytes(backed.at(shadow)) == PLAIN[:P]
    assert PLAIN[:64] not in backed.file.data
    assert backed.shadow.open(MINE, HPA) == shadow
    with pytest.raises(KeyInUseError, match="open with key id 5"):
        backed.shadow.open(THEIRS, HPA)


def test_a_dropped_page_is_written_back_and_cleared(keys: KeyTable) -> None:
    backed = Backed(keys)
    place = backed.at(backed.shadow.open(MINE, HPA + P))
    place[:5] = b"guest"
    assert backed.shadow.drop(HPA, 1) == 0
    assert backed.shadow.drop(HPA, 1 << 20) == 1
    assert bytes(backed.pool) == bytes(2 * P), "plaintext outlives its page"
    assert len(backed.shadow) == 0
    assert keys.decrypt(MINE, HPA + P, backed.file.read(HPA + P, P))[:5] == b"guest"
    assert bytes(backed.at(backed.shadow.open(MINE, HPA + P)))[:5] == b"guest"


def test_a_page_may_be_opened_while_its_plaintext_is_in_place(keys: KeyTable) -> None:
    backed = Backed(keys)
    backed.file.write(HPA, PLAIN[:P])
    assert bytes(backed.at(backed.shadow.open(MINE, HPA, plain=True))) == PLAIN[:P]
    assert backed.file.data[:P] == keys.encrypt(MINE, HPA, PLAIN[:P])


def test_a_pool_is_let_go_of_when_nothing_is_open(keys: KeyTable) -> None:
    backed = Backed(keys)
    backed.shadow.open(MINE, HPA)
    with pytest.raises(EncryptionError, match="close: 1 shadow pages are open"):
        backed.shadow.close()
    backed.shadow.drop(HPA, 8)
    backed.shadow.close()
    backed.pool.clear()  # BufferError while anything refers to it


def test_what_is_punched_needs_no_writing_back(keys: KeyTable) -> None:
    backed = Backed(keys)
    backed.at(backed.shadow.open(MINE, HPA))[:5] = b"guest"
    before = bytes(backed.file.data)
    assert backed.shadow.drop(HPA, 8, write_back=False) == 1
    assert backed.file.data == before


def test_the_pool_has_an_end(keys: KeyTable) -> None:
    backed = Backed(keys)
    opened = {backed.shadow.open(MINE, HPA + n * P) for n in range(2)}
    assert opened == {POOL, POOL + P}
    with pytest.raises(PoolFullError, match="all 2 pages"):
        backed.shadow.open(MINE, HPA + 2 * P)
    backed.shadow.drop(HPA, 1)
    backed.shadow.open(MINE, HPA + 2 * P)


def test_nothing_opens_after_the_key_is_gone_and_what_is_open_can_be_dropped(
    keys: KeyTable,
) -> None:
    backed = Backed(keys)
    backed.at(backed.shadow.open(MINE, HPA))[:5] = b"guest"
    before = bytes(backed.file.data)
    keys.destroy(MINE)
    with pytest.raises(KeyDestroyedError):
        backed.shadow.open(MINE, HPA + P)
    assert len(backed.shadow) == 1
    assert backed.shadow.drop(HPA, 8) == 1
    assert backed.file.data == before
    assert bytes(backed.pool) == bytes(2 * P)


def test_a_pool_is_of_whole_pages(keys: KeyTable) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        ShadowPages(keys, File(), bytearray(P + 1), POOL)


# --- who meets what -------------------------------------------------------------------------------


class Place:
    """A private page of MINE's, at the third page of the file; in BACKING mode it is open."""

    hpa = HPA + 2 * P

    def __init__(self, technology: Technology, mode: Encrypt, keys: KeyTable) -> None:
        self.keys = keys
        self.file = File()
        self.pool = bytearray(P)
        backing = mode is Encrypt.BACKING
        self.shadow = ShadowPages(keys, self.file, self.pool, POOL) if backing else None
        self.memory = PrivateMemory(technology, keys, self.file, self.shadow)
        self.memory.write(Actor.OWNER, MINE, self.hpa, PLAIN[:P])
        self.encrypted = keys.encrypt(MINE, self.hpa, PLAIN[:P])
        if self.shadow is not None and technology.encrypts:
            self.shadow.open(MINE, self.hpa)

    def read(self, actor: Actor, at: int = 0, length: int = P) -> Met:
        return self.memory.read(actor, MINE, self.hpa + at, length, using=THEIRS)

    def write(self, actor: Actor, data: bytes, at: int = 0) -> Met:
        return self.memory.write(actor, MINE, self.hpa + at, data, using=THEIRS)


CELLS = list(product(Technology, Actor, Operation))
REFUSALS = {
    Outcome.MACHINE_CHECK, Outcome.PAGE_FAULT, Outcome.NESTED_FAULT, Outcome.STAGE2_ABORT,
    Outcome.IO_FAULT,
}  # fmt: skip
#: read and write of owner, host, another guest, a device
EXPECTED = {
    Technology.TDX: "DONE DONE ZEROS POISONS MACHINE_CHECK POISONS ZEROS POISONS",
    Technology.SNP: "DONE DONE CIPHERTEXT PAGE_FAULT NESTED_FAULT NESTED_FAULT CIPHERTEXT IO_FAULT",
    Technology.SEV: "DONE DONE CIPHERTEXT GARBLES NOISE GARBLES CIPHERTEXT GARBLES",
    Technology.PKVM: "DONE DONE STAGE2_ABORT STAGE2_ABORT STAGE2_ABORT STAGE2_ABORT IO_FAULT IO_FAULT",  # noqa: E501
}


def test_the_table_is_complete_and_as_the_manuals_have_it() -> None:
    assert set(RULES) == set(CELLS)
    for technology, words in EXPECTED.items():
        told = [RULES[technology, actor, op].outcome.name for actor in Actor for op in Operation]
        assert told == words.split()
    assert all(rule.source for (_, actor, _), rule in RULES.items() if actor is not Actor.OWNER)


@pytest.mark.parametrize("mode", Encrypt)
@pytest.mark.parametrize(("technology", "actor", "operation"), CELLS)
def test_every_cell(
    technology: Technology, actor: Actor, operation: Operation, mode: Encrypt, keys: KeyTable
) -> None:
    place = Place(technology, mode, keys)
    outcome = RULES[technology, actor, operation].outcome
    changed = PLAIN[:32] + b"x" * 48 + PLAIN[80:P]
    if operation is Operation.READ:
        met = place.read(actor)
        assert met.outcome is outcome
        yields = {
            Outcome.DONE: PLAIN[:P],
            Outcome.ZEROS: bytes(P),
            Outcome.CIPHERTEXT: place.encrypted,
            Outcome.NOISE: keys.decrypt(THEIRS, place.hpa, place.encrypted),
        }
        assert met.data == yields.get(outcome)
        assert (met.data is None) == (outcome in REFUSALS)
        assert place.read(Actor.OWNER) == Met(Outcome.DONE, PLAIN[:P]), "a read changes nothing"
        return
    before = bytes(place.file.data)
    assert place.write(actor, b"x" * 48, 32) == Met(outcome)
    after = place.read(Actor.OWNER)
    match outcome:
        case Outcome.DONE:
            assert after == Met(Outcome.DONE, changed)
        case Outcome.GARBLES:
            assert after.outcome is Outcome.DONE
            assert after.data is not None
            assert after.data[:32] == PLAIN[:32]
            assert after.data[80:] == PLAIN[80:P]
            for at in (32, 48, 64):
                assert after.data[at : at + 16] not in (PLAIN[at : at + 16], b"x" * 16)
        case Outcome.POISONS:
            assert after == Met(Outcome.MACHINE_CHECK)
            assert place.write(Actor.OWNER, b"y") == Met(Outcome.MACHINE_CHECK)
            place.memory.assign(place.hpa, 1)
            assert place.read(Actor.OWNER).outcome is Outcome.DONE
        case _:
            assert outcome in REFUSALS
            assert after == Met(Outcome.DONE, PLAIN[:P])
            assert place.file.data == before


@pytest.mark.parametrize("technology", Technology)
def test_what_lies_in_the_file(technology: Technology, keys: KeyTable) -> None:
    view, backing = (Place(technology, mode, keys) for mode in Encrypt)
    assert view.file.data[2 * P : 3 * P] == PLAIN[:P]
    kept = backing.file.data[2 * P : 3 * P]
    assert kept == (backing.encrypted if technology.encrypts else PLAIN[:P])


def test_both_modes_tell_the_same(keys: KeyTable) -> None:
    """Byte for byte, also of what the host garbles."""
    places = [Place(Technology.SEV, mode, keys) for mode in Encrypt]
    for place in places:
        place.write(Actor.HOST, b"z" * 100, 1000)
        place.write(Actor.OTHER, b"w" * 5, 3)
    for actor in Actor:
        one, other = (place.read(actor) for place in places)
        assert one == other


def test_the_host_sees_what_a_vcpu_just_stored(keys: KeyTable) -> None:
    """And the vCPU what the host garbled, while its shadow page is open."""
    place = Place(Technology.SEV, Encrypt.BACKING, keys)
    place.pool[:5] = b"fresh"
    want = keys.encrypt(MINE, place.hpa, b"fresh" + PLAIN[5:P])
    assert place.read(Actor.HOST).data == want
    assert place.shadow is not None
    assert len(place.shadow) == 1, "a vCPU may be at it"
    place.write(Actor.HOST, b"z", 4000)
    assert place.pool[:5] == b"fresh"
    assert place.pool[4000] != PLAIN[4000] or place.pool[4001] != PLAIN[4001]


def test_accesses_may_cross_pages(keys: KeyTable) -> None:
    memory = PrivateMemory(Technology.SNP, keys, File())
    memory.write(Actor.OWNER, MINE, HPA + P - 3, b"across")
    assert memory.read(Actor.OWNER, MINE, HPA + P - 3, 6).data == b"across"
    whole = memory.read(Actor.HOST, MINE, HPA, 2 * P).data
    assert whole is not None
    assert memory.read(Actor.HOST, MINE, HPA + P - 3, 6).data == whole[P - 3 : P + 3]


@pytest.mark.parametrize("mode", Encrypt)
def test_after_teardown_nobody_reads(mode: Encrypt, keys: KeyTable) -> None:
    place = Place(Technology.SEV, mode, keys)
    if place.shadow is not None:
        place.shadow.drop(HPA, 8)
    keys.destroy(MINE)
    if mode is Encrypt.VIEW:
        with pytest.raises(KeyDestroyedError):
            place.read(Actor.HOST)
    with pytest.raises(EncryptionError):
        place.write(Actor.OWNER, b"x") if mode is Encrypt.BACKING else place.read(Actor.OTHER)


def test_bad_accesses(keys: KeyTable) -> None:
    memory = PrivateMemory(Technology.SEV, keys, File())
    for hpa, length in ((-1, 1), (HPA, 0)):
        with pytest.raises(ValueError, match="access of"):
            memory.read(Actor.OWNER, MINE, hpa, length)
    for use in (
        lambda: memory.read(Actor.OTHER, MINE, HPA, 1),
        lambda: memory.write(Actor.OTHER, MINE, HPA, b"x"),
    ):
        with pytest.raises(ValueError, match="using="):
            use()


def test_copies_of_memories_go_apart(keys: KeyTable) -> None:
    place = Place(Technology.TDX, Encrypt.VIEW, keys)
    twin = place.memory.copy(keys.copy(), place.file)
    place.write(Actor.HOST, b"x")
    assert twin.key() != place.memory.key()
    assert place.memory.copy(keys, place.file).key() == place.memory.key()
    assert twin.read(Actor.OWNER, MINE, place.hpa, 1).outcome is Outcome.DONE
