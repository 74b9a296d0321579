"""The closing pass: when training is over, the rows are passed once more at some of the weights along the run.

Twice each time: with labels drawn from the model's predictions, for the curvature, and with their own labels, for their
gradients' inner products with the queries' directions. :mod:`ine_callback.methods.closing` has the formula.

The curvature of up to ``EXACT`` rows whose gradients fit into memory is taken across all layers. Of more, each layer's
Kronecker factors stand for it, times one number: how much larger the curvature across layers is, in a sample of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ine_callback.capture import Block
from ine_callback.curvature.gradient_sample import GradientSample
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.spectral import damped, relative
from ine_callback.distributed.processes import Lockstep
from ine_callback.errors import InfluenceError
from ine_callback.methods import Method
from ine_callback.methods.closing import Closing, OnePass, averaged
from ine_callback.methods.context import FitContext
from ine_callback.methods.passes import PerSamplePass
from ine_callback.methods.row_gradients import RowGradients
from ine_callback.optimizers.joint import JointOptimizer
from ine_callback.optimizers.registry import summed_rates
from ine_callback.queries.sources import DataSource
from ine_callback.recording.config import RecordingConfig
from ine_callback.recording.guard import Guard
from ine_callback.recording.recent_batches import RecentBatches
from ine_callback.recording.setup import Parts
from ine_callback.recording.snapshots import SHARES, Snapshots, affordable
from ine_callback.scores import Floats
from ine_callback.utilities.isolation import isolated
from ine_callback.utilities.words import CLOSING

EXACT = 6144  # rows: their Gram matrix is factorised, in .8 GB
MAX_ROWS = 4096  # of more rows, as many are chosen at random for Kronecker factors
OWN_LABELS = "closing pass: no labels can be drawn for this loss: the curvature is of the rows' own labels"
DAMPING = 0.1  # of the mean curvature, from fixed weights
QUERY_BYTES = 2**34  # most of the queries' gradients, which are held at once
SAMPLE = 256  # rows of a larger set, for the curvature's size across layers


class ClosingPass:
    """A recording's closing pass: whether a method wants one, with which rows, and that it is made once.

    Args:
        methods: The recording's.
        config: Its options. Without a discount no curvature is wanted at all, and so no closing pass.

    Attributes:
        recent: The batches of the last pass over the rows, for a pass without a context.
        snapshots: The weights at earlier times.
    """

    def __init__(self, methods: Sequence[Method], config: RecordingConfig) -> None:
        self._methods = [method for method in methods if method.wants_closing and config.discount]
        self._config = config
        self.recent, self.snapshots = RecentBatches(bool(self._methods)), Snapshots(bool(self._methods))

    def follow(self, parts: Parts, batch_size: int) -> None:
        """After each step: keeps the weights if it is time, and if passes at them will be worth their cost."""
        if parts.sharded or not parts.bound:
            return
        rows, planned = parts.accumulators.check.count, len(parts.schedule.planned)
        if not planned or affordable((len(SHARES) - 1) * rows, planned * batch_size):
            self.snapshots.keep(parts.training.module, parts.schedule.steps, lambda: _summed_loss(parts))

    def run(self, parts: Parts, guard: Guard, context: Callable[[], FitContext] | None) -> None:
        """Makes the pass, unless nobody wants it (any more); where it cannot be had, that is noted.

        Args:
            parts: The recording's.
            guard: Knows whether the recording reached its end, and takes notes for the report.
            context: Makes the trained model with its rows; None: with the recent batches.
        """
        if not (self._methods and guard.recording and guard.steps and parts.bound):
            return
        methods, self._methods = self._methods, []
        try:
            with parts.capture.paused():
                found = self._found(parts, guard, context)
        except Exception as error:  # the run's own scores are there
            if self._config.on_error == "raise" and not isinstance(error, InfluenceError):
                raise
            why = str(error) if isinstance(error, InfluenceError) else f"{type(error).__name__}: {error}"
            return guard.note(f"{CLOSING}{why}; scores are of the run alone, which are less accurate")
        for method in methods:
            method.close(found)

    def _found(self, parts: Parts, guard: Guard, make: Callable[[], FitContext] | None) -> Closing:
        if parts.sharded:
            raise InfluenceError("each process has a part of the weights only")
        if isinstance(parts.training.optimizer, JointOptimizer) and parts.training.optimizer.by_turns:
            raise InfluenceError("the optimizers take turns, each with a loss of its own")
        context = _context(parts, self.recent, self._config, guard.owner) if make is None else make()
        module, rows = context.module, parts.accumulators.check.count
        if not all(bool(p.isfinite().all()) for p in module.parameters()):
            raise InfluenceError("the trained weights are not finite")
        held = 4 * sum(p.numel() for p in module.parameters() if p.requires_grad) * len(parts.bound)
        if held > QUERY_BYTES:
            raise InfluenceError(f"it needs the gradients of {len(parts.bound)} queries at once, {held / 1e9:.0f} GB")
        with isolated(module):  # puts back the weights, and random numbers that the user's batch hooks draw, too
            losses = context.query_values().cpu().double().numpy()
            chosen = self.snapshots.chosen(parts.schedule.steps, float(_summed_loss(parts)))
            if not self.snapshots.usable(module, chosen, rows, guard.steps * guard.widest):
                chosen = [None]
            found = [self._pass(context, parts, guard) for _ in self.snapshots.load(module, chosen)]
        if parts.store is not None:
            parts.store.run(parts.store.take_queries, context, [one for one in chosen if one is not None])
        self.snapshots.clear()
        if self.snapshots.missing:
            guard.note(f"closing pass at the last weights alone: {self.snapshots.missing}")
        return averaged(found, losses)

    def _pass(self, context: FitContext, parts: Parts, guard: Guard) -> OnePass:
        across = parts.signals.noise.random  # from fixed weights each layer's factors are all that is used
        curvature = Curvature(parts.accumulators.check.count, self._config.max_dim, parts.device, across)
        if not curvature.observe(context):
            guard.note(OWN_LABELS)
        found = closing_pass(context, parts, curvature)
        if parts.store is not None and parts.signals.curvature is not None:
            parts.store.known(parts.accumulators.check.count)
            rates, decays = summed_of(context, parts)
            factors = curvature.kfac, curvature.sample, parts.signals.curvature
            parts.store.run(parts.store.take_pass, context, *factors, rates, decays)
        return found


def _summed_loss(parts: Parts) -> Tensor:
    """The run's training loss so far; NaN where each process has a part of it."""
    total = parts.accumulators.summed_loss()
    return total if parts.processes.count == 1 else torch.full_like(total, torch.nan)


