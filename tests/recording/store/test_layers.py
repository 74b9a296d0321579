"""Scores by layer of a store that nothing was added to for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ine_callback import FINE, GradientStore
from ine_callback.stats.ranks import spearman
from tests.helpers.stored import ALL, ROWS, Training, data, loss_of


def trained(store: GradientStore) -> Training:
    one = Training(store, methods=[FINE(closing=False)])
    with one.recorder:
        one.steps()
    return one


def test_layers_parts_are_products_of_their_own_entries_and_add_up() -> None:
    one, (x, y) = trained(ALL), data()
    report, recorded = one.recorder.report(), one.recorder.store
    assert recorded is not None and report.store is not None
    found = report.ask(
        {"new": (x[:5] * 1.1, y[:5]), "other": (x[7:9], y[7:9])}, one.model, loss=loss_of, per_layer=True
    )
    assert found.layers is not None and found.layers.names == ("0.weight", "2.bias", "2.weight", "3.weight")
    np.testing.assert_allclose(found.layers.scores.sum(1), found.scores, rtol=1e-4, atol=1e-6)
    vectors = recorded.vectors.vectors(ROWS)  # as they were before the store was made
    by_key = {block.key: block for block in recorded.compression.weights}
    expected = []
    for key, basis in recorded.compression.bases.items():
        gradients = torch.autograd.grad(loss_of(one.model, (x[:5] * 1.1, y[:5])), by_key[key].parameters)
        v = basis.of_vectors(by_key[key].to_layout([g[None] for g in gradients]))
        expected.append((vectors[:, recorded.compression.places[key]] @ v[0]).double().numpy())
    products, parts = np.stack(expected, 1), found.layers.scores[:, :, 0]
    unit = (parts * products).sum() / np.square(products).sum()  # one for all rows and layers
    np.testing.assert_allclose(parts, unit * products, atol=1e-3 * np.abs(parts).max())


@pytest.mark.long
def test_fewer_bytes_cost_layers_not_much_more_than_their_sum() -> None:
    exact, small, (x, y) = trained(ALL), trained(GradientStore(bytes_per_row=4 + 36, dtype="int8", working=512)), data()
    asked = {"new": (x[20:30] * 1.1, y[20:30])}
    whole, few = (one.recorder.report().ask(asked, one.model, loss=loss_of, per_layer=True) for one in (exact, small))
    assert whole.layers is not None and few.layers is not None
    np.testing.assert_allclose(few.layers.scores.sum(1), few.scores, rtol=1e-4, atol=1e-6)
    assert spearman(few.scores[:, 0], whole.scores[:, 0]) > 0.97
    for k in range(len(whole.layers.names)):
        assert spearman(few.layers.scores[:, k, 0], whole.layers.scores[:, k, 0]) > 0.9
