"""Turns draws into covariances, standard errors, tests and checks, without storing the draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from ine_callback.distributed.processes import Processes
from ine_callback.methods.bif.checks import PosteriorFacts, checks
from ine_callback.methods.bif.evaluation import DrawEvaluator
from ine_callback.methods.bif.localization import learning_lost
from ine_callback.methods.bif.scores import attribution
from ine_callback.methods.bif.settings import BIFSettings
from ine_callback.methods.bif.sgld import SGLD, Curved
from ine_callback.methods.bif.split_chains import join_chains
from ine_callback.scores import Attribution, Check, Floats, TokenScores
from ine_callback.stats.chains import fisher_z, paired_size
from ine_callback.stats.comoments import Comoments, Traces
from ine_callback.stats.hypothesis_tests import benjamini_hochberg

BLOCKS = 4  # parts of a chain whose scatter gives the standard error
_MIN_BLOCK = 8  # draws
_BATCH = 16  # draws that update the covariances together, which saves passes over memory


class Scatter:
    """Running mean and variance of equally weighted samples [n, R, Q]: for the scatter of the blocks' covariances."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._squares = torch.zeros(())

    def add(self, samples: Tensor) -> None:
        """Adds n samples."""
        for sample in samples:
            self.count += 1
            difference = sample - self._mean
            self._mean = self._mean + difference / self.count
            self._squares = self._squares + difference * (sample - self._mean)

    @classmethod
    def joined(cls, parts: Sequence[Scatter], device: torch.device) -> Scatter:
        """The samples of several processes (Chan, Golub and LeVeque 1983)."""
        found = cls()
        for part in parts:
            mean, squares = part._mean.to(device), part._squares.to(device)
            total = found.count + part.count
            difference = mean - found._mean
            found._squares = found._squares + squares + difference**2 * (found.count * part.count / max(1, total))
            found._mean = found._mean + difference * (part.count / max(1, total))
            found.count = total
        return found

    def error(self) -> Tensor:
        """Standard error of the samples' mean [R, Q]; NaN with fewer than two."""
        if self.count < 2:
            return torch.full_like(self._squares, math.nan)
        return (self._squares / (self.count - 1) / self.count).sqrt()


