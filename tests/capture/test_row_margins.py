"""Margins read off the graph and their windows of visits, against an explicit loop in float64 under a real Trainer."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from ine_callback import InfluenceCallback
from ine_callback.capture.row_margins import LIMIT, RowMargins, read_margins
from ine_callback.methods import FitContext, FitEndMethod
from ine_callback.scores import WINDOWS, Attribution

ROWS, CLASSES, EPOCHS, BATCH = 20, 4, 6, 5
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}


def explicit(logits: Tensor, labels: Tensor) -> list[float]:
    """Margins by the definition, one row after the other."""
    out = []
    for row, label in zip(logits.double().log_softmax(-1), labels.tolist(), strict=True):
        others = [float(value) for k, value in enumerate(row) if k != label]
        out.append(min(max(float(row[label]) - max(others), -LIMIT), LIMIT))
    return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scaled", [1.0, 0.25])
def test_cross_entropy(weighted: bool, scaled: float) -> None:
    logits = (8 * torch.randn(7, CLASSES, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(CLASSES, (7,))
    weight = torch.rand(CLASSES, dtype=torch.float64) if weighted else None
    found = read_margins(scaled * F.cross_entropy(logits, labels, weight=weight), 7)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor(explicit(logits.detach(), labels), dtype=torch.float64))


def test_unlabelled_rows_are_unknown_and_half_precision_is_widened() -> None:
    logits = torch.randn(4, CLASSES, dtype=torch.bfloat16).requires_grad_()
    labels = torch.tensor([0, -100, 2, 3])
    found = read_margins(F.cross_entropy(logits, labels), 4)
    assert found is not None and found.dtype == torch.float32
    assert found.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_binary_cross_entropy(shape: tuple[int, ...]) -> None:
    logits, target = torch.randn(shape).requires_grad_(), torch.randint(2, shape).float()
    found = read_margins(F.binary_cross_entropy_with_logits(logits, target), 6)
    two = torch.stack([torch.zeros(6), logits.detach().reshape(6)], 1)
    assert found is not None
    torch.testing.assert_close(found.double(), torch.tensor(explicit(two, target.reshape(6).long())).double())
    soft = read_margins(F.binary_cross_entropy_with_logits(logits, target * 0.8), 6)
    assert soft is not None and soft.isnan().tolist() == (target.reshape(6) > 0).tolist()


def test_losses_without_one_label_a_row_have_none() -> None:
    logits, tokens = torch.randn(4, CLASSES).requires_grad_(), torch.randn(4, CLASSES, 3).requires_grad_()
    labels = torch.randint(CLASSES, (4,))
    assert read_margins(F.cross_entropy(tokens, torch.randint(CLASSES, (4, 3))), 4) is None
    assert read_margins(F.cross_entropy(logits, labels), 2) is None  # two terms a row
    assert read_margins(F.mse_loss(logits, torch.zeros(4, CLASSES)), 4) is None
    assert read_margins(F.binary_cross_entropy_with_logits(logits, torch.zeros(4, CLASSES)), 4) is None
    assert read_margins(F.cross_entropy(logits, labels, label_smoothing=0.1), 4) is None
    assert read_margins(F.cross_entropy(torch.randn(4, 1).requires_grad_(), torch.zeros(4).long()), 4) is None


def test_windows_double_and_the_last_one_takes_the_rest() -> None:
    margins, seen = RowMargins(3, torch.device("cpu")), 0
    for visit in range(1, 150):
        margins.add(torch.tensor([2]), torch.tensor([float(visit)]))
        if visit == 70:
            margins.grow(5)
        if visit % 10 == 0:  # unknown visits are none
            margins.add(torch.tensor([2, 0]), torch.full((2,), torch.nan))
            seen += 1
    found = margins.means()
    assert found is not None and found.shape == (5, WINDOWS) and seen == 14
    bounds = [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 149)]
    np.testing.assert_allclose(found[2], [(a + b) / 2 for a, b in bounds], rtol=1e-6)
    assert np.isnan(found[[0, 1, 3, 4]]).all()
    assert RowMargins(3, torch.device("cpu")).means() is None


class Nothing(FitEndMethod):
    """Runs on the trained model, so no pass is read for it."""

    name = "nothing"

    def run(self, context: FitContext) -> Attribution:
        return Attribution(self.name, np.arange(context.rows), context.infos, np.zeros((context.rows, 1)))


class Net(L.LightningModule):
    """A classifier in float64 that notes its own logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, CLASSES)).double()
        self.noted: list[tuple[Tensor, Tensor, Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        self.noted.append((batch[0][:, 0], logits.detach(), batch[1]))
        return F.cross_entropy(logits, batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def fit(callbacks: list[L.Callback], **options: Any) -> Net:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)
    x[:, 0] = torch.arange(ROWS)  # which row it is
    items = TensorDataset(x, torch.randint(CLASSES, (ROWS,), generator=generator))
    module, repeated = Net(), options.pop("repeated", False)
    torch.manual_seed(7)
    sampler = WeightedRandomSampler(torch.rand(ROWS).tolist(), ROWS) if repeated else None
    trainer = L.Trainer(callbacks=callbacks, **{**QUIET, "max_epochs": EPOCHS, **options})
    trainer.fit(module, DataLoader(items, BATCH, shuffle=not repeated, sampler=sampler), DataLoader(items, BATCH))
    return module


def oracle(noted: list[tuple[Tensor, Tensor, Tensor]], together: int = 1) -> np.ndarray[Any, Any]:
    """Mean margins by window, visit after visit; rows of one step are in the window of the visits before it."""
    values: list[list[list[float]]] = [[[] for _ in range(WINDOWS)] for _ in range(ROWS)]
    for start in range(0, len(noted), together):
        step = noted[start : start + together]
        before = [sum(map(len, of_row)) for of_row in values]
        for rows, logits, labels in step:
            for row, margin in zip(rows.long().tolist(), explicit(logits, labels), strict=True):
                visits = before[row]
                window = 0 if visits == 0 else min(WINDOWS - 1, int(math.log2(visits)) + 1)
                values[row][window].append(margin)
    return np.array([[np.mean(each) if each else np.nan for each in of_row] for of_row in values])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"repeated": True}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("methods", ["f-INE", "none"])
def test_a_trainers_margins_are_those_of_an_explicit_loop(options: dict[str, Any], methods: str) -> None:
    chosen: dict[str, Any] = {} if methods == "f-INE" else {"methods": [Nothing()]}
    callback = InfluenceCallback("self" if methods == "f-INE" else "val", on_error="raise", **chosen)
    module = fit([callback], **options)
    assert callback.report is not None
    expected = oracle(module.noted, options.get("accumulate_grad_batches", 1))
    np.testing.assert_allclose(callback.report.scores.margins, expected, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_training_is_bit_identical() -> None:
    recorded, plain = fit([InfluenceCallback("self", on_error="raise")]), fit([])
    for one, other in zip(recorded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_state_is_restored_whole() -> None:
    margins, again = RowMargins(4, torch.device("cpu")), RowMargins(2, torch.device("cpu"))
    margins.add(torch.tensor([1, 3]), torch.tensor([0.5, -2.0]))
    again.load_state_dict(margins.state_dict())
    np.testing.assert_array_equal(again.means(), margins.means())  # type: ignore[arg-type]
