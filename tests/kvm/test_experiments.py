# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's KVM and the simulator's answer the same experiments, with the same calls."""

from __future__ import annotations

import pytest
from kvm.answers import EXPECTED
from kvm.experiments import EXPERIMENTS
from kvm.world import real


def test_every_experiment_has_answers() -> None:
    assert list(EXPERIMENTS) == list(EXPECTED)


@pytest.mark.kvm
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_on_the_kernel(name: str) -> None:
    with real() as world:
        assert EXPERIMENTS[name](world) == EXPECTED[name]
