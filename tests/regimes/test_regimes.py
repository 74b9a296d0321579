"""Every regime of the catalogue: scores as the reference's, training as without us, every visit counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from ine_callback import FINE, InfluenceCallback

from .catalogue import ALL
from .harness import examine, fit, shortcomings
from .regime import Regime

MOST = 3  # of each group that are not among the long tests


def _cases() -> Iterator[object]:
    """The regimes; of those of a group that are not slow themselves, the first ones are in `make test`.

    Those of several processes are trained all at once, and DDP has tests of its own (tests/distributed).
    """
    short = Counter[str]()
    for regime in ALL:
        slow = regime.slow or regime.processes > 1
        short[regime.group] += not slow
        long = slow or short[regime.group] > MOST
        yield pytest.param(regime, id=regime.name, marks=[pytest.mark.long] if long else [])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("regime", list(_cases()))
def test_regime(regime: Regime) -> None:
    if lacks := regime.lacks():
        pytest.skip(lacks)
    verdict = examine(regime)
    assert not shortcomings(regime, verdict), verdict.warned


@pytest.mark.filterwarnings("ignore")
def test_an_overflow_later_in_the_run_leaves_no_trace_in_the_curvature() -> None:
    """The scaler grows at every step until it overflows; the discount of the steps that remain must stay finite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=1, growth_factor=8.0)
    regime = Regime("overflows", "precision", trainer=lambda: {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]})
    influence = InfluenceCallback(
        ["val", "self"], [FINE(closing=False)], refresh_every=2, curvature_every=1, on_error="raise"
    )
    events = fit(regime, influence).events
    steps = sum(event.kind == "step" for event in events)
    assert 1 < steps < sum(event.kind == "backward" for event in events)
    assert influence.report is not None and influence.report.run.steps == steps
    assert not influence.report.run.nonfinite
