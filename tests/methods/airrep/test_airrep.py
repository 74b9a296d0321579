"""AirRep as users hold it: what it learns, the report, groups, saving, bad input, collections that go on."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ine_callback import InfluenceReport
from ine_callback.errors import InfluenceError
from ine_callback.methods.airrep import split as splitting
from ine_callback.methods.airrep.airrep import AirRep
from ine_callback.methods.airrep.collect import draw_subset
from ine_callback.methods.airrep.encoder import FeatureEncoder, penultimate
from ine_callback.methods.airrep.settings import AirRepSettings
from ine_callback.methods.airrep.views import NOT_USABLE
from ine_callback.report import example_report
from tests.methods.airrep.problem import DEV, ROWS, SIZE, WIDTH, Products, airrep, data, first, rows

pytest.importorskip("safetensors")
pytestmark = pytest.mark.filterwarnings("error::UserWarning:ine_callback")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> AirRep:
    found = airrep()
    found.collect(Products(), rows(), tmp_path_factory.mktemp("trainings"), progress=False).fit(progress=False)
    return found


def test_it_learns_what_training_does(fitted: AirRep) -> None:
    evaluation = fitted.evaluation
    assert evaluation is not None
    assert evaluation.lds > 0.9 > 0.6 > evaluation.untrained and evaluation.usable and evaluation.ceiling == 1
    assert (evaluation.queries, evaluation.subsets, evaluation.dropped) == (12, 15, 0)
    assert fitted.losses[-1] < 0.3 * fitted.losses[0]
    x, dev = data()
    scores = fitted.scores(TensorDataset(dev)).attribution("AirRep").scores  # type: ignore[union-attr]
    true = (x @ dev.T).numpy()
    assert np.mean([np.corrcoef(scores[:, q], true[:, q])[0, 1] for q in range(DEV)]) > 0.85  # signs too


def test_scores_are_a_report_with_the_evaluation(fitted: AirRep, tmp_path: Path) -> None:
    _, dev = data()
    report = fitted.scores(TensorDataset(dev[:2]), names=["a", "b"])
    found = report.attribution("AirRep")
    assert found is not None and found.scores.shape == (ROWS, 2) and [q.name for q in found.queries] == ["a", "b"]
    assert found.reliable and "held-out LDS" in found.headline and "not measured" in " ".join(found.notes)
    assert report.observations.sum() == 60 * SIZE and not report.queries
    text = str(InfluenceReport.load(report.save(tmp_path)))
    assert "Learned representation (AirRep)" in text and "held-out LDS" in text
    with pytest.raises(InfluenceError, match="1 names for 2 queries"):
        fitted.scores(TensorDataset(dev[:2]), names=["a"])


def test_beside_the_scores_of_a_run_they_are_a_column(fitted: AirRep) -> None:
    found = fitted.scores(TensorDataset(data()[1][:2]), names=["val", "other"]).attribution("AirRep")
    assert found is not None
    table = example_report().with_attributions(found).to_pandas()
    assert table["airrep"][table["query"] == "val"].to_numpy() == pytest.approx(found.scores[:60, 0])
    assert table["airrep"][table["query"] == "self"].isna().all()


def test_a_group_is_pooled_and_one_row_its_score(fitted: AirRep) -> None:
    queries = TensorDataset(data()[1][:3])
    scores = fitted.scores(queries).attribution("AirRep").scores  # type: ignore[union-attr]
    assert fitted.group(range(10), queries) == pytest.approx(
        scores[:10].mean(0), abs=1e-4
    )  # this one's pooling is mean
    with pytest.warns(UserWarning, match="1 rows, and the encoder was trained on subsets of 12"):
        assert fitted.group([7], queries) == pytest.approx(scores[7], abs=1e-4)
    with pytest.raises(KeyError, match="no row 120"):
        fitted.group([120], queries)


def test_saved_and_loaded_it_scores_the_same(fitted: AirRep, tmp_path: Path) -> None:
    x, dev = data()
    again = AirRep.load(fitted.save(tmp_path), FeatureEncoder(first, [x + 1], width=16, hidden=32, seed=5))
    queries = TensorDataset(dev[:3])
    one, two = (each.scores(queries).attribution("AirRep") for each in (fitted, again))
    assert one is not None and two is not None and (one.scores == two.scores).all() and one.headline == two.headline
    assert again.evaluation == fitted.evaluation
    with pytest.raises(InfluenceError, match="holds no fit of this encoder"):
        AirRep.load(tmp_path, FeatureEncoder(first, [x], width=8))
    (tmp_path / "airrep-fit.safetensors").write_bytes(b"\x80\x04not a tensor")
    with pytest.raises(InfluenceError, match="holds no fit of this encoder"):
        AirRep.load(tmp_path, FeatureEncoder(first, [x], width=16, hidden=32))


def test_the_gradient_cache_changes_nothing_but_rounding(fitted: AirRep, tmp_path: Path) -> None:
    found = airrep(rows_at_once=7, steps=5).collect(Products(), rows(), tmp_path, progress=False)
    found.fit(progress=False)
    assert found.losses == pytest.approx(fitted.losses[:5], rel=1e-5)


def test_two_fits_are_bit_identical_and_leave_random_states(tmp_path: Path) -> None:
    losses = []
    for _ in range(2):
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
        found = airrep(steps=10).collect(Products(), rows(), tmp_path, progress=False)
        found.fit(progress=False)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[union-attr]
        losses.append(found.losses)
        torch.rand(3)
    assert losses[0] == losses[1]


def test_what_judges_does_not_train() -> None:
    losses = np.random.default_rng(0).normal(size=(40, 50))
    losses[[3, 9]] = 1.0
    for seed in range(5):
        found = splitting.split(losses, AirRepSettings(subsets=50, seed=seed))
        for one, other, total in (
            (found.queries, found.held_queries, 38),
            (found.subsets, found.held_subsets, 50),
        ):
            assert not set(one.tolist()) & set(other.tolist()) and len(one) + len(other) == total
        assert found.dropped == 2 and not {3, 9} & set(torch.cat([found.queries, found.held_queries]).tolist())


def test_losses_without_meaning_are_found_out(tmp_path: Path) -> None:
    """Noise in place of losses: no score, and the report says that it is not usable."""
    g = torch.Generator().manual_seed(9)
    noise = lambda rows, seed: torch.randn(400, generator=g)  # noqa: E731
    x = torch.randn(400, WIDTH, generator=g)
    found = airrep(subsets=400, dev=TensorDataset(x), steps=60)
    evaluation = found.collect(noise, rows(), tmp_path, progress=False).fit(progress=False)
    assert abs(evaluation.lds) < 0.05 and not evaluation.usable
    report = found.scores(TensorDataset(x[:1]))
    attribution = report.attribution("AirRep")
    assert attribution is not None and not attribution.reliable and attribution.notes[0] == NOT_USABLE
    assert "UNRELIABLE" in str(report) and "NOT USABLE" in str(report)
    assert NOT_USABLE in report.to_markdown() and "held-out LDS" in report.to_markdown()


def test_seeds_measure_the_ceiling(tmp_path: Path) -> None:
    found = airrep(seeds=3).collect(Products(noise=0.3), rows(), tmp_path, progress=False).fit(progress=False)
    assert 0.6 < found.ceiling < 0.97 and found.lds > 0.8 * found.ceiling
    assert "of the ceiling" in str(found)


def test_constant_losses_are_dropped_and_counted(tmp_path: Path) -> None:
    class Partly(Products):
        def __call__(self, rows: NDArray[np.int64], seed: int) -> Tensor:
            losses = super().__call__(rows, seed)
            losses[:4] = 0.5
            return losses

    found = airrep(steps=20).collect(Partly(), rows(), tmp_path, progress=False)
    assert found.fit(progress=False).dropped == 4
    notes = found.scores(TensorDataset(data()[1][:1])).attribution("AirRep").notes  # type: ignore[union-attr]
    assert any(note.startswith("4 dev rows were left out") for note in notes)
    constant = airrep().collect(lambda rows, seed: np.ones(DEV), rows(), tmp_path / "constant", progress=False)
    with pytest.raises(InfluenceError, match="only 0 of 48 dev rows have losses that differ"):
        constant.fit(progress=False)


# -- collecting --------------------------------------------------------------------------------------------------------


def test_subsets_are_drawn_from_the_seed() -> None:
    one, other = AirRepSettings(size=0.1), AirRepSettings(size=0.1, seed=1)
    drawn = [draw_subset(k, one, 100) for k in range(40)]
    assert all(len(set(s.tolist())) == 10 and s.min() >= 0 and s.max() < 100 for s in drawn)
    assert len({tuple(s) for s in drawn}) == 40 and (draw_subset(5, one, 100) == drawn[5]).all()
    assert (draw_subset(5, other, 100) != drawn[5]).any()


def test_an_interrupted_collection_goes_on(tmp_path: Path) -> None:
    whole = airrep().collect(Products(), rows(), tmp_path / "whole", progress=False).collected
    killed, rest = Products(dies_at=23), Products()
    with pytest.raises(KeyboardInterrupt):
        airrep().collect(killed, rows(), tmp_path / "parts", progress=False)
    found = airrep().collect(rest, rows(), tmp_path / "parts", progress=False).collected
    assert len(killed.calls) == 23 and len(rest.calls) == 60 - 23
    assert whole is not None and found is not None
    assert (found.losses == whole.losses).all() and (found.rows == whole.rows).all()
    none = Products(dies_at=0)  # all is there, so nothing is trained
    airrep(pooling="attention", steps=3).collect(none, rows(), tmp_path / "parts", progress=False)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_killed_process_leaves_whole_files(tmp_path: Path) -> None:
    class Killed(Products):
        def __call__(self, rows: NDArray[np.int64], seed: int) -> Tensor:
            if len(self.calls) == 11:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(rows, seed)

    child = os.fork()
    if child == 0:
        airrep().collect(Killed(), rows(), tmp_path, progress=False)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.glob("subset-*.safetensors"))) == 11
    rest = Products()
    airrep().collect(rest, rows(), tmp_path, progress=False)
    assert len(rest.calls) == 60 - 11


def test_subsets_at_once_are_those_one_by_one(tmp_path: Path) -> None:
    one = airrep(seeds=2).collect(Products(), rows(), tmp_path / "one", progress=False).collected
    batched = Products()
    many = airrep(seeds=2).collect(batched, rows(), tmp_path / "many", at_once=25, progress=False).collected
    assert [call[0].shape for call in batched.calls] == [(25, SIZE)] * 4 + [(10, SIZE)] * 2
    assert one is not None and many is not None and one.losses == pytest.approx(many.losses, abs=1e-6)


def test_folders_of_other_settings_and_damaged_files_are_refused(tmp_path: Path) -> None:
    airrep().collect(Products(), rows(), tmp_path, progress=False)
    with pytest.raises(InfluenceError, match=r"holds subsets of .*'size': 12.*use another folder"):
        airrep(size=13).collect(Products(), rows(), tmp_path, progress=False)
    with pytest.raises(InfluenceError, match=r"losses of \(1, 48\) .* and \(2, 48\) are asked for"):
        airrep(seeds=2).collect(Products(), rows(), tmp_path, progress=False)
    (tmp_path / "subset-00007.safetensors").write_bytes(b"\x80\x04\x95 pickle?")
    with pytest.raises(InfluenceError, match=r"subset-00007.safetensors is damaged .*delete it"):
        airrep().collect(Products(), rows(), tmp_path, progress=False)


def test_bad_losses_are_refused_and_the_rest_kept(tmp_path: Path) -> None:
    with pytest.raises(
        InfluenceError, match=r"subset 0 with seed 0 gave losses of shape \(1, 3\).*each of 48 dev rows"
    ):
        airrep().collect(lambda rows, seed: np.zeros(3), rows(), tmp_path, progress=False)

    class Diverges(Products):
        def __call__(self, rows: NDArray[np.int64], seed: int) -> Tensor:
            return super().__call__(rows, seed) * (float("nan") if len(self.calls) == 4 else 1)

    with pytest.raises(InfluenceError, match=r"subset 3 .* 48 of them not finite"):
        airrep().collect(Diverges(), rows(), tmp_path, progress=False)
    assert len(list(tmp_path.glob("subset-*"))) == 3


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subsets": 29}, "subsets=29 are too few"),
        ({"subsets": 60.0}, "subsets=60.0 must be an integer"),
        ({"size": 0}, "size=0 must be a number of rows"),
        ({"size": 2.5}, "size=2.5 must be"),
        ({"pooling": "max"}, "pooling='max' is none"),
        ({"steps": 0}, "steps=0 must be"),
        ({"held_out": 1.0}, "held_out=1.0 must be"),
        ({"learning_rate": 0}, "learning_rate=0 must be"),
    ],
)
def test_bad_settings_name_themselves(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        airrep(**settings)


def test_bad_data_is_refused_before_the_first_training(tmp_path: Path) -> None:
    none, (x, dev) = Products(dies_at=0), data()
    with pytest.raises(InfluenceError, match=r"dev rows 1, 2 are training rows too"):
        airrep(dev=TensorDataset(torch.cat([dev[:1], x[4:6], dev[1:]]))).collect(none, rows(), tmp_path)
    with pytest.raises(InfluenceError, match="there are no dev rows"):
        airrep(dev=None).collect(none, rows(), tmp_path)
    with pytest.raises(InfluenceError, match="7 dev rows are too few"):
        airrep(dev=TensorDataset(dev[:7])).collect(none, rows(), tmp_path)
    for size in (0.004, 120):
        with pytest.raises(InfluenceError, match=rf"size={size} makes subsets of \d+ of 120 rows"):
            airrep(size=size).collect(none, rows(), tmp_path)
    assert not none.calls and not list(tmp_path.iterdir())


def test_without_safetensors_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    none = Products(dies_at=0)
    with pytest.raises(
        ImportError, match=r'AirRep.collect needs safetensors; run: pip install "ine_callback\[airrep\]"'
    ):
        airrep().collect(none, rows(), tmp_path)


def test_subsets_of_half_of_the_rows_warn(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="subsets of 60 of 120 rows are at least half"):
        airrep(size=0.5).collect(Products(), rows(), tmp_path, progress=False)


def test_steps_out_of_order_say_what_comes_first(fitted: AirRep) -> None:
    with pytest.raises(InfluenceError, match=r"AirRep.fit: nothing was collected; call collect"):
        airrep().fit()
    with pytest.raises(InfluenceError, match=r"AirRep.scores: the encoder is not trained yet"):
        airrep().scores(rows())
    with pytest.raises(InfluenceError, match="the encoder is trained already"):
        fitted.fit()


# -- encoders ----------------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    """An encoder of a user's, with dropout, for items that are dictionaries."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.layer, self.flat = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.5)), flat

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.layer(batch["x"])
        return found[:, 0] if self.flat else found