class ChainStatistics:
    """Running statistics of the draws, and the scores that follow from them.

    Args:
        evaluator: Evaluates rows and queries.
        sampler: The chains' sampler.
        settings: The settings.
    """

    def __init__(self, evaluator: DrawEvaluator, sampler: SGLD, settings: BIFSettings) -> None:
        self.evaluator, self.sampler, self.settings = evaluator, sampler, settings
        # without `reduced` only the Laplace term is used, which needs no draw
        self.control_variates = settings.reduced and isinstance(sampler.coordinates, Curved)
        if isinstance(sampler.coordinates, Curved):
            evaluator.linearise()
        self._block = max(_MIN_BLOCK, settings.draws // BLOCKS)
        self._plain, self._control = Comoments(), Comoments()
        self._plain_block, self._control_block = Comoments(), Comoments()
        self._plain_batch: list[tuple[Tensor, Tensor]] = []
        self._control_batch: list[tuple[Tensor, Tensor]] = []
        self._plain_scatter, self._scatter, self._rows_scatter = Scatter(), Scatter(), Scatter()
        self._rows, self._queries = Traces(settings.draws), Traces(settings.draws)
        self._loss: list[Tensor] = []

    @property
    def draws(self) -> int:
        """Number of draws taken."""
        return self._rows.count

    def take(self, weights: Tensor, control_variate: Tensor | None, processes: Processes) -> bool:
        """Takes one draw: weights [C, P], and deviations [C, P] of the control-variate chains.

        Returns:
            False if losses or queries are not finite, in this process or another; the draw is then left out.
        """
        rows, queries = self.evaluator.rows(weights), self.evaluator.queries(weights)
        if not processes.all(bool(torch.isfinite(rows).all() & torch.isfinite(queries).all())):
            return False
        self._rows.update(rows)
        self._queries.update(queries)
        self._loss.append(rows[:, :: self.evaluator.width].mean(1).cpu())
        self._plain_batch.append((rows, queries))
        if self.control_variates and control_variate is not None:
            changes = (self.evaluator.row_changes(control_variate), self.evaluator.query_changes(control_variate))
            self._control_batch.append(changes)
        if self._plain_block.count + len(self._plain_batch) == self._block:
            self._end_block()
        elif len(self._plain_batch) == _BATCH:
            self._update_blocks()
        return True

    def _update_blocks(self) -> None:
        """Updates the blocks with the draws of the batch."""
        for block, batch in ((self._plain_block, self._plain_batch), (self._control_block, self._control_batch)):
            if batch:
                block.update(*(torch.stack(values) for values in zip(*batch, strict=True)))
                batch.clear()

    def _end_block(self) -> None:
        """Ends a block: the covariance of each independent chain in it is one sample of the scatter."""
        self._update_blocks()
        covariance = self._plain_block.covariance()
        self._plain_scatter.add(self._independent(covariance))
        if self.control_variates:
            covariance = covariance - self._control_block.covariance()
            self._scatter.add(self._independent(covariance))
        self._rows_scatter.add(self._independent(self._centred(covariance)))
        self._merge()

    def _merge(self) -> None:
        self._update_blocks()
        self._plain.merge(self._plain_block)
        self._control.merge(self._control_block)
        self._plain_block, self._control_block = Comoments(), Comoments()

    def _independent(self, covariance: Tensor) -> Tensor:
        """Averages mirrored chains [C, R, Q] over their pairs [C/2, R, Q]."""
        return covariance.unflatten(0, (2, -1)).mean(0) if self.sampler.antithetic else covariance

    def gather(self, processes: Processes) -> None:
        """Adds the chains of the other processes."""
        self._merge()
        if processes.count == 1:
            return
        gathered = ("_plain", "_control", "_rows", "_queries", "_plain_scatter", "_scatter", "_rows_scatter", "_loss")
        parts = processes.gather({name: getattr(self, name) for name in gathered})
        device = self.evaluator.flat.weights.device

        def join(tensors: Sequence[Tensor]) -> Tensor:
            return join_chains(tensors, self.sampler.antithetic, device)

        for name in gathered[:4]:
            setattr(self, name, type(getattr(self, name)).joined([part[name] for part in parts], join))
        for name in gathered[4:7]:
            setattr(self, name, Scatter.joined([part[name] for part in parts], device))
        self._loss = [join(draw).cpu() for draw in zip(*(part["_loss"] for part in parts), strict=True)]

    # -- the scores ---------------------------------------------------------------------------------------------------

    def attribution(
        self,
        rows: NDArray[np.int64],
        facts: PosteriorFacts,
        settings: dict[str, Any],
        described: dict[str, Any],
    ) -> Attribution:
        """The scores.

        Args:
            rows: Dataset index of every row [R].
            facts: What the posterior says about the chains.
            settings: The settings as used.
            described: Further arguments of :func:`.scores.attribution`.
        """
        found, tokens = self._estimates()
        loss = torch.stack(self._loss, 1).double().numpy()
        checks = self._checks(found, loss, facts)
        return attribution(
            rows=rows,
            queries=self.evaluator.infos,
            trend=_array(self._trend().mean(0)),
            effective_draws=self._sizes(self.evaluator.width).sum(0),
            row_sd=_array(self._rows.variance().mean(0).sqrt()[:: self.evaluator.width]),
            query_sd=_array(self._queries.variance().mean(0).sqrt()),
            loss=loss,
            checks=tuple(checks),
            settings=settings,
            tokens=tokens,
            **described,
            **found,
        )

    def _estimates(self) -> tuple[dict[str, Any], TokenScores | None]:
        """Covariances, errors and tests of the rows [R, Q], and of their terms."""
        plain = self._plain.covariance().mean(0)
        laplace = torch.full_like(plain, math.nan)
        scores = plain
        se = plain_se = self._error(self._plain_scatter, self._plain.covariance())
        if isinstance(self.sampler.coordinates, Curved):
            laplace = self.evaluator.covariance(self.sampler.coordinates, self.sampler.law)
        if self.control_variates:
            # the Laplace term is the true covariance, not the expected one of a sample: so the bias that comes from
            # subtracting sample means cancels to first order too
            scores = plain - (self._control.covariance().mean(0) - laplace)
            se = self._error(self._scatter, self._plain.covariance() - self._control.covariance())
        found = {"scores": scores, "se": se, "plain": plain, "plain_se": plain_se, "laplace": laplace}
        width = self.evaluator.width
        lines = {k: _array(value.unflatten(0, (-1, width))) for k, value in found.items()}
        lines["p"] = self._p(scores, se).reshape(lines["se"].shape)
        of_rows = {k: value[:, 0] for k, value in lines.items()}
        of_rows["q"] = benjamini_hochberg(of_rows["p"])
        if width == 1:
            return of_rows, None
        p = lines["p"][:, 1:]
        q = benjamini_hochberg(p.reshape(-1, p.shape[2])).reshape(p.shape)
        flat = (x.reshape(-1, p.shape[2]) for x in (lines["scores"][:, 1:], lines["se"][:, 1:], q))
        return of_rows, TokenScores(np.arange(len(p) + 1) * (width - 1), *flat)

    def _error(self, blocks: Scatter, chains: Tensor) -> Tensor:
        """Standard errors by the blocks' scatter, enlarged where whole chains [C, R, Q] scatter more.

        There are many blocks, so each entry has an error; but neighbouring blocks of a slow chain are alike. Chains are
        independent but few, so only the mean over all entries is used of their scatter.
        """
        error = blocks.error()
        chains = self._independent(chains)
        if len(chains) < 2 or not bool(torch.isfinite(error).all()):
            return chains.std(0) / len(chains) ** 0.5 if len(chains) > 1 else error.expand_as(chains[0])
        between = (chains.var(0) / len(chains)).mean().sqrt()
        return error * (between / error.square().mean().sqrt().clamp_min(1e-30)).clamp_min(1)

    def _p(self, scores: Tensor, se: Tensor) -> Floats:
        """Student's t over the blocks with control variates; else Fisher's z of the chains' correlations."""
        if self.control_variates:
            t = _array(torch.where((scores == 0) & (se == 0), 0.0, scores / se))  # a row whose loss is constant
            return np.asarray(2 * special.stdtr(max(1, self._scatter.count - 1), -np.abs(t)), dtype=np.float64)
        scale = self._rows.variance().sqrt()[:, :, None] * self._queries.variance().sqrt()[:, None, :]
        correlation = _array(self._plain.covariance() / scale.clamp_min(torch.finfo(scale.dtype).tiny))
        return fisher_z(correlation, self._sizes(1))

    def _sizes(self, every: int) -> Floats:
        """Effective draws of each chain for each query and every ``every``-th value of the lines [C, -1, Q]."""
        rows = _array(self._rows.autocorrelation()[:, ::every])
        return paired_size(self.draws, rows[:, :, None], _array(self._queries.autocorrelation())[:, None, :])

    def _trend(self) -> Tensor:
        """Covariance of the linear trends of loss and query over the draws [C, R, Q]."""
        return self._rows.trend()[:, :: self.evaluator.width, None] * self._queries.trend()[:, None, :]

    def _untrended(self) -> float:
        """Fraction of the absolute covariances that is left when both series lose their linear trend."""
        covariance = self._plain.covariance()[:, :: self.evaluator.width]
        whole = float(covariance.mean(0).abs().sum())
        return float((covariance - self._trend()).mean(0).abs().sum()) / whole if whole > 0 else math.nan

    def _centred(self, covariance: Tensor) -> Tensor:
        """Rows' covariances [C, R, Q] less their mean over rows, which changes no rank; from lines [C, -1, Q]."""
        of_rows = covariance[:, :: self.evaluator.width]
        return of_rows - of_rows.mean(1, keepdim=True)

    def _checks(self, found: dict[str, Floats], loss: Floats, facts: PosteriorFacts) -> list[Check]:
        covariance = self._plain.covariance() - (self._control.covariance() if self.control_variates else 0)
        noise = _array(self._error(self._rows_scatter, self._centred(covariance)))
        lost = learning_lost(float(loss.mean()), *self.evaluator.trained_and_blank())
        return checks(self.settings.draws, found["scores"], noise, self._untrended(), lost, loss, facts)


def _array(tensor: Tensor) -> Floats:
    return tensor.detach().cpu().double().numpy()
