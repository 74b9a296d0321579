"""Folds draws into covariances, standard errors, tests and screens, keeping no draw of a row."""

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
from ine_callback.methods.bif.checks import Facts, checks
from ine_callback.methods.bif.locality import forgotten
from ine_callback.methods.bif.readout import Readout
from ine_callback.methods.bif.scores import attribution
from ine_callback.methods.bif.settings import BIF
from ine_callback.methods.bif.sgld import SGLD, Curved
from ine_callback.methods.bif.split_chains import join_chains
from ine_callback.scores import Attribution, Check, Floats, TokenScores
from ine_callback.stats.chains import fisher_z, paired_size
from ine_callback.stats.comoments import Comoments, Traces
from ine_callback.stats.hypothesis_tests import benjamini_hochberg

BLOCKS = 4  # parts of a chain whose scatter gives the standard error
_SMALLEST_BLOCK = 8
_HELD = 16  # draws that enter the covariances together: each entry is then touched once for so many


class Scatter:
    """Running mean and variance of equally weighted samples [n, R, Q]: what the blocks' covariances scatter by."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._squares = torch.zeros(())

    def add(self, samples: Tensor) -> None:
        """Takes n samples."""
        for sample in samples:
            self.count += 1
            apart = sample - self._mean
            self._mean = self._mean + apart / self.count
            self._squares = self._squares + apart * (sample - self._mean)

    @classmethod
    def joined(cls, parts: Sequence[Scatter], device: torch.device) -> Scatter:
        """The samples of several processes (Chan, Golub and LeVeque 1983)."""
        found = cls()
        for part in parts:
            mean, squares = part._mean.to(device), part._squares.to(device)
            total = found.count + part.count
            apart = mean - found._mean
            found._squares = found._squares + squares + apart**2 * (found.count * part.count / max(1, total))
            found._mean = found._mean + apart * (part.count / max(1, total))
            found.count = total
        return found

    def error(self) -> Tensor:
        """Standard error of the samples' mean [R, Q]; NaN with fewer than two."""
        if self.count < 2:
            return torch.full_like(self._squares, math.nan)
        return (self._squares / (self.count - 1) / self.count).sqrt()


