"""Queries that come after the run: their gradients at the trained weights, against the rows' stored vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ine_callback.errors import InfluenceError
from ine_callback.integrations.stored_products import products
from ine_callback.queries import BoundQuery, Query, gradients, parse
from ine_callback.queries.module_loss import ModuleLoss
from ine_callback.queries.sources import DataSource
from ine_callback.report import InfluenceReport
from ine_callback.report.stored_vectors import StoredBlock, StoredVectors
from ine_callback.scores import Attribution, Check, Floats, LayerScores
from ine_callback.utilities.isolation import isolated

OWNER, METHOD = "ask", "asked"
LEAST_AGREEMENT = 0.9  # median Spearman correlation with the run's own queries
TOGETHER = 16  # queries whose gradients are formed at once


def ask(
    report: InfluenceReport,
    queries: str | Query | list[str | Query] | dict[str, Any] | Callable[..., Any],
    module: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    val_dataloaders: Any = None,
    train_dataloaders: Any = None,
    max_query_rows: int = 2000,
    per_layer: bool = False,
) -> Attribution:
    """Scores of all training rows on queries that nobody knew of during the run.

    The run must have kept a store (``InfluenceCallback(store=GradientStore())``). Needed are the trained module and the
    query; the training data are not read. A score is ``<v, z>``: the query's gradient v and what the run did with the
    row, z.

    Args:
        report: The run's, as it was loaded or as the callback holds it.
        queries: As for :class:`~ine_callback.InfluenceCallback`, but for ``"self"``.
        module: The trained module, on any device; it comes back as it was.
        loss: Mean loss of a batch, ``(module, batch) -> scalar``; by default a LightningModule's own.
        val_dataloaders: Validation loaders, for ``"val"``.
        train_dataloaders: The training loader, for queries that are lists of dataset indices.
        max_query_rows: Rows taken of a larger query loader, a fixed random sample.
        per_layer: Whether each layer gets scores of its own, what its change did to the query; they add up to the
            row's. Nothing more is stored for that; in memory they take 8 bytes for each row, layer and query.

    Returns:
        The scores, in the size of the run's mu where it had queries on data; score > 0: training on the row lowers the
        query. Standard errors are of the run's own queries, asked again of the store: what the compression and the
        missing history cost, and what mu itself scatters by between trainings.

    Raises:
        InfluenceError: If there is no store, the module is another one, or a query has no data.

    Example:
        >>> import torch
        >>> from ine_callback import GradientStore, Recorder
        >>> x, y = torch.randn(32, 4), torch.randn(32, 1)
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mse = lambda module, batch: torch.nn.functional.mse_loss(module(batch[0]), batch[1])
        >>> options = {"loss": mse, "total_steps": 8, "store": GradientStore()}
        >>> with Recorder(model, optimizer, 32, {"all": (x, y)}, **options) as recorder:
        ...     for rows in torch.arange(32).repeat(2).split(8):
        ...         with recorder.batch(rows, (x[rows], y[rows])):
        ...             loss = mse(model, (x[rows], y[rows]))
        ...             recorder.see(loss)
        ...             loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> ask(recorder.report(), {"first": (x[:1], y[:1])}, model, mse).scores.shape
        (32, 1)
    """
    store = report.store
    if store is None:
        raise InfluenceError(
            f"{OWNER}: the report has no gradient store; train with store=GradientStore() of ine_callback to ask later."
        )
    bound = _bound(queries, module, loss, val_dataloaders, train_dataloaders, max_query_rows)
    parameters = _parameters(store, module)
    device = next(module.parameters()).device
    entries, captured = np.zeros((len(bound), len(store.variances))), np.zeros(len(bound))
    with isolated(module):
        for _ in _weights(store, module):
            for start in range(0, len(bound), TOGETHER):
                part = slice(start, start + TOGETHER)
                found, share = _entries(store, module, bound[part], parameters, device)
                entries[part] += found / (1 + len(store.weights))
                captured[part] = share
    scores = products(store, store.of_query(entries), device)
    scored = _attribution(store, bound, scores, captured)
    return replace(scored, layers=_by_layer(store, entries, scored.scores, device)) if per_layer else scored


def _bound(queries: Any, module: nn.Module, loss: Any, val: Any, train: Any, max_query_rows: int) -> list[BoundQuery]:
    if loss is None and isinstance(module, LightningModule):
        loss = ModuleLoss(module, OWNER)
    loaders = [] if train is None else tree_leaves(train)
    source = DataSource(
        OWNER, loss, loaders[0] if loaders else None, [] if val is None else tree_leaves(val), max_query_rows
    )
    bound = [each for name, query in parse(queries, OWNER).items() for each in query.bind(name, source)]
    if not bound:
        raise InfluenceError(f"{OWNER}: there is no query: 'self' is the run's alone; give one with data.")
    return bound


def _parameters(store: StoredVectors, module: nn.Module) -> list[nn.Parameter]:
    """The module's parameters in the order of the store's blocks."""
    named = dict(module.named_parameters())
    names = [name for block in store.blocks for name in block.parameters]
    if missing := [name for name in names if name not in named]:
        raise InfluenceError(
            f"{OWNER}: {type(module).__name__} has no parameter {missing[0]!r}, which the run trained; give the module "
            "that was trained, not a part or a wrapper of it."
        )
    for block in store.blocks:
        size = sum(named[name].numel() for name in block.parameters)
        if size != int(np.prod(block.layout)):
            raise InfluenceError(f"{OWNER}: {block.parameters[0]!r} has another shape than in the run.")
    return [named[name] for name in names]


def _weights(store: StoredVectors, module: nn.Module) -> Iterator[None]:
    """Gives the module its final weights, then each of the stored ones; putting them back is up to the caller."""
    yield
    named = dict(module.named_parameters())
    for weights in store.weights:
        if set(weights) - set(named):
            raise InfluenceError(f"{OWNER}: the store's weights belong to another module than {type(module).__name__}.")
        with torch.no_grad():
            for name, value in weights.items():
                named[name].copy_(torch.as_tensor(np.asarray(value)).to(named[name]))
        yield


def _entries(
    store: StoredVectors, module: nn.Module, queries: list[BoundQuery], parameters: list[nn.Parameter], device: Any
) -> tuple[Floats, Floats]:
    """Entries [Q, W] of the queries' gradients, and which share of their squared norm these are [Q]."""

    def there(batch: Any) -> Any:
        return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)

    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        each = iter(gradients(queries, module, parameters, there))
    finally:
        for p in frozen:
            p.requires_grad_(False)
    parts, squares = [], np.zeros(len(queries))
    with torch.no_grad():
        for block in store.blocks:
            v = _to_layout(block, [next(each) for _ in block.parameters])
            squares += v.double().flatten(1).square().sum(1).cpu().numpy()
            parts.append(_of_block(block, v).double().cpu().numpy())
    found = np.concatenate(parts, 1)
    return found, np.square(found).sum(1) / np.maximum(squares, np.finfo(float).tiny)


