"""A checkpoint written before the package was divided resumes as it did then."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from lightning_utilities.core.imports import RequirementCache

from ine_callback import FINE
from tests.fixtures import make

FIXTURES = Path(__file__).parents[1] / "fixtures"
OTHERWISE = {
    "lightning<2.5.3": "a resumed epoch has its rows in another order",
    "torch<2.7": "randint draws other numbers, so chains differ",
}


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_the_former_version_resumes_with_its_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for the Trainer's own checkpoints
    monkeypatch.setattr(make, "FINE", partial(FINE, closing=False))  # as there was no closing pass
    report = make.resume(FIXTURES / "recording.ckpt").report
    assert [stage.at for stage in report.stages("BIF")] == [1, "end"], "the chains of before the checkpoint are kept"

    former = np.load(FIXTURES / "resumed.npz")
    for older, differ in OTHERWISE.items():
        if RequirementCache(older):
            pytest.skip(f"{older}: {differ}")
    # to 1e-4 of the largest: another machine's matrix products round differently
    for found, before in (
        (report.scores.mu, "mu"),
        (report.scores.se, "se"),
        (report.attribution("BIF").scores, "bif"),
    ):
        np.testing.assert_allclose(found, former[before], rtol=1e-3, atol=1e-4 * np.nanmax(np.abs(former[before])))