class ChainStatistics:
    """Everything that is kept of the draws.

    Args:
        readout: Rows and queries.
        sampler: The chains' sampler.
        settings: Their settings.
    """

    def __init__(self, readout: Readout, sampler: SGLD, settings: BIF) -> None:
        self.readout, self.sampler, self.settings = readout, sampler, settings
        # without `reduced` the twin is only asked for its Laplace term, which no draw enters
        self.twins = settings.reduced and isinstance(sampler.coordinates, Curved)
        if isinstance(sampler.coordinates, Curved):
            readout.linearise()
        self._block = max(_SMALLEST_BLOCK, settings.draws // BLOCKS)
        self._plain, self._twin = Comoments(), Comoments()
        self._plain_block, self._twin_block = Comoments(), Comoments()
        self._plain_held: list[tuple[Tensor, Tensor]] = []
        self._twin_held: list[tuple[Tensor, Tensor]] = []
        self._plain_scatter, self._scatter, self._rows_scatter = Scatter(), Scatter(), Scatter()
        self._rows, self._queries = Traces(settings.draws), Traces(settings.draws)
        self._loss: list[Tensor] = []

    @property
    def draws(self) -> int:
        """Draws taken."""
        return self._rows.count

    def take(self, weights: Tensor, twin: Tensor | None, processes: Processes) -> bool:
        """Reads one draw: weights [C, P] and the twins' deviations [C, P].

        False: it was not finite, in this process or another, and is left out.
        """
        rows, queries = self.readout.rows(weights), self.readout.queries(weights)
        if not processes.all(bool(torch.isfinite(rows).all() & torch.isfinite(queries).all())):
            return False
        self._rows.update(rows)
        self._queries.update(queries)
        self._loss.append(rows[:, :: self.readout.width].mean(1).cpu())
        self._plain_held.append((rows, queries))
        if self.twins and twin is not None:
            self._twin_held.append((self.readout.row_changes(twin), self.readout.query_changes(twin)))
        if self._plain_block.count + len(self._plain_held) == self._block:
            self._close()
        elif len(self._plain_held) == _HELD:
            self._fold()
        return True

    def _fold(self) -> None:
        """Draws that were held enter the block."""
        for block, held in ((self._plain_block, self._plain_held), (self._twin_block, self._twin_held)):
            if held:
                block.update(*(torch.stack(values) for values in zip(*held, strict=True)))
                held.clear()

    def _close(self) -> None:
        """Ends a block: its covariances are one sample of the scatter for every independent chain."""
        self._fold()
        covariance = self._plain_block.covariance()
        self._plain_scatter.add(self._independent(covariance))
        if self.twins:
            covariance = covariance - self._twin_block.covariance()
            self._scatter.add(self._independent(covariance))
        self._rows_scatter.add(self._independent(self._apart(covariance)))
        self._merge()

    def _merge(self) -> None:
        self._fold()
        self._plain.merge(self._plain_block)
        self._twin.merge(self._twin_block)
        self._plain_block, self._twin_block = Comoments(), Comoments()

    def _independent(self, covariance: Tensor) -> Tensor:
        """Mirrored chains [C, R, Q] averaged to their pairs [C/2, R, Q]."""
        return covariance.unflatten(0, (2, -1)).mean(0) if self.sampler.antithetic else covariance

    def gather(self, processes: Processes) -> None:
        """Takes in the chains of the other processes."""
        self._merge()
        if processes.count == 1:
            return
        kept = ("_plain", "_twin", "_rows", "_queries", "_plain_scatter", "_scatter", "_rows_scatter", "_loss")
        parts = processes.gather({name: getattr(self, name) for name in kept})
        device = self.readout.flat.weights.device

        def join(tensors: Sequence[Tensor]) -> Tensor:
            return join_chains(tensors, self.sampler.antithetic, device)

        for name in kept[:4]:
            setattr(self, name, type(getattr(self, name)).joined([part[name] for part in parts], join))
        for name in kept[4:7]:
            setattr(self, name, Scatter.joined([part[name] for part in parts], device))
        self._loss = [join(draw).cpu() for draw in zip(*(part["_loss"] for part in parts), strict=True)]

    # -- the end ------------------------------------------------------------------------------------------------------

    def finish(
        self,
        rows: NDArray[np.int64],
        facts: Facts,
        settings: dict[str, Any],
        described: dict[str, Any],
    ) -> Attribution:
        """The scores.

        Args:
            rows: Dataset index of every row [R].
            facts: What the posterior knows.
            settings: As used.
            described: Further arguments of :func:`.scores.attribution`.
        """
        found, tokens = self._estimates()
        loss = torch.stack(self._loss, 1).double().numpy()
        checks = self._checks(found, loss, facts)
        return attribution(
            rows=rows,
            queries=self.readout.infos,
            trend=_array(self._trend().mean(0)),
            effective_draws=self._sizes(self.readout.width).sum(0),
            row_sd=_array(self._rows.variance().mean(0).sqrt()[:: self.readout.width]),
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
            laplace = self.readout.covariance(self.sampler.coordinates, self.sampler.law)
        if self.twins:
            # the Laplace term is the twins' true covariance, not that of a sample of so many draws: so the bias that
            # comes from taking off the sample's own means cancels to first order too
            scores = plain - (self._twin.covariance().mean(0) - laplace)
            se = self._error(self._scatter, self._plain.covariance() - self._twin.covariance())
        found = {"scores": scores, "se": se, "plain": plain, "plain_se": plain_se, "laplace": laplace}
        width = self.readout.width
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

        Blocks are many, so each cell's error is known; but neighbours in a slow chain are alike. Chains are independent
        but few, so of them only the mean over all cells is used.
        """
        error = blocks.error()
        chains = self._independent(chains)
        if len(chains) < 2 or not bool(torch.isfinite(error).all()):
            return chains.std(0) / len(chains) ** 0.5 if len(chains) > 1 else error
        between = (chains.var(0) / len(chains)).mean().sqrt()
        return error * (between / error.square().mean().sqrt().clamp_min(1e-30)).clamp_min(1)

    def _p(self, scores: Tensor, se: Tensor) -> Floats:
        """Fisher's z over the chains; for the reduced estimator, no correlation, Student's t over the blocks."""
        if self.twins:
            t = _array(torch.where((scores == 0) & (se == 0), 0.0, scores / se))  # a row whose loss never moves
            return np.asarray(2 * special.stdtr(max(1, self._scatter.count - 1), -np.abs(t)), dtype=np.float64)
        scale = self._rows.variance().sqrt()[:, :, None] * self._queries.variance().sqrt()[:, None, :]
        correlation = _array(self._plain.covariance() / scale.clamp_min(torch.finfo(scale.dtype).tiny))
        return fisher_z(correlation, self._sizes(1))

    def _sizes(self, every: int) -> Floats:
        """Effective draws of each chain for each query and every so manieth value of the lines [C, -1, Q]."""
        rows = _array(self._rows.autocorrelation()[:, ::every])
        return paired_size(self.draws, rows[:, :, None], _array(self._queries.autocorrelation())[:, None, :])

    def _trend(self) -> Tensor:
        """What loss and query have in common by drifting with the draw index [C, R, Q]."""
        return self._rows.trend()[:, :: self.readout.width, None] * self._queries.trend()[:, None, :]

    def _survives(self) -> float:
        """Share of the absolute covariances that is left when both series lose their linear trend."""
        covariance = self._plain.covariance()[:, :: self.readout.width]
        whole = float(covariance.mean(0).abs().sum())
        return float((covariance - self._trend()).mean(0).abs().sum()) / whole if whole > 0 else math.nan

    def _apart(self, covariance: Tensor) -> Tensor:
        """Rows' covariances [C, R, Q] without what all rows have in common, which ranks none; of lines [C, -1, Q]."""
        of_rows = covariance[:, :: self.readout.width]
        return of_rows - of_rows.mean(1, keepdim=True)

    def _checks(self, found: dict[str, Floats], loss: Floats, facts: Facts) -> list[Check]:
        covariance = self._plain.covariance() - (self._twin.covariance() if self.twins else 0)
        noise = _array(self._error(self._rows_scatter, self._apart(covariance)))
        lost = forgotten(float(loss.mean()), *self.readout.trained_and_blank())
        return checks(self.settings.draws, found["scores"], noise, self._survives(), lost, loss, facts)


def _array(tensor: Tensor) -> Floats:
    return tensor.detach().cpu().double().numpy()
