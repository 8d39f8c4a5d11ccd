# SPDX-License-Identifier: GPL-2.0-or-later
"""What a stranger would try: both KVMs answer the same, or it is said why."""

from __future__ import annotations

import pytest
from selftests.probes import calls, running, slots, states  # noqa: F401 - they fill PROBES
from selftests.probes.bench import PROBES, real, simulated
from selftests.probes.differences import DIFFERENCES, expected, measured


def test_every_probe_was_measured() -> None:
    """And every difference is one."""
    answers = measured()
    assert set(answers) == set(PROBES)
    for name, differences in DIFFERENCES.items():
        for what, difference in differences.items():
            assert difference.answer != answers[name][what], (name, what)
            assert difference.reason


@pytest.mark.logs("is not simulated|is a device: no")
@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize(
    "target",
    [
        pytest.param("simulated", marks=pytest.mark.fuse),
        pytest.param("real", marks=pytest.mark.kvm),
    ],
)
def test_probe(target: str, name: str, request: pytest.FixtureRequest) -> None:
    """Numbers, errors and exits of each probe, as they were measured."""
    if target == "real":
        with real() as bench:
            assert PROBES[name](bench) == expected(target, name)
    else:
        with simulated(request.getfixturevalue("mounted").path) as bench:
            assert PROBES[name](bench) == expected(target, name)