def _to_layout(block: StoredBlock, found: list[Tensor]) -> Tensor:
    """Gradients of the block's parameters, each [Q, *shape], as one [Q, *layout]."""
    queries = len(found[0])
    if len(found) == 1:
        return found[0].reshape(queries, *block.layout)
    groups, out, inputs = block.layout
    weight, bias = found[0].reshape(queries, groups, out, inputs - 1), found[1].reshape(queries, groups, out, 1)
    return torch.cat([weight, bias], -1)


def _of_block(block: StoredBlock, v: Tensor) -> Tensor:
    index = torch.as_tensor(block.index, device=v.device)
    if block.left is None or block.right is None:
        return v[:, index]
    left, right = (torch.as_tensor(side).to(v) for side in (block.left, block.right))
    return (left.transpose(-1, -2) @ v @ right).flatten(1)[:, index]


def _attribution(store: StoredVectors, bound: list[BoundQuery], scores: Floats, captured: Floats) -> Attribution:
    """Scores without a unit in the size of the run's mu, with their errors."""
    told = store.calibration
    scores[~store.seen] = np.nan
    size = np.sqrt(np.nanmean(np.square(scores), 0))
    known = told.queries > 0
    scores = scores / np.where(size > 0, size, 1) * (told.size if known else 1.0)
    se: Floats | None = None
    checks: tuple[Check, ...] = ()
    notes = [f"the query's gradient is stored to {captured.min():.0%} at least"]
    if known:
        error = np.sqrt(told.missing * told.size**2 + np.nan_to_num(told.se) ** 2)
        se = np.where(np.isfinite(scores), error, np.nan)
        passed = told.agreement >= LEAST_AGREEMENT
        remedy = "give GradientStore more bytes_per_row or working, or ask the query in the run"
        checks = (Check("agreement with the run's own queries", told.agreement, ">= 0.9", passed, remedy),)
    else:
        notes.append("the run had no query on data: sizes have no unit, and errors are unknown")
    return Attribution(
        METHOD,
        np.arange(len(scores)),
        tuple(query.info for query in bound),
        scores,
        se,
        checks=checks,
        settings=dict(store.settings),
        arrays={"captured": captured},
        notes=tuple(notes),
        title="Asked after the run",
        headline=f"{len(bound)} queries asked of {store.dimensions} stored numbers a row",
        legend="score > 0: training on the row lowers the query, as mu says it",
    )


def _by_layer(store: StoredVectors, entries: Floats, scores: Floats, device: torch.device) -> LayerScores:
    """Scores by layer, in the scores' unit: a row's numbers tell all layers' entries, so the query's are split."""
    parts = store.of_query_by_layer(entries)
    queries, layers, size = parts.shape
    found = products(store, parts.reshape(-1, size), device).reshape(-1, queries, layers)
    found[~store.seen] = np.nan
    total = np.square(np.nan_to_num(found.sum(2))).sum(0)
    unit = np.sqrt(np.square(np.nan_to_num(scores)).sum(0) / np.where(total > 0, total, 1))
    return LayerScores(tuple(block.parameters[0] for block in store.blocks), (found * unit[:, None]).transpose(0, 2, 1))