def _context(parts: Parts, recent: RecentBatches, config: RecordingConfig, owner: str) -> FitContext:
    """The trained model with the batches of the last pass over the rows.

    Raises:
        InfluenceError: If there are none.
    """
    training = parts.training
    if parts.processes.count > 1:
        raise InfluenceError("each process has a part of the rows only")
    batches = recent.batches()
    if recent.missing or training.loss is None or not batches:
        raise InfluenceError(recent.missing or "there is no loss to compute once more")
    return FitContext(
        training.module,
        parts.bound,
        DataSource(owner, training.loss),
        training.loss,
        training.to_device,
        training.context,
        layers=config.layers,
        owner=owner,
        recent=batches,
        rows_of=parts.capture.rows_of,
    )


def closing_pass(context: FitContext, parts: Parts, curvature: Curvature) -> OnePass:
    """The rows' shifts, and the queries' spread over trainings, at the module's present weights.

    Args:
        context: The model, its rows and queries.
        parts: The recording's: optimizer, schedule, initial weights.
        curvature: The Fisher at these weights.
    """
    signals = parts.signals
    for block in context.table:
        block.outputs = block.key in signals.outputs  # whose units are draws of the initial weights
    rates, decays = summed_of(context, parts)
    directions, initial, between = {}, *torch.zeros(2, len(context.queries), device=parts.device)
    v = context.query_gradients()
    with torch.no_grad():
        if signals.noise.random:
            for block, gradient, u in curvature.damped(v, rates, decays):
                initial += signals.noise.variance(block, u)
                removed = gradient - (1 + decays[block]) * u  # R F u
                between += (rates[block] * gradient * removed).flatten(1).sum(1)
                directions[block] = u * rates[block]
        else:
            directions = curvature.relatively_damped(v)
    found = _contract(context, parts, directions)
    sd, order = (x.cpu().double().numpy() for x in (initial.sqrt(), between.clamp_min(0)))
    return OnePass(found[..., 0], found[..., 1:], sd, order)


def summed_of(context: FitContext, parts: Parts) -> tuple[dict[Block, Tensor], dict[Block, Tensor]]:
    """What the run's rates sum up to for each block, by curvature (R) and by weight decay."""
    rates, decays = {}, {}
    for block in context.table:
        summed = summed_rates(parts.training.optimizer, parts.schedule.realised, block.parameters)
        rates[block], decays[block] = (torch.as_tensor(x, device=parts.device).float() for x in summed)
    return rates, decays


