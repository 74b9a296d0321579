"""The gradient store under Lightning: saved with the report, in checkpoints, asked by the module's own loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback, InfluenceReport
from ine_callback.integrations import stored_products
from ine_callback.report.stored_vectors import StoredVectors
from tests.helpers.stored_fit import ROWS, Classifier, Killer, fit


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, InfluenceCallback, Path]:
    """A training that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    return *fit(folder), folder


@pytest.mark.parametrize("killed_at", [13, None])
def test_a_killed_and_resumed_training_ends_with_the_same_store(
    whole: tuple[Classifier, InfluenceCallback, Path], tmp_path: Path, killed_at: int | None
) -> None:
    fit(tmp_path, *([] if killed_at is None else [Killer()]))  # None: after the last step, at the end of training
    _, resumed = fit(tmp_path, resume=True)
    one, other = whole[1].report, resumed.report
    assert one is not None and one.store is not None and other is not None and other.store is not None
    np.testing.assert_array_equal(one.scores.mu, other.scores.mu)
    for name, value in vars(one.store).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(other.store, name), err_msg=name)


def test_making_the_store_is_shown_in_the_trainers_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, TQDMProgressBar())
    assert "gradient store" in "".join(capfd.readouterr())


def test_a_saved_report_is_asked_with_the_module_and_its_own_loss(
    whole: tuple[Classifier, InfluenceCallback, Path],
) -> None:
    module, influence, folder = whole
    report = InfluenceReport.load(folder / "report")
    loader = DataLoader(TensorDataset(torch.randn(8, 5), torch.randint(3, (8,))), 4)
    found = report.ask({"mine": loader}, module)
    assert found.scores.shape == (ROWS, 1) and np.isfinite(found.scores).all()
    again = report.with_attributions(found)  # shown, exported and compared like any method's scores
    assert "asked/mine" in again.to_pandas().columns and again.store is not None
    assert influence.report is not None and influence.report.store is not None


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_products_by_torch_are_those_by_numpy(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_products, "CACHED", 8)
    rng = np.random.default_rng(0)
    rows, scale = (100 * rng.normal(size=(19, 5))).astype(dtype), rng.random(19).astype(np.float32)
    eye, ones = np.eye(5, dtype=np.float32), np.ones(5, dtype=np.float32)
    store = StoredVectors(rows, scale, (), eye, ones, np.ones(19, dtype=np.bool_))
    queries = rng.normal(size=(3, 5))
    exact = (rows.astype(np.float64) * scale[:, None].astype(np.float64)) @ queries.T
    for found in (stored_products.products(store, queries, torch.device("cpu")), store.products(queries)):
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-4)
