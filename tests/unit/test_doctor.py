# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from privfs import doctor, probes
from privfs.cli.main import call
from privfs.probes import Check, Result, failed, passed, skipped

#: Checks that mount, start programs that may be missing, or depend on the machine's set-up.
QUICK = [
    probes.kernel, probes.memfd, probes.pidfd, probes.message_queues, probes.peer_pidfd,
    probes.shmem_pages, probes.huge_pages, probes.secret_pages,
    probes.userfaults, probes.open_files, doctor.fuse_device, doctor.fusermount,
    doctor.fuse_library, doctor.allow_other, doctor.mount_helper, doctor.engine, doctor.compiler,
]  # fmt: skip


@pytest.mark.parametrize("check", QUICK, ids=lambda check: check.__name__)
def test_a_check_says_what_it_found_and_what_mends_it(check: Any) -> None:
    found = check()
    assert found.text
    assert bool(found.remedy) == (found.result is not Result.PASS)


@pytest.mark.parametrize("check", QUICK, ids=lambda check: check.__name__)
def test_a_check_leaves_no_descriptor(check: Any) -> None:
    check()
    before = set(os.listdir("/proc/self/fd"))
    check()
    assert set(os.listdir("/proc/self/fd")) == before


def refuse(code: int) -> Any:
    def refused(*arguments: object, **more: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return refused


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOENT, "modprobe fuse"),
        (errno.EACCES, "chmod 666"),
        (errno.EPERM, "--cap-add SYS_ADMIN"),
    ],
)
def test_an_unusable_device_comes_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    monkeypatch.setattr(doctor.os, "open", refuse(code))
    monkeypatch.setattr(doctor.stat, "S_ISCHR", lambda mode: True)
    monkeypatch.setattr(doctor.os, "stat", lambda path: os.lstat("/"))
    found = doctor.fuse_device()
    assert found.result is Result.FAIL
    assert words in found.remedy


@pytest.mark.parametrize(
    ("release", "machine", "result"),
    [
        ("5.15.0-91-generic", "x86_64", Result.PASS),
        ("6.18.44", "x86_64", Result.PASS),
        ("10.0", "x86_64", Result.PASS),
        ("5.14.21", "x86_64", Result.FAIL),
        ("6.1.0", "aarch64", Result.FAIL),
        ("strange", "x86_64", Result.FAIL),
    ],
)
def test_kernels(
    monkeypatch: pytest.MonkeyPatch, release: str, machine: str, result: Result
) -> None:
    monkeypatch.setattr(probes.platform, "release", lambda: release)
    monkeypatch.setattr(probes.platform, "machine", lambda: machine)
    assert probes.kernel().result is result


@pytest.mark.parametrize(
    ("check", "code", "result"),
    [
        (probes.message_queues, errno.ENOSYS, Result.SKIP),
        (probes.userfaults, errno.EPERM, Result.SKIP),
    ],
)
def test_a_refused_system_call_has_a_fallback(
    monkeypatch: pytest.MonkeyPatch, check: Any, code: int, result: Result
) -> None:
    monkeypatch.setattr(probes, "_syscall", refuse(code))
    monkeypatch.setattr(probes, "_USERFAULT_DEVICE", "/nonexistent")
    found = check()
    assert found.result is result
    assert os.strerror(code) in found.text


@pytest.mark.parametrize(
    ("swaps", "locks", "result"),
    [
        ("Filename Type\n", False, Result.PASS),
        ("Filename Type\n/swap file\n", True, Result.PASS),
        ("Filename Type\n/swap file\n", False, Result.SKIP),
    ],
)
def test_fences_need_memory_that_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, swaps: str, locks: bool, result: Result
) -> None:
    if probes.userfaults().result is not Result.PASS:
        pytest.skip(probes.userfaults().text)
    table = tmp_path / "swaps"
    table.write_text(swaps)
    monkeypatch.setattr(probes, "_SWAPS", table)
    monkeypatch.setattr(probes, "_locks_freely", lambda: locks)
    monkeypatch.setattr(probes.resource, "getrlimit", lambda which: (8 << 20, 8 << 20))
    assert probes.userfaults().result is result


def test_without_proof_of_death_there_is_no_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.os, "pidfd_open", refuse(errno.ENOSYS))
    assert probes.pidfd().result is Result.FAIL


def test_a_missing_fusermount_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: None)
    assert doctor.fusermount().remedy == "apt install fuse3"
    assert doctor.compiler().result is Result.SKIP


def test_few_descriptors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.resource, "getrlimit", lambda which: (256, 1024))
    assert "1024" in probes.open_files().text
    assert probes.open_files().result is Result.SKIP


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOSPC])
def test_a_mount_without_passthrough_works_but_says_why(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    said = json.dumps([{"mode": "direct_io", "passthrough_errno": code}])
    done = subprocess.CompletedProcess([], 0, said, "")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: done)
    found = doctor.trial_mount()
    assert found.result is Result.SKIP
    assert os.strerror(code) in found.text


def test_a_failed_trial_says_what_privfs_said(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 125, "", "noise\nprivfs: no room\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: done)
    assert doctor.trial_mount() == failed("mounting", "no room", "mend what failed above")


CHECKS = (
    lambda: passed("good", "is good"),
    lambda: skipped("so", "is so", "mend it"),
)


def test_the_report_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", CHECKS)
    assert call(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "[PASS] good: is good",
        "[SKIP] so: is so",
        "       mend: mend it",
    ]
    monkeypatch.setattr(doctor, "CHECKS", (*CHECKS, lambda: failed("bad", "is bad", "do it")))
    assert call(["doctor", "--json"]) == 6
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["ok"] is False
    assert found["checks"][2] == {
        "check": "bad", "result": "FAIL", "text": "is bad", "remedy": "do it",
    }  # fmt: skip
    assert said.err == "privfs: missing: bad\n"


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Check:
        raise ZeroDivisionError("here")

    monkeypatch.setattr(doctor, "CHECKS", (broken, *CHECKS))
    found = list(doctor.run_all())
    assert [check.result for check in found] == [Result.FAIL, Result.PASS, Result.SKIP]
    assert "ZeroDivisionError: here" in found[0].text


def test_doctor_needs_none_of_what_it_checks() -> None:
    """It must be able to run where pyfuse3, trio and the rest are missing."""
    script = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'pyfuse3', 'trio', 'numpy', 'unicorn', 'pyroaring',"
        " 'psutil'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from privfs.cli import main\n"
        "from privfs import doctor\n"
        "doctor.CHECKS = (doctor.fuse_library,)\n"
        "sys.exit(main.call(['doctor']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 6, done.stderr
    assert done.stdout.startswith("[FAIL] pyfuse3: unusable: pyfuse3")
