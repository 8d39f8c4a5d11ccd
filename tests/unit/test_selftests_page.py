# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/selftests.md: no case of the kernel's is missing, and the page lists what is tested."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: The cases by the names that they have in tools/testing/selftests (kvm/ and memfd/).
KERNEL = {
    "guest_memfd": """
        guest_memfd_flags create_guest_memfd_multiple create_guest_memfd_invalid_sizes
        file_read_write mmap_supported fault_overflow fault_private mmap_cow mmap_not_supported
        file_size fallocate invalid_punch_hole mbind numa_allocation collapse guest_memfd_guest""",
    "private_mem_conversions": "explicit_conversion punch_hole memfd_outlives_vm",
    "private_mem_kvm_exits": "access_memslot_deleted access_memslot_not_private",
    "set_memory_region": """
        zero_memory_regions invalid_memory_region_flags add_max_memory_regions
        add_private_memory_region add_overlapping_private_memory_regions move_memory_region
        delete_memory_region mmio_during_vectoring""",
    "pre_fault_memory": """
        pre_fault_range pre_fault_range_half_outside pre_fault_range_outside""",
    "memfd": """
        create basic exec_seal exec_no_seal noexec_seal seal_write seal_future_write
        seal_write_map_read_shared seal_shrink seal_grow seal_resize sysctl_simple sysctl_nested
        share_dup share_mmap share_open share_fork seal_auto_allocate""",
    "guest_memfd_conversions": """
        init_private init_shared indexing before_allocation_shared before_allocation_private
        unallocated_folios truncate forked_accesses elevated_refcount zero_not_to_private
        unspecified_scrambles""",
}


@pytest.mark.parametrize("program", KERNEL)
def test_no_case_is_missing(program: str) -> None:
    source = (ROOT / f"tests/selftests/test_{program}.py").read_text()
    names = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert {f"test_{case}" for case in KERNEL[program].split()} <= names


def test_the_page_lists_what_is_tested() -> None:
    command = [sys.executable, str(ROOT / "scripts/selftests"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs/selftests.md").read_text()
    assert re.search(r"^Run on \d{4}-\d\d-\d\d, Linux \d\S+: `scripts/selftests", page, re.M)
