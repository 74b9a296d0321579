"""IF in a fit and after it: training is untouched, the report keeps everything, bad input is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import FINE, IF, InfluenceCallback, InfluenceReport, Query, run_if, run_unlearning
from ine_callback.errors import InfluenceError
from tests.helpers.bif.training import QUIET
from tests.helpers.oracle import opaque

ROWS, WIDTH = 40, 4
X = torch.randn(ROWS + 12, WIDTH, generator=torch.Generator().manual_seed(0)).double()
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
TRAIN, VAL = TensorDataset(X[:ROWS], Y[:ROWS]), TensorDataset(X[ROWS:], Y[ROWS:])


class Net(L.LightningModule):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = net or nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5)


def fit(
    methods: list[Any] | None, module: L.LightningModule | None = None, **options: Any
) -> tuple[Any, Any, L.Trainer]:
    L.seed_everything(3, verbose=False)
    module = module or Net()
    callback = InfluenceCallback(
        queries={"val": "val", "odd": Query.margin((X[:3], Y[:3]))}, methods=methods, **options
    )
    trainer = L.Trainer(max_epochs=4, callbacks=[callback] if methods is not None else [], **QUIET)
    trainer.fit(module, DataLoader(TRAIN, 8, shuffle=True), DataLoader(VAL, 12))
    return module, callback, trainer


@pytest.fixture(scope="module")
def fitted() -> tuple[Any, Any, L.Trainer]:
    methods = [FINE(), IF(per_layer=True), IF("exact", damping="run", rescale="rif", groups={"first": range(6)})]
    return fit(methods, on_error="raise")


def test_training_is_bit_identical(fitted: tuple[Any, Any, L.Trainer]) -> None:
    plain, _, _ = fit(None)
    for ours, theirs in zip(fitted[0].parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert fitted[0].training == plain.training


def test_the_report_keeps_scores_layers_checks_and_groups(fitted: tuple[Any, Any, L.Trainer], tmp_path: Path) -> None:
    fitted[1].report.save(tmp_path)
    report = InfluenceReport.load(tmp_path)
    plain, rescaled = report.attribution("IF-EKFAC"), report.attribution("RIF-EXACT")
    assert plain.scores.shape == (ROWS, 2) and plain.layers is not None and plain.layers.names[0] == "net.0.weight"
    np.testing.assert_allclose(plain.layers.scores.sum(1), plain.scores, rtol=1e-10)
    assert rescaled.leverage.shape == (ROWS,) and 0 < rescaled.leverage.max() < 1
    group = report.newton_group(range(6), "val")
    assert (
        group.size == 6
        and group.first_order == pytest.approx(rescaled.scores[:6, 0].sum())
        and np.isfinite(group.newton)
    )
    with pytest.raises(ValueError, match=r"no method took a Newton step of these 2 rows.*IF\(groups="):
        report.newton_group([0, 1])
    assert "Rescaled influence functions" in str(report) or "RIF" in str(report)


def test_damping_by_the_run_is_three_over_its_summed_learning_rates(fitted: tuple[Any, Any, L.Trainer]) -> None:
    steps = 4 * 5
    damping = fitted[1].report.attribution("RIF-EXACT").damping
    np.testing.assert_allclose(damping, 3 / (steps * 0.2 / (1 - 0.5)), rtol=1e-9)


@pytest.mark.long
def test_eigenvectors_of_the_runs_factors_save_a_pass() -> None:
    _, callback, _ = fit([FINE(), IF(basis="run", damping=1e-3), IF("exact", damping=1e-3)], on_error="raise")
    ours, exact = (callback.report.attribution(name).scores[:, 0] for name in ("IF-EKFAC", "IF-EXACT"))
    assert np.corrcoef(ours, exact)[0, 1] > 0.6
    _, plain, _ = fit([FINE(), IF(damping=1e-3)], on_error="raise")
    assert np.corrcoef(ours, plain.report.attribution("IF-EKFAC").scores[:, 0])[0, 1] > 0.8
    _, without, _ = fit([IF(basis="run")])
    assert any("basis='run' needs f-INE's factors" in note for note in without.report.run.notes)


def test_without_a_fit_the_scores_are_the_same(fitted: tuple[Any, Any, L.Trainer]) -> None:
    module, callback, _ = fitted
    trainer, before = L.Trainer(**QUIET), {k: v.clone() for k, v in module.state_dict().items()}
    data: dict[str, Any] = {"train_dataloaders": DataLoader(TRAIN, 8), "val_dataloaders": DataLoader(VAL, 12)}
    found = run_if(trainer, module, IF(), **data)
    np.testing.assert_allclose(found.scores[:, 0], callback.report.attribution("IF-EKFAC").scores[:, 0], rtol=1e-8)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(InfluenceError, match="damping='run' needs the learning rates of the run"):
        run_if(trainer, module, IF(damping="run"), **data)
    with pytest.raises(InfluenceError, match=r"layers=\['nothing'\] fits no captured layer; there are net.0, net.3"):
        run_if(trainer, module, IF(layers=["nothing"]), **data)
    for options in ({"rows": [3, 40]}, {"groups": {"rows": [40]}}):
        with pytest.raises(InfluenceError, match="'rows' lists row 40; there are rows 0 to 39"):
            run_if(trainer, module, IF(**options), **data)  # type: ignore[arg-type]
    with pytest.raises(InfluenceError, match="batch_size=256 is larger than the 40 training rows"):
        run_if(trainer, module, IF("astra"), **data)


DECAY = 0.02


def _logistic(rows: Any) -> Net:
    """Trained to the end on some rows, whose losses are divided by the number of all; with weight decay."""
    module, keep = Net(nn.Linear(WIDTH, 3)), list(rows)
    descent = torch.optim.LBFGS(module.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure() -> Tensor:
        descent.zero_grad()
        loss = F.cross_entropy(module.net(X[keep]), Y[keep], reduction="sum") / ROWS
        loss = loss + DECAY / 2 * sum(p.square().sum() for p in module.parameters())
        loss.backward()
        return loss

    descent.step(closure)  # type: ignore[arg-type]
    return module


def test_the_score_is_the_effect_of_leaving_a_row_out() -> None:
    """Logistic regression, trained to the end with and without each of some rows; damping is its weight decay."""
    whole = _logistic(range(ROWS))
    data: dict[str, Any] = {"train_dataloaders": DataLoader(TRAIN, 8), "val_dataloaders": DataLoader(VAL, 12)}
    found = [
        run_if(L.Trainer(**QUIET), whole, IF("exact", damping=DECAY, rescale=how), **data) for how in (None, "rif")
    ]  # type: ignore[arg-type]

    def loss(module: Net) -> float:
        return float(F.cross_entropy(module.net(X[ROWS:]), Y[ROWS:]))

    truth = np.array([loss(_logistic([k for k in range(ROWS) if k != row])) - loss(whole) for row in range(12)])
    plain, rescaled = (one.scores[:12, 0] for one in found)
    assert np.corrcoef(plain, truth)[0, 1] > 0.98
    slopes = [float(score @ truth / (score @ score)) for score in (plain, rescaled)]
    assert abs(slopes[1] - 1) < 0.15 and abs(slopes[1] - 1) < abs(slopes[0] - 1)


def test_unlearnt_weights_are_near_those_of_a_training_without_the_rows() -> None:
    """The former test's problem, without eight rows of one class."""
    rows = [row for row in range(ROWS) if Y[row] == 2][:8]
    whole, truth = _logistic(range(ROWS)), _logistic([row for row in range(ROWS) if row not in rows])
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    found = run_unlearning(L.Trainer(**QUIET), whole, rows, IF("exact", damping=DECAY), DataLoader(TRAIN, 8))
    moved, left = 0.0, 0.0
    for name, wanted in truth.named_parameters():
        assert torch.equal(before[name], whole.get_parameter(name))
        moved += float((wanted - before[name]).square().sum().detach())
        left += float((wanted - found[name]).square().sum().detach())
    assert left < 0.1 * moved
    again = Net(nn.Linear(WIDTH, 3))
    again.load_state_dict(found, strict=False)
    missed = [float((model.net(X[rows]).argmax(1) != 2).double().mean()) for model in (whole, again, truth)]
    assert missed[1] == pytest.approx(missed[2], abs=0.13) and missed[1] > missed[0]


