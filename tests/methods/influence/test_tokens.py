"""Scores of tokens by label: against each token's own gradient, in a fit, and where they are chosen from."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import FINE, IF, InfluenceCallback, InfluenceReport, TokenInfluence
from ine_callback.data.label_positions import label_offset
from ine_callback.errors import InfluenceError
from ine_callback.methods import FitEndMethods
from tests.helpers.bif.training import QUIET
from tests.helpers.contexts import ROWS, Tied, bound, choices

TOKENS = 5
IDS = choices(7, ROWS, TOKENS)
LENGTHS = choices(TOKENS - 1, ROWS) + 2
PADDED = IDS.masked_fill(torch.arange(TOKENS) >= LENGTHS[:, None], -100)
COUNTED = PADDED[:, 1:] >= 0


def causal(module: nn.Module, batch: Any) -> Tensor:
    """The loss of a Hugging Face model, which moves the labels by one itself."""
    return F.cross_entropy(module(batch[0])[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten())


def scored(method: Any, data: tuple[Tensor, ...] = (IDS, PADDED)) -> Any:
    torch.manual_seed(2)
    methods = FitEndMethods([method], "Test", "raise")
    methods.run(bound(Tied().double(), causal, data))
    return methods.found[0]


def test_tokens_add_up_to_the_row_s_score_and_are_those_of_their_own_gradients() -> None:
    found = scored(IF("identity", per_token="label"))
    sums = np.stack([found.tokens.of(k).sum(0) for k in range(ROWS)])
    assert np.allclose(sums, found.scores, rtol=1e-10, atol=1e-14)
    torch.manual_seed(2)
    module = Tied().double()
    parameters = list(module.parameters())
    v = torch.autograd.grad(causal(module, (IDS[:9], PADDED[:9])), parameters)  # query "some" of tests.helpers.contexts
    first_batch = 64  # rows that FitContext takes together; a row weighs what its tokens do in their mean
    for row in (0, 7):
        logits = module(IDS[row : row + 1])[0]
        for j in range(1, int(LENGTHS[row])):
            loss = F.cross_entropy(logits[j - 1], PADDED[row, j])
            product = sum(
                (g * x).sum() for g, x in zip(torch.autograd.grad(loss, parameters, retain_graph=True), v, strict=True)
            )
            wanted = product * first_batch / COUNTED[:first_batch].sum() / ROWS
            assert found.tokens.of(row)[j, 0] == pytest.approx(float(wanted), rel=1e-9)
        assert found.tokens.of(row)[0, 0] == 0.0
        assert len(found.tokens.of(row)) == int(LENGTHS[row])  # nothing for what is padded


def test_labels_are_the_tokens_where_they_count() -> None:
    found = scored(IF("identity", per_token="label"))
    labels = np.split(found.arrays["token labels"], found.tokens.offsets[1:-1])
    for row in range(ROWS):
        length = int(LENGTHS[row])
        assert np.isnan(labels[row][0])
        assert labels[row][1:].tolist() == PADDED[row, 1:length].tolist()


@pytest.mark.parametrize("solver", ["ekfac", "exact"])
def test_with_curvature_they_still_add_up(solver: Any) -> None:
    found = scored(IF(solver, damping=0.1, fisher="empirical", per_token="label"))
    (check,) = [each for each in found.checks if "sums" in each.name]
    assert check.passed and check.value < 1e-10


def test_both_parts_have_the_same_sum() -> None:
    one, other = (scored(IF(damping=0.1, fisher="empirical", per_token=parts)) for parts in ("label", "position"))
    assert np.allclose(one.scores, other.scores, rtol=1e-10)
    sums = np.stack([other.tokens.of(k).sum(0) for k in range(ROWS)])
    assert np.allclose(sums, one.scores, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("swap", [False, True])
def test_token_influence_is_that_of_the_difference_of_both_texts(swap: bool) -> None:
    some, others = (IDS[:9], PADDED[:9]), (IDS[9:20], PADDED[9:20])
    texts = (others, some) if swap else (some, others)
    found = scored(TokenInfluence(*texts, curvature="identity"))
    each = [scored(TokenInfluence(one, curvature="identity")).tokens.scores for one in texts]
    assert np.allclose(found.tokens.scores, each[0] - each[1], rtol=1e-9, atol=1e-13)
    assert found.queries[0].name == "positive - negative" and found.settings["positive"] == "tuple"


def test_the_texts_are_weighted_by_their_rows() -> None:
    batches = DataLoader(TensorDataset(IDS[:9], PADDED[:9]), 4)
    found = scored(TokenInfluence(batches, curvature="identity"))
    assert np.allclose(found.scores, scored(TokenInfluence((IDS[:9], PADDED[:9]), curvature="identity")).scores)


def test_where_no_batch_has_the_labels_terms_keep_their_order_and_a_note_says_so() -> None:
    def moved(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0])[:, :-1].flatten(0, 1), 6 - batch[0][:, 1:].flatten())

    context = bound(Tied().double(), moved, (IDS,))
    methods = FitEndMethods([IF("identity", per_token="label")], "Test", "raise")
    methods.run(context)
    assert methods.found[0].tokens.scores.shape == (ROWS * (TOKENS - 1), 2)
    assert any("labels were not found" in note for note in context.notes)


@pytest.mark.parametrize(
    ("tensors", "targets", "offset"),
    [
        ((IDS, PADDED), PADDED[:, 1:], 1),
        ((IDS, PADDED), F.pad(PADDED[:, 1:], (0, 1), value=-100), 1),  # as newer versions of transformers shift
        ((IDS[:, :-1], IDS[:, 1:]), IDS[:, 1:], 0),
        ((IDS.double(),), IDS, None),
    ],
)
def test_labels_are_found_in_the_batch(tensors: Any, targets: Tensor, offset: int | None) -> None:
    assert label_offset({str(k): one for k, one in enumerate(tensors)}, targets, targets >= 0) == offset


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": "word"}, "parts='word' is neither"),
        ({"positive": None}, "positive=None names no texts"),
        ({"curvature": "hessian"}, "TokenInfluence: curvature='hessian' is none of"),
        ({"damping": -1.0}, "TokenInfluence: damping=-1.0"),
        ({"at": ["start"]}, "TokenInfluence"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: Any, words: str) -> None:
    with pytest.raises(InfluenceError, match=words):
        TokenInfluence(**options)
    with pytest.raises(InfluenceError, match="per_token='word'"):
        IF(per_token="word")  # type: ignore[arg-type]


class Language(L.LightningModule):
    """Next token of a short text."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 7))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def texts_of_training() -> Tensor:
    """In the first eight rows word 6 follows word 5, and in no other one."""
    texts = choices(6, 40, 6)
    texts[texts == 5] = 0
    texts[:8, 2], texts[:8, 3] = 5, 6
    return texts