class Curvature:
    """The Fisher at the module's present weights: of all rows across layers, or of each layer as Kronecker factors.

    Args:
        rows: Number of rows N.
        max_dim: Sides of a layer larger than this have a diagonal covariance.
        device: Of the model.
        across: Whether anything across layers is wanted.
    """

    def __init__(self, rows: int, max_dim: int, device: torch.device, across: bool) -> None:
        self._rows, self.kfac = rows, KFAC(max_dim)
        self.sample = GradientSample((rows if rows <= EXACT else SAMPLE) if across else 0)
        self._alone = Lockstep(device, alone=True)
        self._open = False

    def observe(self, context: FitContext) -> bool:
        """Passes over rows with drawn labels. False if none can be drawn, and the rows' own labels are used."""
        some = None
        if self._rows > EXACT and context.recent is None:
            some = torch.randperm(self._rows, generator=torch.Generator().manual_seed(context.seed))[:MAX_ROWS].tolist()
        try:
            self._pass(context, PerSamplePass("sampled", some))
        except InfluenceError:
            if self._open:
                raise
            self._pass(context, PerSamplePass("true", some))
            return False
        return True

    def _pass(self, context: FitContext, what: PerSamplePass) -> None:
        seen, most = 0, self._rows if self._rows <= EXACT else MAX_ROWS
        for rows, gradients in context.per_sample(what):
            self._add(gradients, len(rows))
            seen += len(rows)
            if seen >= most:  # batches of the last pass over the rows come in random order
                break

    def _add(self, gradients: RowGradients, size: int) -> None:
        pairs = [(block, one) for block in gradients for one in gradients.grad_samples(block)]
        for block in gradients:
            block.reused |= len(gradients.grad_samples(block)) > 1
        if not self._open:
            self.sample.open(pairs, self._alone)
            self._open = True
        self.sample.select(size, gradients.terms, size)
        for block, one in pairs:
            self.kfac.observe(block, one, gradients.terms, size)
            self.sample.observe(block, one)
        self.sample.commit()
        self.kfac.end_step()

    def relatively_damped(self, v: dict[Block, Tensor]) -> dict[Block, Tensor]:
        """``(F + DAMPING mean(F))^-1 v`` by each layer's factors; takes the blocks out of ``v``.

        Fine-tuning moves the weights little: there 1/R would damp away the curvature, which is what ranks rows.
        """
        with self.kfac.decomposed(v):
            return {block: self.kfac.operator(block, relative(DAMPING)).apply(v.pop(block)) for block in list(v)}

    def damped(
        self, v: dict[Block, Tensor], rates: Mapping[Block, Tensor], decays: Mapping[Block, Tensor]
    ) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Blocks with their v and ``(1 + R F)^-1 v``; takes them out of ``v``, which is as large as the model."""
        whole = self.sample.damped(v, rates) if self.sample.rows >= self._rows else {}
        scale = 1.0 if len(whole) == len(v) else self.sample.curvature_scale(self.kfac, rates)
        with self.kfac.decomposed([block for block in v if block not in whole]):
            for block in list(v):
                vector = v.pop(block)
                if block in whole:
                    yield block, vector, whole.pop(block) / (1 + decays[block])
                else:
                    operator = self.kfac.operator(block, damped(rates[block] * scale, decays[block]))
                    yield block, vector, operator.apply(vector)


def _contract(context: FitContext, parts: Parts, directions: Mapping[Block, Tensor]) -> Floats:
    """Each row's inner products with the directions, and their contrasts [N, Q, 1 + J], divided by the rows seen.

    Of a row's part in its batch's gradient, times the batch's rows: a row that weighs more in the loss moves more.
    """
    contrasts, rows = parts.signals.contrasts, parts.accumulators.check.count
    out = torch.full((rows, len(context.queries), 1 + contrasts.count), torch.nan, device=parts.device)
    for which, gradients in context.per_sample():
        with torch.no_grad():
            found = [
                contrasts.of_queries(block, one.wide(), directions[block])
                for block in gradients
                if block in directions
                for one in gradients.grad_samples(block)
            ]
            out[which.to(out.device)] = (torch.stack(found).sum(0) * len(which)).to(out.dtype)
    shifts: Floats = out.double().cpu().numpy()
    return shifts / max(1, int(np.isfinite(shifts[:, 0, 0]).sum()))
