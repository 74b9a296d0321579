"""An accident in what only trainings with several optimizers use leaves them as they were."""

from __future__ import annotations

import pytest

from ine_callback.optimizers.joint import JointOptimizer
from ine_callback.recording.lanes import Lane
from ine_callback.recording.observations import Taken
from ine_callback.recording.steps import OptimizerSteps
from ine_callback.scoring.signals import Signals
from tests.helpers.accidents import accident
from tests.helpers.identical import differing

from .harness import fit, recorder
from .optimizers import GAN
from .regime import Regime

PLACES = [
    (Lane, "change"),
    (Lane, "take"),
    (Lane, "discard"),
    (JointOptimizer, "place"),
    (JointOptimizer, "count"),
    (JointOptimizer, "end_update"),
    (OptimizerSteps, "end"),
    (OptimizerSteps, "update"),
    (Taken, "take"),
    (Signals, "refresh"),
    (Signals, "unmake"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[f"{owner.__name__}.{name}" for owner, name in PLACES])
def test_an_accident_leaves_the_training_as_it_was(owner: type, name: str, after: int) -> None:
    regime = Regime("accident", "", lambda: GAN(first="generator"), trainer=lambda: {"max_epochs": 1})
    plain, influence = fit(regime, None), recorder(regime)
    influence.on_error = "warn"
    with accident(owner, name, after):
        broken = fit(regime, influence)
    assert not differing(plain.left, broken.left)
    run = influence.report.run if influence.report is not None else None
    if (name, after) != ("unmake", 3):  # called once a run
        assert run is None or run.uncaptured or any("recording stopped" in note for note in run.notes)


@pytest.mark.filterwarnings("ignore")
def test_the_fraction_that_is_left_out_counts_frozen_players_too() -> None:
    """True and made rows in one call cannot be told apart; the generator is frozen when that is found."""
    influence = recorder(Regime("joined", ""))
    module = fit(Regime("joined", "", lambda: GAN(toggle=True, first="generator", joined=True)), influence).first
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    made = sum(size for name, size in sizes.items() if name.startswith("generator"))
    assert influence.report is not None
    assert influence.report.run.captured_share == pytest.approx(made / sum(sizes.values()))
    assert set(influence.report.run.uncaptured) == {name for name in sizes if name.startswith("discriminator")}
