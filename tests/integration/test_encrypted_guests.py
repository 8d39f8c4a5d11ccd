# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host sees of pages of guests that run, and what it does to them by writing there."""

from __future__ import annotations

import pytest
from booted import AT, MIB, PAGE, WORD, Boot, Guest
from mounts import Mounted

from hwemu.encryptedaccess import Actor, Encrypt, Met, Outcome
from hwemu.encryption import KeyDestroyedError
from kvmsim.confidential.encryption import Encryption
from kvmsim.confidential.hostview import HostView
from kvmsim.hostmem import HostMemory
from kvmsim.vmm.bootparams import Technology

pytest_plugins = ["guest_fixtures", "actor_fixtures", "program_fixtures", "booted_fixtures"]
pytestmark = pytest.mark.fuse

PLAIN = WORD.to_bytes(8, "little") * 512
ENCRYPTED = [Technology.TDX, Technology.SNP]
MODES = [Encrypt.VIEW, Encrypt.BACKING]


@pytest.mark.parametrize("encrypt", MODES)
def test_the_host_reads_ciphertext_of_an_snp_guest_and_cannot_write(
    host: HostMemory, boot: Boot, encrypt: Encrypt
) -> None:
    guest = boot(host, Technology.SNP, encrypt)
    read = guest.emulator.host_read
    first, second = read(AT, PAGE), read(AT + PAGE, PAGE)
    assert first.outcome is second.outcome is Outcome.CIPHERTEXT
    assert first.data is not None
    assert second.data is not None
    assert first.data != second.data, "equal pages differ"
    for at in range(0, PAGE, 16):
        assert first.data[at : at + 16] != PLAIN[:16]
    assert read(AT + 100, 50) == Met(Outcome.CIPHERTEXT, first.data[100:150])
    assert read(AT + PAGE - 8, 16).data == first.data[-8:] + second.data[:8]
    view = HostView(guest.platform)
    assert view.read(guest.hpa(AT), PAGE, Actor.DEVICE) == first
    assert guest.emulator.host_write(AT, b"x" * 8) == Met(Outcome.PAGE_FAULT)
    assert view.write(guest.hpa(AT), b"x", Actor.DEVICE) == Met(Outcome.IO_FAULT)
    assert guest.whole()


@pytest.mark.parametrize("encrypt", MODES)
def test_what_lies_in_the_file(host: HostMemory, boot: Boot, encrypt: Encrypt) -> None:
    for technology in ENCRYPTED:
        guest = boot(host, technology, encrypt)
        found = guest.in_file(AT)
        if encrypt is Encrypt.VIEW:
            assert found == PLAIN
        else:
            assert PLAIN[:16] not in found
        assert guest.ask(f"poke {AT:#x} 7").startswith("ok")
        seen = guest.emulator.host_read(AT, PAGE).data
        if encrypt is Encrypt.BACKING and technology is Technology.SNP:
            assert seen == guest.in_file(AT), "what a vCPU just stored has been written back"
            assert seen != found
        assert guest.number(f"peek {AT:#x}", "value") == 7
        key_ends_with(guest, technology, encrypt)


def key_ends_with(guest: Guest, technology: Technology, encrypt: Encrypt) -> None:
    """No key is left after the end, and its id gets another."""
    guard = guest.guard
    told, hpa = guard.describe(), guest.hpa(AT)
    assert told["encrypt"] == encrypt.value
    encryption = guest.platform.hardware(Encryption, Encryption)
    ((known, key_id),) = encryption.guests
    assert (known.value, key_id) == (technology.kind, told["key_id"])
    keys = encryption.keys(known)
    old = keys.encrypt(key_id, hpa, PLAIN)
    guest.close()
    assert not encryption.guests
    with pytest.raises(KeyDestroyedError):
        keys.decrypt(key_id, hpa, old)
    keys.create(key_id)
    assert keys.decrypt(key_id, hpa, old) != PLAIN
    assert not any(guard.residue().values())


@pytest.mark.parametrize("encrypt", [*MODES, None])
def test_a_write_to_a_page_of_a_td_is_its_machine_check(
    host: HostMemory, boot: Boot, encrypt: Encrypt | None
) -> None:
    guest = boot(host, Technology.TDX, encrypt)
    assert guest.emulator.host_read(AT, PAGE) == Met(Outcome.ZEROS, bytes(PAGE))
    assert guest.whole()
    assert guest.emulator.host_write(AT + PAGE + 64, b"x" * 8) == Met(Outcome.POISONS)
    assert guest.number(f"sum {AT:#x} 1", "sum") == WORD * 512 % (1 << 64), "its neighbour is good"
    assert guest.number(f"peek {AT + 2 * PAGE:#x}", "value") == WORD
    guest.emulator.feed(f"peek {AT + PAGE:#x}\n".encode())
    outcome = guest.emulator.wait(30)
    assert outcome is not None
    assert f"{AT + PAGE:#x}+0x1000: 133: machine check: the host has written" in outcome.message


