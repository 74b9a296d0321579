"""Every regime of the catalogue: scores as the reference's, training as without us, every visit counted."""

from __future__ import annotations

import pytest

from .catalogue import ALL
from .harness import examine, shortcomings
from .regime import Regime


def _case(regime: Regime) -> object:
    return pytest.param(regime, id=regime.name, marks=[pytest.mark.long] if regime.slow else [])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("regime", [_case(regime) for regime in ALL])
def test_regime(regime: Regime) -> None:
    if regime.needs:
        pytest.importorskip(regime.needs)
    verdict = examine(regime)
    assert not shortcomings(regime, verdict), verdict.warned