def trained(methods: list[Any] | None) -> tuple[Language, InfluenceCallback]:
    torch.manual_seed(0)
    model, callback = Language(), InfluenceCallback("val", methods or [FINE()], on_error="raise")
    texts = texts_of_training()
    train, val = TensorDataset(texts), TensorDataset(texts[:8])
    trainer = L.Trainer(
        max_epochs=4, callbacks=[callback] if methods else [], logger=False, enable_checkpointing=False, **QUIET
    )
    trainer.fit(model, DataLoader(train, 8, shuffle=True), DataLoader(val, 8))
    return model, callback


def test_in_a_fit_the_tokens_that_teach_the_texts_are_found_masked_and_kept(tmp_path: Any) -> None:
    unwanted = torch.tensor([[1, 5, 6, 5, 6, 5]] * 8)
    method = TokenInfluence((unwanted,), (choices(5, 16, 6),), damping=0.01)
    model, callback = trained([FINE(), method])
    plain, _ = trained(None)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    report = callback.report
    found = report.attribution("token influence")
    assert found is not None and found.tokens is not None
    assert all(found.tokens.of(row)[:, 0].argmax() == 3 for row in range(8))  # the second word of the pair
    mask = report.token_mask(quantile=0.9, window=0, budget=0.5)
    assert all(mask.of(row, texts_of_training()[row])[3] for row in range(8))
    loaded = InfluenceReport.load(report.save(tmp_path / "report"))
    again = loaded.token_mask(quantile=0.9, window=0, budget=0.5)
    assert np.array_equal(again.rows, mask.rows) and np.array_equal(again.labels, mask.labels)
    with pytest.raises(InfluenceError, match="'BIF' has scored tokens"):
        report.token_mask("BIF")
