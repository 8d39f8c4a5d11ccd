# SPDX-License-Identifier: GPL-2.0-or-later
"""The Python layouts and the C headers of the guest kernel say the same."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvmsim.kind import KINDS
from kvmsim.vmm import bootparams, bounce, loader, stamplog
from kvmsim.vmm.bootparams import BootFlag, BootParams, Hypercall, RamRange, Technology

COMMON = Path(__file__).parents[2] / "scripts" / "guests" / "kernel" / "common"


def c_values(tmp_path: Path, headers: list[str], expressions: list[str]) -> dict[str, int]:
    """What a C compiler says of each expression."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: install gcc to compare the layouts")
    lines = [f'#include "{h}"' for h in headers] + ["int printf(const char *, ...);"]
    lines += ["int main(void){"]
    lines += [f'printf("%lu\\n", (unsigned long)({e}));' for e in expressions]
    lines += ["return 0;}"]
    source = tmp_path / "values.c"
    source.write_text("\n".join(lines))
    program = tmp_path / "values"
    subprocess.run([compiler, "-I", COMMON, source, "-o", program], check=True, timeout=60)
    out = subprocess.run([program], check=True, capture_output=True, text=True, timeout=10).stdout
    return dict(zip(expressions, map(int, out.split()), strict=True))


def test_boot_params_have_the_layout_of_the_header(tmp_path: Path) -> None:
    expected = {
        f"__builtin_offsetof(struct boot_params, {name})": bootparams.field_offset(name)
        for name in bootparams.FIELDS
    }
    expected |= {
        "__builtin_offsetof(struct boot_params, measured)": bootparams.MEASURED_OFFSET,
        "sizeof(struct measured_range)": 16,
        "BOOT_MAX_MEASURED": bootparams.MAX_MEASURED,
        "BOOT_FLAG_EAGER": BootFlag.EAGER,
        "__builtin_offsetof(struct boot_params, ram)": bootparams.RAM_OFFSET,
        "sizeof(struct boot_params)": bootparams.BOOT_PARAMS_SIZE,
        "sizeof(struct ram_range)": 24,
        "BOOT_MAGIC": bootparams.BOOT_MAGIC,
        "BOOT_VERSION": bootparams.BOOT_VERSION,
        "BOOT_MAX_RAM": bootparams.MAX_RAM_RANGES,
        "BOOT_MAX_VCPUS": bootparams.MAX_VCPUS,
        "BOOT_FLAG_SELFTEST": BootFlag.SELFTEST,
        "BOOT_FLAG_ECHO": BootFlag.ECHO,
        "RAM_PRIVATE_CAPABLE": bootparams.RAM_PRIVATE_CAPABLE,
        "HYPERCALL_VMMCALL": Hypercall.VMMCALL,
        "HYPERCALL_VMCALL": Hypercall.VMCALL,
    }
    expected |= {f"TECH_{technology.name}": technology for technology in Technology}
    assert c_values(tmp_path, ["bootparams.h"], list(expected)) == expected


def test_the_bounce_ring_has_the_layout_of_the_header(tmp_path: Path) -> None:
    expected = {
        "sizeof(struct bounce_ring)": bounce.HEADER.size,
        "sizeof(struct bounce_descriptor)": bounce.DESCRIPTOR.size,
        "__builtin_offsetof(struct bounce_ring, used)": bounce.USED_OFFSET,
        "__builtin_offsetof(struct bounce_descriptor, sector)": 8,
        "__builtin_offsetof(struct bounce_descriptor, length)": 16,
        "__builtin_offsetof(struct bounce_descriptor, operation)": 20,
        "__builtin_offsetof(struct bounce_descriptor, status)": bounce.STATUS_OFFSET,
        "BOUNCE_MAGIC": bounce.MAGIC,
        "BOUNCE_ENTRIES": bounce.ENTRIES,
        "BOUNCE_DESCRIPTORS": bounce.DESCRIPTORS_OFFSET,
        "BOUNCE_SECTOR": bounce.SECTOR,
        "BOUNCE_DOORBELL": bounce.DOORBELL,
        "BOUNCE_RESULT": bounce.RESULT,
        "BOUNCE_PENDING": bounce.PENDING,
    }
    expected |= {f"BOUNCE_{one.name}": one for one in (*bounce.Operation, *bounce.Status)}
    assert c_values(tmp_path, ["bounce.h"], list(expected)) == expected


