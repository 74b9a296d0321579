"""What cannot be recorded is refused before the first step, with a remedy, and leaves the Trainer's parts usable."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from ine_callback import InfluenceCallback
from ine_callback.errors import InfluenceError
from ine_callback.integrations.batch_hooks import mixes_rows

from .harness import QUIET
from .refused import REFUSED, Refusal


def refusal_of(refusal: Refusal) -> tuple[str, bool]:
    """The message, and whether the weights are still the first ones."""
    torch.manual_seed(0)
    data, module = refusal.data(), refusal.module()
    before = [p.detach().clone() for p in module.parameters()]
    influence = InfluenceCallback(["val", "self"], **refusal.influence)
    with pytest.raises(InfluenceError) as caught:
        L.Trainer(**QUIET, callbacks=[influence]).fit(module, data.train, data.val)
    return str(caught.value), all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.name)
def test_refused_before_training_with_a_remedy(refusal: Refusal) -> None:
    message, untouched = refusal_of(refusal)
    assert message.startswith("InfluenceCallback: ") and all(words in message for words in refusal.told), message
    assert untouched


def test_noise_of_each_row_is_no_mixing() -> None:
    x = torch.randn(5, 3)
    assert not mixes_rows(torch.nn.Identity(), lambda batch: [batch[0] + torch.randn_like(batch[0])], [x], 5)
    assert mixes_rows(torch.nn.Identity(), lambda batch: [batch[0] - batch[0].mean(0)], [x], 5)