class Items(Dataset[Any]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> Any:
        return {"x": self.x[k], "text": f"row {k}"}


def test_any_module_is_an_encoder_and_any_item_a_row(tmp_path: Path) -> None:
    x, dev = data()
    torch.manual_seed(0)
    given: Any = {"subsets": 60, "size": SIZE, "dev": Items(dev), "pooling": "mean", "learning_rate": 0.01}
    found = AirRep(Sum(), **given).collect(Products(), Items(x), tmp_path, progress=False)
    evaluation = found.fit(progress=False)
    assert evaluation.lds > 0.9 and np.isnan(evaluation.raw) and "raw" not in str(evaluation)
    with pytest.raises(InfluenceError, match=r"the encoder Sum gives \(2,\) for a batch; it must be \[b, d\]"):
        AirRep(Sum(flat=True), **given).collect(Products(), Items(x), tmp_path)
    with pytest.raises(InfluenceError, match="the encoder function has nothing to train"):
        AirRep(lambda batch: batch[0])  # type: ignore[arg-type]
    with pytest.raises(InfluenceError, match="the encoder Linear has nothing to train"):
        AirRep(nn.Linear(2, 2).requires_grad_(False))


def test_penultimate_features_and_labels_are_what_the_encoder_gets() -> None:
    network = nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    x, y = data()[0], torch.arange(ROWS) % 3
    hidden = network[:2](x).detach()
    assert torch.equal(penultimate(network)((x, y)), hidden) and network.training
    encoder = FeatureEncoder(network, (x, y), classes=3)
    inputs = encoder.inputs((x, y))
    assert inputs[:, :6] * hidden.square().mean().sqrt() == pytest.approx(hidden, abs=1e-6)
    assert torch.equal(inputs[:, 6:], nn.functional.one_hot(y, 3).float())
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {"head"}  # the network is not trained
    with pytest.raises(InfluenceError, match="no layer of ReLU"):
        FeatureEncoder(nn.ReLU(), (x, y))
    with pytest.raises(InfluenceError, match=r"features are torch.int64 of shape \(120,\)"):
        FeatureEncoder(lambda batch: batch[1], (x, y))
