"""Settings that every test shares: one thread, fixed seeds, files only in the test's own folder."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # before anything imports matplotlib

import pytest
import torch
from hypothesis import settings

from tests.helpers import once  # noqa: F401  # makes the folder that test processes share, in the one that starts them

torch.set_num_threads(1)

# No deadline: the first example pays for imports and allocations, and CI's two cores are shared.
settings.register_profile("local", deadline=None, max_examples=50)
# In CI the same examples every time, so that a red run can be repeated.
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs each test in a folder of its own (Lightning writes logs to the current one) and from the same seed."""
    monkeypatch.chdir(tmp_path)
    for name in ("PL_SEED_WORKERS", "PL_GLOBAL_SEED"):  # what another test's seed_everything left
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