def test_a_gradient_that_is_not_finite_names_layer_and_batch() -> None:
    module = Net()
    x = torch.cat([X, X[:25], torch.full((1, WIDTH), torch.nan).double()])
    spoiled = TensorDataset(x, torch.cat([Y, Y[:26]]))
    data: dict[str, Any] = {"train_dataloaders": DataLoader(spoiled, 8), "val_dataloaders": DataLoader(VAL, 12)}
    with pytest.raises(InfluenceError, match=r"gradients of net.\d.weight are not finite in batch 2 \(rows 64 to 77\)"):
        run_if(L.Trainer(**QUIET), module, IF(fisher="empirical"), **data)
    data["train_dataloaders"] = DataLoader(TensorDataset(x.flip(0), Y[:1].expand(len(x))), 8)
    with pytest.raises(InfluenceError, match="gradients of the first 64 rows asked for are not finite"):
        run_if(L.Trainer(**QUIET), module, IF(), **data)


def test_a_model_that_is_not_trained_fails_its_check() -> None:
    """A constant prediction on one class: all rows pull the same way."""
    module = Net(nn.Linear(WIDTH, 3))
    ones = TensorDataset(torch.ones(ROWS, WIDTH).double(), torch.zeros(ROWS, dtype=torch.long))
    data: dict[str, Any] = {"train_dataloaders": DataLoader(ones, 8), "val_dataloaders": DataLoader(VAL, 12)}
    found = run_if(L.Trainer(**QUIET), module, IF(), **data)
    assert not found.reliable and "mean gradient over a row's is 1" in found.reasons[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "solver='newton' is none of ekfac, kfac"),
        ({"damping": 0.0}, "damping=0.0 must be 'auto', 'run' or a number above 0"),
        ({"damping": "some"}, "damping='some' must be"),
        ({"damping": float("nan")}, "damping=nan must be"),
        ({"fisher": "true"}, "fisher='true' is none of exact, sampled, empirical"),
        ({"iterations": 0}, "iterations=0 must be an integer of at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be an integer"),
        ({"momentum": 1.0}, "momentum=1.0 must be between 0 and 1"),
        ({"step": -1.0}, "step=-1.0 must be between"),
        ({"sampler": "random", "solver": "lissa"}, "sampler='random' is none of uniform"),
        ({"sampler": "logit"}, "solver='ekfac' has none of"),
        ({"basis": "start"}, "basis='start' is neither"),
        ({"basis": "run", "solver": "cg"}, "basis='run' is EK-FAC's"),
        ({"rescale": "loo"}, "rescale='loo' is neither"),
        ({"rescale": "rif", "solver": "identity"}, "rescale='rif' needs a curvature"),
        ({"rescale": "rif", "fisher": "sampled"}, "goes through all labels"),
        ({"groups": {"a": []}}, r"groups\['a'\] must list at least one row"),
        ({"at": "end"}, "at='end' must list"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        IF(**options)


def test_a_layer_that_is_not_captured_fails_the_check_of_coverage() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.out = nn.Parameter(torch.randn(WIDTH, 8)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x @ opaque(self.odd))  # type: ignore[no-any-return]

    data: dict[str, Any] = {"train_dataloaders": DataLoader(TRAIN, 8), "val_dataloaders": DataLoader(VAL, 12)}
    found = run_if(L.Trainer(**QUIET), Net(Odd()), IF(), **data)
    (check,) = [check for check in found.checks if check.name == "captured share of the parameters"]
    assert not check.passed and check.value == pytest.approx(27 / (27 + 8 * WIDTH))
    assert any("net.odd" in note for note in found.notes)
    restricted = run_if(L.Trainer(**QUIET), Net(Odd()), IF(layers=["net.out"]), **data)
    assert all(check.name != "captured share of the parameters" for check in restricted.checks)


def test_losses_without_a_list_of_labels_are_refused_where_it_is_needed() -> None:
    class Sequence(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.net(batch[0])
            return F.cross_entropy(torch.stack([logits, -logits], 2), torch.stack([batch[1], batch[1]], 1))

        validation_step = training_step

    data: dict[str, Any] = {"train_dataloaders": DataLoader(TRAIN, 8), "val_dataloaders": DataLoader(VAL, 12)}
    with pytest.raises(InfluenceError, match="go through all labels of a row, at most 64"):
        run_if(L.Trainer(**QUIET), Sequence(), IF(rescale="rif"), **data)
    assert run_if(L.Trainer(**QUIET), Sequence(), IF(), **data).settings["fisher"] == "sampled"