def test_technologies_are_kinds_of_vms_with_the_same_bits() -> None:
    for technology in Technology:
        kind = KINDS[technology.kind]
        assert kind.shared_bit == (1 << technology.shared_bit if technology.shared_bit else 0)
        assert kind.c_bit == (1 << technology.private_bit if technology.private_bit else 0)


def test_stamp_log_has_the_layout_of_the_header(tmp_path: Path) -> None:
    expected = {
        f"sizeof(struct stamp_{name})": size
        for name, size in stamplog.LAYOUT.items()
        if name != "first_bad"
    }
    expected |= {
        "__builtin_offsetof(struct stamp_vcpu, first_bad)": stamplog.LAYOUT["first_bad"],
        "__builtin_offsetof(struct stamp_header, window_gfn)": 16,
        "__builtin_offsetof(struct stamp_epoch, done)": 4,
        "__builtin_offsetof(struct stamp_record, page)": 24,
        "__builtin_offsetof(struct stamp_record, vcpu)": 52,
    }
    for index, name in enumerate(stamplog.StampStats.__dataclass_fields__):
        expected[f"__builtin_offsetof(struct stamp_vcpu, {name})"] = 8 * index
    for name in ("MAGIC", "WINDOW", "RING", "VCPUS", "EPOCHS", "RINGS", "LOG_SIZE"):
        constant = f"STAMP_{name}"
        expected[constant] = getattr(stamplog, constant)
    for verdict in stamplog.Verdict:
        expected[f"VERDICT_{verdict.name}"] = verdict
    for flag in stamplog.RecordFlag:
        expected[f"STAMP_{flag.name}"] = flag
    assert c_values(tmp_path, ["bootparams.h", "stamplog.h"], list(expected)) == expected


def test_the_parts_of_the_stamp_log_do_not_overlap() -> None:
    vcpus = stamplog.STAMP_VCPUS + bootparams.MAX_VCPUS * stamplog.LAYOUT["vcpu"]
    epochs = stamplog.STAMP_EPOCHS + stamplog.STAMP_WINDOW * stamplog.LAYOUT["epoch"]
    ring = stamplog.STAMP_RING * stamplog.LAYOUT["record"]
    assert vcpus <= stamplog.STAMP_EPOCHS
    assert epochs <= stamplog.STAMP_RINGS
    assert stamplog.STAMP_RINGS + bootparams.MAX_VCPUS * ring <= stamplog.STAMP_LOG_SIZE
    assert loader.LOG_SIZE == stamplog.STAMP_LOG_SIZE


def params(**changes: object) -> BootParams:
    given: dict[str, object] = {
        "ram": (RamRange(0, 4 << 20), RamRange(8 << 20, 4 << 20, private=False)),
        "vcpus": 2,
        "low_size": 2 << 20,
        "log_gpa": 0x100000,
        "log_size": 0x80000,
    }
    return BootParams(**(given | changes))  # type: ignore[arg-type]


def test_pack_puts_the_ranges_behind_the_fields() -> None:
    page = params().pack()
    assert len(page) == bootparams.BOOT_PARAMS_SIZE
    assert page[:8] == b"KVMSIMBP"
    at = bootparams.RAM_OFFSET
    assert int.from_bytes(page[at + 8 : at + 16], "little") == 4 << 20
    assert page[at + 16] == 1
    assert int.from_bytes(page[at + 24 : at + 32], "little") == 8 << 20
    assert page[at + 40] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"vcpus": 0},
        {"vcpus": 17},
        {"ram": ()},
        {"ram": (RamRange(0, 8192), RamRange(4096, 4096))},
        {"ram": tuple(RamRange(i << 20, 4096) for i in range(17))},
        {"technology": Technology.TDX, "ram": (RamRange(0, 3 << 20),)},
    ],
)
def test_impossible_machines_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"vCPUs|RAM"):
        params(**changes)


@pytest.mark.parametrize(("gpa", "size"), [(1, 4096), (0, 4095), (0, 0), (1 << 39, 4096)])
def test_impossible_ram_is_refused(gpa: int, size: int) -> None:
    with pytest.raises(ValueError, match="RAM range"):
        RamRange(gpa, size)
