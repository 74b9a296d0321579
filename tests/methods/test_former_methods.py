"""Methods that were written for earlier versions still work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ine_callback import Recorder
from ine_callback.methods import Method
from ine_callback.scores import Scores


class Old(Method):
    """With the names, and the arguments, of the first version."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, float]] = []

    def start(self, rows: int, queries: Any, device: Any, random_weights: bool = False, contrasts: int = 0) -> None:
        self.rows = rows

    def fold(
        self, rows: Tensor, signals: Tensor, rate: float, unit: Tensor | None = None, contrasts: Tensor | None = None
    ) -> None:
        self.steps.append((signals, rate))

    def finish(self) -> Scores:
        raise NotImplementedError

    def grow(self, rows: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_fold_gets_what_it_always_got() -> None:
    model, x, old = torch.nn.Linear(3, 2), torch.randn(6, 3), Old()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, sgd, 6, "self", lambda net, batch: net(batch).square().mean(), [old], on_error="raise")
    with recorder, recorder.batch(torch.arange(6), x):
        model(x).square().mean().backward()
        sgd.step()
    assert [signals.shape for signals, _ in old.steps] == [(6, 1)] and old.steps[0][1] == 0.1