def test_a_poisoned_page_that_is_punched_is_good_again(
    host: HostMemory, boot: Boot, mounted: Mounted
) -> None:
    guest = boot(host, Technology.TDX, Encrypt.VIEW)
    assert guest.emulator.host_write(AT, b"x").outcome is Outcome.POISONS
    guest.punch(AT, 1)
    for access in (lambda: guest.emulator.host_read(AT - 8, 16),
                   lambda: guest.emulator.host_write(AT, b"x")):  # fmt: skip
        with pytest.raises(ValueError, match="no private memory"):
            access()
    mounted.audit()  # nobody's look has allocated it again
    assert "#V" in guest.ask(f"touch {AT:#x}"), "it is gone, not poisoned"
    assert guest.number(f"accept {AT:#x} 1", "lost") == 1
    assert guest.number(f"peek {AT:#x}", "value") == 0
    mounted.audit()


def test_the_host_reaches_nothing_of_a_protected_vm(host: HostMemory, boot: Boot) -> None:
    guest = boot(host, Technology.PKVM, None)
    assert guest.emulator.host_read(AT, 8) == Met(Outcome.STAGE2_ABORT)
    assert guest.emulator.host_write(AT, b"x") == Met(Outcome.STAGE2_ABORT)
    assert guest.whole()
    assert guest.ask(f"convert {AT:#x} 1 shared").startswith("ok")
    assert guest.emulator.host_read(AT, 8) == Met(Outcome.DONE, PLAIN[:8])
    assert guest.emulator.host_write(AT, b"x" * 8).outcome is Outcome.DONE
    assert guest.number(f"peek {AT:#x} shared", "value") == int.from_bytes(b"x" * 8, "little")


def test_without_encryption_the_tables_still_refuse(host: HostMemory, boot: Boot) -> None:
    guest = boot(host, Technology.SNP, None)
    assert guest.emulator.host_read(AT, 16) == Met(Outcome.DONE, PLAIN[:16])
    assert guest.emulator.host_write(AT, b"x").outcome is Outcome.PAGE_FAULT
    assert guest.whole()
    with pytest.raises(ValueError, match=r"gpa 0x4000000\+0x1: no private memory"):
        guest.emulator.host_read(64 * MIB, 1)


@pytest.mark.parametrize("technology", ENCRYPTED, ids=lambda t: t.kind)
def test_a_guest_on_shadow_pages_lives_as_any(
    host: HostMemory, boot: Boot, technology: Technology
) -> None:
    guest = boot(host, technology, Encrypt.BACKING)
    assert guest.number("test 0x800000 64", "errors") == 0, "both vCPUs use the same pages"
    assert guest.number("report 00ff10", "bytes") >= 1024
    assert "00ff10" + "00" * 8 in guest.console.text, "what the module wrote is read"
    assert guest.ask(f"convert {AT:#x} 1 shared").startswith("ok")
    assert guest.ask(f"poke {AT:#x} 6 shared").startswith("ok")
    assert guest.ask(f"convert {AT:#x} 1 private").startswith("ok")
    assert guest.number(f"peek {AT:#x}", "value") == 0
    assert guest.ask(f"poke {AT:#x} {WORD:#x}").startswith("ok")
    assert guest.number(f"sum {AT:#x} 4", "sum") == WORD * (512 * 3 + 1) % (1 << 64)


def test_shadow_pages_are_gone_when_a_punch_is_acknowledged(
    host: HostMemory, boot: Boot, mounted: Mounted
) -> None:
    for technology in ENCRYPTED:
        guest = boot(host, technology, Encrypt.BACKING)
        report = guest.guard
        before = report.describe()["shadow_pages"]
        guest.punch(AT, 2)
        assert report.describe()["shadow_pages"] == before - 2
        assert guest.platform.memory.read(guest.hpa(AT + 2 * PAGE), 8) != PLAIN[:8]
        assert guest.number(f"accept {AT:#x} 2", "lost") == 2
        assert guest.number(f"peek {AT + 8:#x}", "value") == 0
        assert guest.number(f"peek {AT + 2 * PAGE:#x}", "value") == WORD
        mounted.audit()
        guest.close()
