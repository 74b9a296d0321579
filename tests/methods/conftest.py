"""What several files of tests compare with."""

from __future__ import annotations

from typing import Any

import pytest

from ine_callback import FINE
from tests.helpers.bif.training import Model
from tests.helpers.fit_end import fit


@pytest.fixture(scope="session")
def alone() -> tuple[Model, Any]:
    """The training with f-INE alone."""
    model, influence, _ = fit([FINE()])
    return model, influence.report
