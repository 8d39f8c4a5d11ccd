# SPDX-License-Identifier: GPL-2.0-or-later
"""The targets of all tests that were selected are run together, before the first of them."""

from __future__ import annotations

import pytest
from conformance import runs


@pytest.fixture(scope="session")
def ran(request: pytest.FixtureRequest) -> None:
    """Every target that a selected test names in its parameter ``target`` has run."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    runs.run(spec.params["target"] for spec in parameters if spec and "target" in spec.params)
