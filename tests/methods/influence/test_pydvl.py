"""The exact solution beside pyDVL's, for models whose Hessian is the Fisher: linear ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ine_callback import IF
from ine_callback.methods import FitEndMethods
from tests.helpers.contexts import CLASSES, LABELS, ROWS, VECTORS, WIDTH, bound, entropy

pytest.importorskip("pydvl")


def test_the_exact_scores_of_a_linear_model_are_pydvl_s() -> None:
    from pydvl.influence.torch import DirectInfluence

    torch.manual_seed(0)
    model = nn.Linear(WIDTH, CLASSES).double()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(VECTORS, LABELS), ROWS)
    theirs = DirectInfluence(model, nn.functional.cross_entropy, regularization=0.05).fit(loader)
    # query "some" of tests.helpers.contexts is the mean loss of nine rows
    wanted = theirs.influences(VECTORS[:9], LABELS[:9], VECTORS, LABELS).mean(0).numpy() / ROWS
    methods = FitEndMethods([IF("exact", damping=0.05)], "Test", "raise")
    methods.run(bound(model, entropy, (VECTORS, LABELS)))
    assert np.allclose(methods.found[0].scores[:, 0], wanted, rtol=1e-6, atol=1e-12)
