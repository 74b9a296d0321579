"""Runs the chains of a :class:`~ine_callback.BIF` around a trained module, which is left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from rich.progress import Progress
from torch import nn
from torchmetrics import Metric

from ine_callback.distributed.processes import Processes
from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.checks import PosteriorFacts
from ine_callback.methods.bif.dense_embeddings import DenseEmbeddings
from ine_callback.methods.bif.evaluation import DrawEvaluator, QueryReader, chosen_rows
from ine_callback.methods.bif.flat_module import FlatModule
from ine_callback.methods.bif.posterior import LocalPosterior, initial_state
from ine_callback.methods.bif.row_losses import RowLoss, row_losses
from ine_callback.methods.bif.rows import SAMPLE_ROWS, RowLosses, Rows
from ine_callback.methods.bif.settings import BIFSettings
from ine_callback.methods.bif.sgld import SGLD, State
from ine_callback.methods.bif.split_chains import split_chains
from ine_callback.methods.bif.statistics import ChainStatistics
from ine_callback.scores import Attribution, Stage
from ine_callback.utilities.isolation import isolated

MAX_ROWS, MAX_TOKENS = 2000, 50_000  # scored where ``BIF(rows=)`` does not say
Track = Callable[[int], Iterable[int]]


def bif_scores(
    module: nn.Module,
    train: Any,
    queries: Any,
    bif: BIFSettings | None = None,
    loss_fn: RowLoss | None = None,
    progress: bool | Track = True,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    owner: str = "bif_scores",
    at: Stage = "end",
    count: int | None = None,
) -> Attribution:
    """Bayesian influence of training rows on queries, from chains around the module's present weights.

    Afterwards parameters, buffers, gradients, grad flags, modes and all random states are bit for bit as before. Ctrl-C
    ends the chains early; the scores so far are returned with a note. Where ``torch.distributed`` is initialised, the
    chains are distributed to the processes (each has all rows), all return the same, and Ctrl-C is not caught.

    Args:
        module: The trained model.
        train: All training rows as one batch of any structure, row k being dataset index k.
        queries: As for :class:`~ine_callback.InfluenceCallback` with explicit data, e.g. ``{"val": (x, y)}``, or
            ``{"row": EachRow((x, y))}`` for the loss of each row.
        bif: Settings.
        loss_fn: ``(module, batch) -> losses [b]``, or [b, T] for rows of T terms whose mean is the row's loss; by
            default the module's ``influence_loss``, else the standard loss in its ``training_step``.
        progress: Whether to show a progress bar, or a function that turns the number of draws into an iterable of them.
        context: Surrounds every evaluation, e.g. with autocast.
        owner: Class named in messages.
        at: Finished epochs, where training is not at its end.
        count: Rows of ``train``, where it is not the length of its first tensor (graphs, whose nodes are concatenated).

    Returns:
        The scores, with further columns (``ine_callback/methods/bif/scores.py``); score > 0: training on the row lowers
        the query.

    Raises:
        InfluenceError: If row losses, rows or queries are not available.

    Example:
        >>> import torch
        >>> x, y = torch.randn(40, 3), torch.randn(40)
        >>> model = torch.nn.Linear(3, 1)
        >>> squared = lambda module, batch: (module(batch[0])[:, 0] - batch[1]).square()
        >>> scores = bif_scores(
        ...     model, (x, y), {"first": (x[:5], y[:5])}, BIFSettings(draws=20), squared, progress=False
        ... )
        >>> scores.scores.shape
        (40, 1)
    """
    return chains(module, train, queries, bif or BIFSettings(), loss_fn, progress, context, owner, at, count)[0]


def chains(
    module: nn.Module,
    train: Any,
    queries: Any,
    bif: BIFSettings,
    loss_fn: RowLoss | None,
    progress: bool | Track,
    context: Callable[[], contextlib.AbstractContextManager[Any]],
    owner: str,
    at: Stage,
    count: int | None,
) -> tuple[Attribution, bool]:
    """See :func:`bif_scores`; and whether Ctrl-C ended the chains early."""
    with prepared(module, train, bif, loss_fn, context, owner, count) as (flat, rows, losses):
        terms, most = term_limit(losses, module, rows, owner) if bif.per_token else (0, MAX_ROWS)
        index, note = chosen_rows(bif.rows, len(rows), most, owner)
        groups = QueryReader(flat, losses, owner).groups(queries)
        evaluator = DrawEvaluator(flat, losses, rows.take(index), groups, bif.eval_rows, terms)
        processes = Processes(flat.weights.device)
        posterior = LocalPosterior(flat, losses, rows, split_chains(bif, processes))
        sampler = posterior.sampler()
        sampler = replace(sampler, step_size=processes.first(sampler.step_size))
        if processes.rank:
            sampler.generator.manual_seed(bif.seed + 2**32 * processes.rank)
        statistics = ChainStatistics(evaluator, sampler, posterior.settings)
        notes = [each for each in (note, losses.note, weights_note(rows)) if each]
        state, interrupted = _run(posterior, sampler, statistics, progress, notes, processes)
        if statistics.draws < 4:
            raise InfluenceError(f"{owner}: only {statistics.draws} draws before the chains ended; {'; '.join(notes)}.")
        deviation = sampler.coordinates.deviation(state.z)[0]
        bias = posterior.minibatch_bias(sampler, deviation) if bool(torch.isfinite(deviation).all()) else float("inf")
        settings = bif.settings() | {
            "step_size": sampler.step_size,
            "localization": posterior.localization,
            "n_beta": posterior.n_beta,
            "rows": len(index),
            "parameters": len(flat.weights),
        }
        described = {"notes": (*notes, *flat.notes), "at": at}
        statistics.gather(processes)
        values = (bias, posterior.step_size_bias(sampler), posterior.data_strength)
        facts = PosteriorFacts(*(processes.first(value) for value in values))
        return statistics.attribution(index.numpy(), facts, settings, described), interrupted


@contextlib.contextmanager
def prepared(
    module: nn.Module,
    train: Any,
    bif: BIFSettings,
    loss_fn: RowLoss | None,
    context: Callable[[], contextlib.AbstractContextManager[Any]],
    owner: str,
    count: int | None = None,
) -> Iterator[tuple[FlatModule, Rows, RowLosses]]:
    """Yields the isolated module as a function of its weights, the training rows on its device, and their losses."""
    with isolated(module), context():
        _mute_metrics(module)
        flat = FlatModule(module)
        train = move_data_to_device(train, flat.weights.device)
        with DenseEmbeddings():
            losses = row_losses(module, train, loss_fn, owner, count=count)
            rows = losses.rows(module, train, bif.eval_rows, count)
        yield flat, rows, losses


def term_limit(losses: RowLosses, module: nn.Module, rows: Rows, owner: str) -> tuple[int, int]:
    """Terms T of a row, and how many rows are scored where the settings do not say.

    Raises:
        InfluenceError: If rows have one term only.
    """
    with torch.no_grad():
        terms = losses.terms(module, rows.take(torch.arange(min(SAMPLE_ROWS, len(rows))))).shape[1]
    if terms == 1:
        raise InfluenceError(f"{owner}: per_token=True has nothing to split: every row's loss is one term.")
    return terms, max(1, min(MAX_ROWS, MAX_TOKENS // terms))


def _mute_metrics(module: nn.Module) -> None:
    """Makes metrics do nothing, which a step may update before its loss; ``isolated`` restores them."""
    for metric in module.modules():
        if isinstance(metric, Metric):
            metric.__dict__["forward"] = metric.__dict__["update"] = lambda *_, **__: torch.zeros(())


def weights_note(rows: Rows) -> str | None:
    """A note for the report where rows have unequal weights in the training's loss."""
    low, high = float(rows.weights.min()), float(rows.weights.max())
    if high - low <= 1e-3 * high:
        return None
    empty = int((rows.weights == 0).sum())
    mean = float(rows.weights.mean())
    return (
        f"the training's loss counts rows unequally, {low / mean:.3g} to {high / mean:.3g} times the mean (tokens, "
        "class weights or a mask), and so do the chains; a score is about the row's mean loss"
        + (f"; {empty:,} rows have no term that counts: their scores are 0" if empty else "")
    )


