"""Scores of tokens by label: how training on a token's own loss would change the queries.

A row's part of the mean training loss is a sum over its terms, ``sum_j c_ij l_ij``, so its score is the sum of
``c_ij <x, grad l_ij>`` with the query's solution x. All of a batch come from one forward pass for each query
(:mod:`ine_callback.capture.term_derivatives`). The parts by position, in contrast, are by where the gradient arises:
that of position t contains what t contributes, through attention, to the losses of all later tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ine_callback.capture.term_derivatives import term_derivatives
from ine_callback.data.label_positions import label_offset
from ine_callback.methods.base import host
from ine_callback.methods.context import FitContext
from ine_callback.methods.influence.directions import Directions
from ine_callback.scores import Floats
from ine_callback.utilities.isolation import isolated

UNKNOWN = "labels were not found among the tokens of a batch: scores of tokens are in the order of the loss's terms"


@dataclass(frozen=True)
class LabelParts:
    """One row's tokens.

    Attributes:
        row: Its dataset index.
        parts: Scores [T, Q], in the order of the batch's own labels; 0 where a token has no loss.
        labels: The labels [T]; NaN where a token has no loss.
    """

    row: int
    parts: Floats
    labels: Floats


def label_parts(context: FitContext, directions: Directions, rows: Sequence[int] | None) -> Iterator[LabelParts]:
    """The tokens of some rows (None: all).

    Args:
        context: The trained model.
        directions: The queries' solutions.
        rows: Dataset indices.

    Raises:
        InfluenceError: If the loss's terms cannot be read.
    """
    along, device = list(_by_parameter(directions)), next(context.module.parameters()).device.type
    for which, batch in context.batches(rows, "tokens"):
        found, size = [], len(which)
        with isolated(context.module), context.precision(), torch.autocast(device, enabled=False):
            for direction in along:
                reading, derivative = term_derivatives(
                    context.module, partial(context.loss, context.module, batch), direction, size
                )
                found.append(derivative)
        parts = torch.stack(found, 2) * (reading.weights / reading.terms * size / context.rows)[..., None]
        counted = reading.weights != 0
        labels = torch.zeros_like(counted) if reading.labels is None else reading.labels
        offset = None if reading.labels is None else label_offset(batch, labels, counted)
        if offset is None and UNKNOWN not in context.notes:
            context.notes.append(UNKNOWN)
        known = labels.double().masked_fill(~counted, torch.nan)
        yield from _rows(which, parts, known, offset or 0)


def _by_parameter(directions: Directions) -> Iterator[Mapping[nn.Parameter, Tensor]]:
    """Each query's solution, parameter by parameter."""
    whole = {block: directions.whole(block) for block in directions.space.blocks}
    for k in range(len(next(iter(whole.values())))):
        yield {
            parameter: part
            for block, parts in whole.items()
            for parameter, part in zip(block.parameters, block.from_layout(parts[k]), strict=True)
        }


def _rows(which: Tensor, parts: Tensor, labels: Tensor, offset: int) -> Iterator[LabelParts]:
    """Each row alone, moved to its labels' positions, and without what follows its last token that counts."""
    for row, part, label in zip(which.tolist(), host(parts), host(labels), strict=True):
        counted = np.flatnonzero(~np.isnan(label))
        length = int(counted[-1]) + 1 if counted.size else 0
        before = ((offset, 0), (0, 0))
        part = np.where(np.isnan(label)[:length, None], 0.0, part[:length])
        yield LabelParts(row, np.pad(part, before), np.pad(label[:length], before[0], constant_values=np.nan))
