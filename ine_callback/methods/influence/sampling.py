"""Makes the sampler that the settings name, from passes over the rows."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from ine_callback.capture.label_gradients import probabilities
from ine_callback.errors import InfluenceError
from ine_callback.methods.context import FitContext
from ine_callback.methods.fit_end import Take
from ine_callback.methods.influence.fisher import FisherRows
from ine_callback.methods.influence.samplers import (
    Curvature,
    Nearest,
    Sampler,
    Uniform,
    Weighted,
    distances_to_centres,
)
from ine_callback.methods.influence.settings import IFSettings
from ine_callback.methods.passes import PerSamplePass
from ine_callback.methods.row_gradients import RowGradients
from ine_callback.utilities.isolation import isolated


def sampler_of(
    settings: IFSettings, context: FitContext, fisher: FisherRows
) -> Generator[tuple[PerSamplePass, Take], None, Sampler]:
    """The sampler; yields the pass that it needs.

    Raises:
        InfluenceError: If classes are asked of a loss without, or there are too few rows.
    """
    if settings.batch_size > context.rows:
        raise InfluenceError(f"IF: batch_size={settings.batch_size} is larger than the {context.rows} training rows.")
    if settings.sampler == "uniform":
        return Uniform()
    if settings.sampler == "curvature":
        return Curvature(fisher.traces())
    predicted = _predictions(context)
    if settings.sampler == "logit":
        return Weighted(predicted)
    features: dict[int, Tensor] = {}

    def take(rows: Tensor, gradients: RowGradients) -> None:
        last = next(iter(gradients))  # in the order of the backward pass
        inputs: Tensor = gradients.grad_samples(last)[0].activations  # type: ignore[attr-defined]
        features.update(zip(rows.tolist(), inputs.flatten(1, -2).mean(1).cpu(), strict=True))

    yield PerSamplePass(), take
    x = torch.stack([features[row] for row in range(context.rows)])
    distances = distances_to_centres(x, predicted.shape[1], settings.seed)
    return Nearest(distances) if settings.sampler == "topk" else Weighted(1 / (distances + 1e-6))


def _predictions(context: FitContext) -> Tensor:
    """Predicted probabilities of all rows [N, C], on the host."""
    found = []
    for rows, batch in context.batches(None, "predictions"):
        with isolated(context.module), context.precision():
            found.append(probabilities(context.loss(context.module, batch), len(rows)).double().cpu())
    return torch.cat(found)