def _run(
    posterior: LocalPosterior,
    sampler: SGLD,
    statistics: ChainStatistics,
    progress: bool | Track,
    notes: list[str],
    processes: Processes,
) -> tuple[State, bool]:
    """Takes all draws. Ends early on Ctrl-C (then True) or when a value is not finite."""
    settings, weights = posterior.settings, posterior.weights
    state = sampler.init(settings.chains, posterior.mean_gradient)
    try:
        state = initial_state(posterior, sampler)
        for draw in progress(settings.draws) if callable(progress) else _track(settings.draws, progress):
            for _ in range(settings.thinning):
                state = sampler.step(state, posterior.gradient)
            control_variate = state.control_variate
            if control_variate is not None:
                control_variate = sampler.coordinates.deviation(control_variate)
            if not statistics.take(weights + sampler.coordinates.deviation(state.z), control_variate, processes):
                notes.append(f"the chains diverged at draw {draw + 1} of {settings.draws}")
                break
    except KeyboardInterrupt:
        if processes.count > 1:  # the other processes would wait for this one
            raise
        notes.append(f"interrupted after {statistics.draws} of {settings.draws} draws: the scores are partial")
        return state, True
    return state, False


def _track(draws: int, progress: bool) -> Iterator[int]:
    with Progress(disable=not progress, transient=True) as bar:
        yield from bar.track(range(draws), description="BIF chains")
