"""Methods that run on a trained model, and fits that end with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from ine_callback import InfluenceCallback
from ine_callback.methods import FitContext, FitEndMethod, PerSamplePass
from ine_callback.scores import Attribution, LayerScores, QueryInfo
from tests.helpers.bif.training import QUIET, ROWS, Model, loaders

INFO = QueryInfo("val", "loss", "Does it help?")


class Norms(FitEndMethod):
    """Norm of each row's gradient; one buffer for all stages."""

    name = "gradient norm"

    def __init__(self, at: Sequence[Any] = ("end",), rows: Any = None) -> None:
        self.at, self.rows, self.kept = at, rows, np.zeros((ROWS, 1))

    def run(self, context: FitContext) -> Any:
        self.kept[:] = 0

        def take(rows: Tensor, gradients: Any) -> None:
            self.kept[rows.numpy(), 0] += gradients.squared_norms().cpu().numpy()

        yield PerSamplePass(rows=self.rows), take
        return Attribution(self.name, np.arange(context.rows), context.infos[:1], self.kept)


class Dots(FitEndMethod):
    """Inner product of each row's gradient with the queries', by layer; two passes."""

    name, at = "gradient dot", [1, "end"]

    def run(self, context: FitContext) -> Any:
        found: list[Tensor] = []
        yield PerSamplePass(), lambda rows, gradients: None
        directions = context.query_gradients()
        yield PerSamplePass(), lambda rows, gradients: found.append(gradients.products(directions))
        scores = torch.cat(found).cpu().double().numpy()
        layers = LayerScores(("all", "none"), np.stack([scores, 0 * scores], 1))
        return Attribution(self.name, np.arange(context.rows), context.infos, scores, layers=layers)

    def settings(self) -> dict[str, Any]:
        return {"passes": 2, "kind": Path("a path")}


class Plain(FitEndMethod):
    """A function in one piece, that scores three rows."""

    name = "plain"

    def run(self, context: FitContext) -> Attribution:
        return Attribution("another name", [5, 3, 4], context.infos, np.ones((3, 1)), notes=("a note",))  # type: ignore[arg-type]


def fit(methods: Any, raises: bool = False, epochs: int = 2, **options: Any) -> tuple[Model, Any, L.Trainer]:
    """A fit with these methods; the callback comes back with it."""
    ready = loaders()
    torch.manual_seed(1)
    model = Model()
    influence = InfluenceCallback(
        options.pop("queries", "val"),
        methods,
        dirpath=options.pop("dirpath", None),
        on_error="raise" if raises else "warn",
    )
    ckpt, callbacks = options.pop("ckpt_path", None), options.pop("callbacks", [])
    quiet = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False, **QUIET}
    trainer = L.Trainer(max_epochs=epochs, callbacks=[*callbacks, influence], **quiet | options)
    trainer.fit(model, *options.pop("data", ready), ckpt_path=ckpt)
    return model, influence, trainer


def by_method(report: Any) -> dict[tuple[str, Any], Attribution]:
    return {(each.method, each.at): each for each in report.attributions}


def assert_untouched(model: Model, alone: tuple[Model, Any]) -> None:
    """The same training, to the last bit."""
    assert model.seen == alone[0].seen
    for name, value in alone[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


EXPECTED = {("gradient norm", 1), ("gradient norm", "end"), ("gradient dot", 1), ("gradient dot", "end")}
