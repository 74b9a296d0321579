"""A loss that pushes chosen tokens away: plain training where there are none, bounded where there are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ine_callback import SuppressTokens, TokenMask, suppressed_cross_entropy
from ine_callback.errors import InfluenceError

VOCABULARY, ROWS, TOKENS = 9, 24, 6
IDS = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(TOKENS) > 4, -100)
CHOSEN = torch.rand(ROWS, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.2


def trained(loss: Any, steps: int = 30, lr: float = 0.05) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for step in range(steps):
        rows = torch.arange(step * 8, step * 8 + 8) % ROWS
        optimizer.zero_grad()
        loss(model(IDS[rows])[:, :-1], LABELS[rows][:, 1:], CHOSEN[rows][:, 1:]).backward()
        optimizer.step()
    return model


def plain(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_without_chosen_tokens_training_is_the_plain_one_bit_for_bit() -> None:
    empty = trained(lambda logits, labels, mask: suppressed_cross_entropy(logits, labels, torch.zeros_like(mask)))
    assert same(empty, trained(plain))


def test_a_weight_of_minus_one_is_plain_training_bit_for_bit() -> None:
    assert same(trained(lambda *a: suppressed_cross_entropy(*a, weight=-1.0, cap=None)), trained(plain))
    assert not same(trained(suppressed_cross_entropy), trained(plain))


@pytest.mark.parametrize("penalty", ["ascent", "unlikelihood", "ignore"])
def test_values_are_those_of_a_loop(penalty: Any) -> None:
    logits = torch.randn(ROWS, TOKENS, VOCABULARY, dtype=torch.float64)
    total, count = 0.0, 0
    for i in range(ROWS):
        for j in range(TOKENS):
            if LABELS[i, j] < 0:
                continue
            p = logits[i, j].softmax(0)[LABELS[i, j]].item()
            instead = {
                "ascent": 0.5 * max(math.log(p), -math.log(VOCABULARY)),
                "unlikelihood": -0.5 * math.log(1 - p),
                "ignore": 0.0,
            }
            total += instead[penalty] if CHOSEN[i, j] else -math.log(p)
            count += 1
    found = suppressed_cross_entropy(logits, LABELS, CHOSEN, 0.5, penalty)
    assert float(found) == pytest.approx(total / count, rel=1e-12)


def test_beyond_the_cap_there_is_no_gradient_and_below_it_is_minus_the_loss_s() -> None:
    logits = torch.zeros(2, 4, dtype=torch.float64)
    logits[0, 0], logits[1, 0] = 3.0, -3.0  # losses below and above log 4
    logits.requires_grad_()
    labels, all_of_them = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    (found,) = torch.autograd.grad(suppressed_cross_entropy(logits, labels, all_of_them), logits)
    (without,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    assert torch.allclose(found[0], -without[0]) and not found[1].any()


@pytest.mark.long
def test_uncapped_ascent_diverges_and_the_cap_prevents_it() -> None:
    """Clean tokens as mean loss; trap 3 of the project's seeds."""

    def clean(model: nn.Module) -> float:
        losses = F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), reduction="none")
        return float(losses[(~CHOSEN & (LABELS >= 0))[:, 1:].flatten()].mean())

    capped = clean(trained(suppressed_cross_entropy, 600))
    uncapped = clean(trained(lambda *a: suppressed_cross_entropy(*a, cap=None), 600))
    assert capped < clean(trained(plain, 600)) + 0.5
    assert uncapped > 3 * capped


def test_a_certain_token_is_still_pushed_away_by_its_unlikelihood() -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    one = torch.tensor([0]), torch.tensor([True])
    loss = suppressed_cross_entropy(logits, *one, penalty="unlikelihood")
    (found,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(200.0) and found.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": LABELS[:, 1:]}, "shift all of them alike"),
        ({"mask": CHOSEN[:3]}, "shift all of them alike"),
        ({"penalty": "hinge"}, "penalty='hinge' is none of"),
    ],
)
def test_what_does_not_fit_is_refused(options: Any, words: str) -> None:
    given = {"logits": torch.zeros(ROWS, TOKENS, 3), "labels": LABELS, "mask": CHOSEN} | options
    with pytest.raises(InfluenceError, match=words):
        suppressed_cross_entropy(**given)


def mask_of(rows: Any = ROWS) -> TokenMask:
    at = CHOSEN.nonzero().numpy()
    return TokenMask(at[:, 0], at[:, 1], IDS.numpy()[at[:, 0], at[:, 1]], IDS.numel())


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_items_carry_their_mask_through_a_loader(form: str) -> None:
    items: Any = {
        "tensor": IDS,
        "tuple": [(torch.zeros(2), ids) for ids in IDS],
        "mapping": [{"input_ids": ids, "labels": ids} for ids in IDS],
    }[form]
    loader = DataLoader(SuppressTokens(items, mask_of()), 5, num_workers=2)
    found = [batch["suppress_mask"] if form == "mapping" else batch[-1] for batch in loader]
    assert torch.equal(torch.cat(found), CHOSEN)


def test_other_rows_are_refused() -> None:
    with pytest.raises(InfluenceError, match="the data set 3 rows"):
        SuppressTokens(IDS[:3], mask_of())
    rows = SuppressTokens(IDS.flip(0), mask_of())
    with pytest.raises(InfluenceError, match="give the same rows in the same order"):
        [rows[k] for k in range(ROWS)]


def test_lists_of_ids_have_masks_too() -> None:
    rows = SuppressTokens([{"input_ids": ids.tolist()} for ids in IDS], mask_of(), key="chosen")
    assert all(np.array_equal(rows[k]["chosen"], CHOSEN[k]) for k in range(ROWS))
