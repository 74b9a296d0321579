"""BIF in a fit: chains around the present weights, with the trainer's data, queries and precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.dense_embeddings import DenseEmbeddings
from ine_callback.methods.bif.rows import CUT_ERRORS, Rows, alike
from ine_callback.methods.bif.run import MAX_ROWS, chains, prepared, term_limit
from ine_callback.methods.bif.settings import BIFSettings
from ine_callback.methods.bif.step_loss import derive
from ine_callback.methods.bif.user_loss import RowLoss
from ine_callback.methods.context import FitContext
from ine_callback.methods.fit_end import Interrupted
from ine_callback.queries import BoundQuery
from ine_callback.queries.sources import in_order
from ine_callback.scores import Attribution, Floats
from ine_callback.utilities.isolation import isolated

MAX_DATA_ROWS = 20_000  # for the mean loss of the posterior


def run_chains(bif: BIFSettings, context: FitContext, loss_fn: RowLoss | None = None) -> Attribution:
    """Runs chains around the present weights of a fit, with the trainer's data, queries and precision.

    Args:
        bif: Settings; ``rows`` are dataset indices.
        context: The fit. Of a large training set, f-INE's scores in it choose half of the rows.
        loss_fn: See :func:`ine_callback.methods.bif.run.bif_scores`.

    Raises:
        InfluenceError: If rows, row losses or queries are not available.
        Interrupted: Where Ctrl-C ended the chains early.
    """
    source, count = context.source, context.rows
    scored, notes = _scored_rows(
        bif, count, _max_scored(bif, context, loss_fn), None if context.scores is None else context.scores.mu
    )
    data = _posterior_rows(scored, count)
    wanted = data.tolist()
    train = context.to_device(
        in_order(wanted, *source.followed(wanted, context.rows_of is not None), owner=context.owner)
    )
    if len(data) < count:
        notes.append(f"BIF: the posterior's mean loss is over {len(data):,} of {count:,} rows")
    place = np.searchsorted(data, scored)
    found, interrupted = chains(
        context.module,
        train,
        {query.info.name: _prepared_query(query, context) for query in context.queries},
        replace(bif, rows=place.tolist()),
        loss_fn,
        progress=lambda draws: context.progress(range(draws), "BIF chains"),
        context=context.precision,
        owner=context.owner,
        at=context.at,
        count=len(data),
    )
    found = replace(found, rows=data[found.rows], notes=(*notes, *found.notes))
    if interrupted:
        raise Interrupted(found)
    return found


def _max_scored(bif: BIFSettings, context: FitContext, loss_fn: RowLoss | None) -> int:
    """Greatest number of rows to score where the settings do not say."""
    if not bif.per_token:
        return MAX_ROWS
    sample = context.to_device(context.source.training([0]))
    with prepared(context.module, sample, bif, loss_fn, context.precision, context.owner) as (_, rows, losses):
        return term_limit(losses, context.module, rows, context.owner)[1]


def _prepared_query(query: BoundQuery, context: FitContext) -> BoundQuery:
    """The query on the device; a mean loss is taken from the step's row losses, so that its metrics do not run."""
    batches = tuple((weight, context.to_device(batch)) for weight, batch in query.batches)
    query = replace(query, batches=batches)
    if query.value != context.source.loss:
        return query
    with isolated(context.module), context.precision(), DenseEmbeddings():
        for name in ("validation_step", "training_step"):
            found = _from_row_losses(context.module, name, query)
            if found is not None:
                return found
    return query


def _scored_rows(bif: BIFSettings, count: int, limit: int, mu: Floats | None) -> tuple[NDArray[np.int64], list[str]]:
    """Dataset indices to score: the given ones, all, or of a large set half random ones and half f-INE's most extreme.

    The random ones are the same at every stage.
    """
    if bif.rows is not None and not isinstance(bif.rows, int):
        return np.asarray(list(bif.rows), dtype=np.int64), []
    limit = min(count, limit if bif.rows is None else bif.rows)
    if limit == count:
        return np.arange(count), []
    drawn = np.random.default_rng(bif.seed).permutation(count)
    if mu is None:
        return np.sort(drawn[:limit]), [f"BIF: scored are {limit:,} of {count:,} rows, drawn at random"]
    extreme = np.nan_to_num(np.abs(mu) / np.nanstd(mu, axis=0)).max(1)
    extreme[drawn[: limit - limit // 2]] = -1.0
    first = np.argsort(-extreme, kind="stable")[: limit // 2]
    note = (
        f"BIF: scored are {limit:,} of {count:,} rows, the {len(first):,} that f-INE finds most extreme and random ones"
    )
    return np.sort(np.concatenate([first, drawn[: limit - len(first)]])), [note]


def _posterior_rows(scored: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Sorted dataset indices of the posterior's rows: all, or of a large set a random sample and the scored rows."""
    if count <= MAX_DATA_ROWS:
        return np.arange(count)
    return np.union1d(scored, np.random.default_rng(0).choice(count, MAX_DATA_ROWS, replace=False))


def _from_row_losses(module: nn.Module, name: str, query: BoundQuery) -> BoundQuery | None:
    """A mean loss as the mean of a step's row losses, where both agree; else None."""
    if not callable(getattr(module, name, None)):
        return None
    try:
        losses = derive(module, name, query.batches[0][1], None)
        if isinstance(losses, str):
            return None
        rows = tuple((weight, losses.rows(module, batch)) for weight, batch in query.batches)
    except (InfluenceError, *CUT_ERRORS):  # the query itself still works
        return None

    def mean(module: nn.Module, rows: Rows) -> Tensor:
        return losses.contributions(module, rows).mean()

    with torch.no_grad():
        expected = torch.stack([query.value(module, batch).float() for _, batch in query.batches])
        found = torch.stack([mean(module, part).float() for _, part in rows])
    return replace(query, value=mean, batches=rows) if alike(found, expected) else None
