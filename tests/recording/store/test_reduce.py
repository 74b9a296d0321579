"""Leading components: by rows, by entries, and at random where both are many."""

from __future__ import annotations

import pytest
import torch

from ine_callback.recording.store import reduce


@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (60, 70)])
def test_leading_components_are_those_of_the_singular_value_decomposition(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduce, "EXACT", 50)  # the last shape is decomposed at random
    torch.manual_seed(0)
    weighted = torch.randn(shape) @ torch.diag(torch.arange(1, shape[1] + 1).float() ** -2)
    variances = torch.rand(shape[1]) + 0.5
    state = torch.get_rng_state()
    found = reduce.components(weighted, variances, 5) / variances.sqrt()[:, None]
    assert torch.equal(state, torch.get_rng_state())
    expected = torch.linalg.svd(weighted.double()).Vh[:5].T
    torch.testing.assert_close((found.double().T @ expected).abs(), torch.eye(5).double(), atol=1e-3, rtol=0)


def test_without_rows_there_are_components() -> None:
    assert reduce.components(torch.zeros(0, 4), torch.ones(4), 3).shape == (4, 3)
