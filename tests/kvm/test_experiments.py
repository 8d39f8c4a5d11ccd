# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's KVM and the simulator's answer the same experiments, with the same calls."""

from __future__ import annotations

import pytest
from kvm.answers import DIFFERENCES, EXPECTED, MAPPABLE, expected
from kvm.experiments import EXPERIMENTS
from kvm.world import Worlds

from kvmsim.uapi import KVM_CAP_GUEST_MEMFD_FLAGS


def test_every_experiment_has_answers() -> None:
    assert set(EXPERIMENTS) == set(EXPECTED)


def test_every_difference_is_one() -> None:
    for name, differences in DIFFERENCES.items():
        for what, difference in differences.items():
            assert difference.answer != EXPECTED[name][what], (name, what)
            assert difference.reason


@pytest.mark.logs("KVM_CREATE_GUEST_MEMFD on a system descriptor is not simulated")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_device_sees_what_it_must(name: str, worlds: Worlds) -> None:
    with worlds() as world:
        if name in MAPPABLE and not world.vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS):
            pytest.skip("no FUSE passthrough: needs root and Linux 6.9")
        assert EXPERIMENTS[name](world) == expected(world.kind, name)
