"""f-INE in one run: each row's shift of the query, in units of training randomness (arXiv 2510.10510).

At a step with rows [b], signals c [b, Q] (of the rows' gradient contributions) and rate r,

    d_i  = r (c_i - mean of the others) / u   shift of the query if row i is drawn rather than one of its batch-mates
    w    = r^2 b Var(c) / u^2                 variance of the query's change over the draw of the batch
    mu_i = sum d_i / sqrt(1 + dispersion x sum w)             sums over the row's steps and over all steps

in units u of what random initial weights leave in the query. The dispersion (variance / mean of the rows' numbers of
observations) is 0 where a loader shuffles. Without random initial weights mu = sum d_i / sqrt(sum w).

The query falls by ``r c_i`` to first order, so **mu > 0: training on the row lowers the query (helpful)**. Rows add up:
the mu of a group is the sum of its rows' mu. The mean is over the other rows of the batch, for the alternative to row i
is not itself: centring on the whole batch's mean would shrink mu by (1 - 1/b), half of it at b = 2.

**Self-influence** has no common query: c_i is along the row's own direction, positive, and larger at some steps than at
others for all rows. So each step is measured in units of its rows' mean m, and the mean ratio is multiplied by the sum
of m over the row's steps (its profile):

    d_i  = (r c_i / u_i) / m - mean of the others;  mu_i = (mean of d_i over the K steps) x sum m

the shift of the row's own loss relative to that of an average row (which :meth:`FINE.notes` reports). The sum of
r c_i / u_i itself is dominated by the earliest steps, which separate rows worst: Spearman against leaving single rows
out .72 instead of .80 under AdamW on G1 (``python -m benchmarks.fidelity``).

**se** is over training runs: where initial weights are random, the root mean square of the row's contrasts (its shift
with Rademacher signs on each layer's units, :mod:`ine_callback.scoring.sign_contrasts`), shrunk to the other rows'. The
scatter of its steps alone would leave out what lasts through one training and differs in the next. With ``fixed``
weights only the scatter of the steps is used.

Tests, always of the row's shift, whichever estimator gives ``mu``:

* **p**: every step's d is also randomly permuted among the batch's rows. Permuted shifts are draws from "the row is
  exchangeable with its batch-mates". Real and permuted shifts are divided by sqrt(V_i); V_i sums sigma^2 =
  r^2 ss / b over the row's steps (ss: the step's sum of squares about the mean), the exact variance of a permuted d.
  The permuted ones are pooled over rows.
* **t**: regress the standardised z = d / sigma of the row's K steps on sigma. The slope is sum d / V_i; the residual
  variance (sum z^2 - (sum d)^2 / V_i) / (K - 1) is the row's scale relative to its batch-mates, shrunk to the other
  rows' as limma does. This t is exact for Gaussian z however sigma changes over the run. The t of raw d is not: with d
  growing e^4-fold (e^8-fold) in a simulation it rejects 2.7 % (1.3 %) of true nulls at level 5 %, ours 5.1 % (4.9 %).
  Heavy tails (Student t3) bring ours to 3.5-6.0 % at level 5 % and up to 1.5 % at level 0.5 %: trust p in the far tail.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ine_callback.curvature.sketch import HALVES
from ine_callback.methods.base import Method, host
from ine_callback.methods.closing import Closing
from ine_callback.methods.fine import estimators, sketch_noise
from ine_callback.methods.fine.between_runs import between_runs
from ine_callback.methods.fine.closing import mu_of, unreliable
from ine_callback.methods.fine.null import add_permuted, enlarged, null_size, spread, standardised
from ine_callback.methods.fine.step import step_of
from ine_callback.scores import Floats, QueryInfo, Scores
from ine_callback.stats import hypothesis_tests as tests

Estimator = Literal["gaussian", "auc", "max_threshold"]

MAX_REPORTED_DRAWS = 10_000  # null draws per query in the report

PER_ROW = ("shift", "contrast", "halves", "scatter", "variance", "profile", "observations", "informative", "histogram")


class FINE(Method):
    """f-INE scores from one run; ``mu > 0`` means that training on the row lowers the query (helpful).

    State: 28 N Q bytes (16 of them for contrasts), at most about 2**17 Q null draws (4 bytes each), and 256 N Q bytes
    of histograms for ``auc`` and ``max_threshold``. A row that appears twice in a step (padding samplers) counts twice.
    Steps with a single row or rate 0 count as observations and carry no information; so does a non-finite signal, which
    is set to its batch's mean and counted in :attr:`nonfinite`. A query whose signals never vary has no scale: its mu
    is NaN. ``t``, ``p_t`` and ``se`` need two informative steps of the row: a prior alone is no test.

    Args:
        estimator: ``gaussian``: as above, the default. ``auc`` and ``max_threshold`` follow the paper:
            they compare the whole step's predicted decrease of the query, less its recent trend ("difference in
            differences") and in units of sqrt(w), between steps with and without the row. They see a row through the
            noise of its b - 1 batch-mates (standard error sqrt(b) times larger) and ``max_threshold`` is biased away
            from zero. Their mu per step is put on the common scale, the sum over the row's n of T steps, as
            ``n / sqrt(T) mu_step``; a test that sees all n steps apart reaches ``sqrt(n) mu_step`` (paper, Cor. 2.7),
            never less (Cauchy-Schwarz). ``se`` and ``null_sd`` are the large-sample error of ``auc``, and NaN for
            ``max_threshold``, which has none.
        null_draws: Permutations per step. Large runs lower them to no less than 2, then have a null for every k-th row
            only, so that there are at most about 2**17 null draws per query.
        seed: Seed of the private generator of the permutations; the global random state is never touched.

    Example:
        >>> info = QueryInfo("val", "loss", "Does training on the row lower the validation loss?")
        >>> fine = FINE()
        >>> fine.start(rows=3, queries=(info,), device=torch.device("cpu"))
        >>> fine.update(torch.tensor([0, 1]), torch.tensor([[3.0], [1.0]]), rate=0.1)
        >>> fine.update(torch.tensor([0, 2]), torch.tensor([[2.0], [0.0]]), rate=0.1)
        >>> fine.compute().mu.round(3).ravel().tolist()  # row 0 helped twice
        [1.414, -0.707, -0.707]
    """

    def __init__(
        self, estimator: Estimator = "gaussian", null_draws: int = 20, seed: int = 0, closing: bool = True
    ) -> None:
        if estimator not in get_args(Estimator):
            raise ValueError(f"FINE(estimator={estimator!r}): choose one of {', '.join(get_args(Estimator))}")
        if null_draws < 1:
            raise ValueError(f"FINE(null_draws={null_draws}): p-values need at least 1 draw; 20 is a good number")
        if not 0 <= seed < 2**63:
            raise ValueError(f"FINE(seed={seed}): choose a seed in 0 .. 2**63 - 1")
        self.estimator: Estimator = estimator
        self.null_draws = null_draws
        self.seed = seed
        self.closing = closing
        self._closing: Closing | None = None
        self._queries: tuple[QueryInfo, ...] = ()
        self._state: dict[str, Tensor] = {}

    @property
    def nonfinite(self) -> Tensor:
        """Number of signals left out as non-finite (or beyond 1e15 in size, times the rate) per query [Q], int64."""
        return self._started("nonfinite")["nonfinite"]

    def start(
        self,
        rows: int,
        queries: tuple[QueryInfo, ...],
        device: torch.device,
        random_weights: bool = False,
        contrasts: int = 0,
    ) -> None:
        """Allocates the state; see :class:`~ine_callback.methods.base.Method`."""
        if not queries:
            raise ValueError("FINE.start: queries is empty; give at least one query")
        self._queries, self._rows, self._steps, self._closing = queries, rows, 0, None
        self._draws, self._stride = null_size(rows, self.null_draws, 1)
        self._generator = torch.Generator(device).manual_seed(self.seed)
        q = len(queries)
        self._state = {name: torch.zeros(rows, q, device=device) for name in ("shift", "scatter", "variance")}
        self._state["contrast"] = torch.zeros(rows, q, contrasts, device=device)
        for name in ("observations", "informative"):
            self._state[name] = torch.zeros(rows, dtype=torch.int64, device=device)
        self._state["noise"] = torch.zeros(q, device=device)
        self._random_weights = random_weights
        self_columns = [k for k, query in enumerate(queries) if query.kind == "self"]
        self._self_columns = torch.tensor(self_columns, dtype=torch.int64, device=device)
        self._of_self = torch.tensor([query.kind == "self" for query in queries], device=device)
        self._state["profile"] = torch.zeros(rows, len(self_columns), device=device)
        self._state["halves"] = torch.zeros(rows, len(self_columns), HALVES, device=device)
        self._state["nonfinite"] = torch.zeros(q, dtype=torch.int64, device=device)
        # Draw 0 is held out for the check of the null. The last row collects the shifts of rows without a null.
        self._state["null"] = torch.zeros(-(-rows // self._stride) + 1, self._draws + 1, q, device=device)
        if self.estimator != "gaussian":
            self._state |= estimators.start(rows, q, device)

    @torch.no_grad()
    def update(
        self,
        rows: Tensor,
        signals: Tensor,
        rate: float,
        unit: Tensor | None = None,
        contrasts: Tensor | None = None,
        halves: Tensor | None = None,
    ) -> None:
        """Takes one optimizer step; see :class:`~ine_callback.methods.base.Method`."""
        state = self._started("update")
        if rows.ndim != 1 or signals.shape != (rows.shape[0], len(self._queries)):
            raise ValueError(
                f"FINE.update: rows {tuple(rows.shape)} and signals {tuple(signals.shape)} must be [b] and "
                f"[b, {len(self._queries)}]"
            )
        if not math.isfinite(rate):
            raise ValueError(f"FINE.update: rate={rate} must be finite; skip a step that was not applied")
        rows = rows.to(torch.int64)
        once = torch.ones_like(rows)
        state["observations"].index_add_(0, rows, once)
        factor = torch.full_like(signals, rate, dtype=torch.float32) if unit is None else rate / unit.float()
        has_sketch = halves is not None and len(self._self_columns) > 0
        step = step_of(signals, factor, self._of_self, contrasts, halves if has_sketch else None)
        state["nonfinite"] += step.lost
        if rows.shape[0] < 2 or rate == 0.0:
            return
        for name, added in (
            ("informative", once),
            ("shift", step.d),
            ("scatter", step.z.square()),
            ("variance", step.variance.expand_as(step.d)),
        ):
            state[name].index_add_(0, rows, added)
        add_permuted(state["null"], rows, step.d, self._stride, self._generator)
        if step.contrasts is not None:
            state["contrast"].index_add_(0, rows, step.contrasts)
        if len(self._self_columns):
            level = step.level[self._self_columns]
            state["profile"].index_add_(0, rows, level.expand(rows.shape[0], -1))
            if step.halves is not None:
                state["halves"].index_add_(0, rows, step.halves.index_select(1, self._self_columns))
        state["noise"] += step.noise
        self._steps += 1
        if self.estimator != "gaussian":
            estimators.update(state, rows, step.total, step.noise, self._steps - 1)

    def compute(self) -> Scores:
        """Returns the scores so far, ``mean_loss`` all NaN (the recorder knows it); training may go on."""
        state = self._started("compute")
        observations = state["observations"].cpu().numpy().astype(np.int64)
        seen = state["informative"].cpu().numpy() > 0  # a row alone in all of its steps was compared with no other
        shift, scatter, variance = (host(state[name]) for name in ("shift", "scatter", "variance"))
        for array in (shift, scatter, variance):
            array[~seen] = np.nan
        noise = host(state["noise"])
        df = state["informative"].cpu().numpy() - 1.0
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = self._scale(noise, observations)
            z = shift / np.where(variance > 0, np.sqrt(variance), np.nan)
            residual = np.maximum(scatter - z**2, 0.0) / np.where(df > 0, df, np.nan)[:, None]
        p, t, p_t, se = (np.full_like(z, np.nan) for _ in range(4))
        nulls, null_ks_p = [], np.full(len(self._queries), np.nan)
        for k in range(len(self._queries)):
            draws, held_out = standardised(state["null"], k, self._stride, seen, variance[:, k])
            known = int(np.isfinite(draws).sum())
            p[:, k] = tests.permutation_p(z[:, k], draws) if known else np.nan
            null_ks_p[k] = tests.uniformity_p(tests.permutation_p(held_out, draws), known)
            v = np.where(variance[:, k] > 0, variance[:, k], np.nan)
            fit = tests.moderated_t(shift[:, k], residual[:, k], df, v)
            t[:, k], p_t[:, k] = fit.t, fit.p
            error = self._sketch_error(k)
            se[:, k] = np.sqrt(between_runs(fit.variance * v, host(state["contrast"][:, k])) + error) * scale[:, k]
            nulls.append(draws.ravel()[spread(draws.size, MAX_REPORTED_DRAWS)])
        null_sd = np.sqrt(variance) * scale
        mu = shift * scale
        ruled = self._sketch_noise(scale) >= sketch_noise.REFUSED
        mu[:, ruled], se[:, ruled] = np.nan, np.nan
        unit, query_loss = (np.full(len(self._queries), np.nan) for _ in range(2))
        if self._closing is not None:
            columns = self._on_data()
            run = mu[:, columns], se[:, columns]
            mu[:, columns], se[:, columns], unit[columns] = mu_of(self._closing, observations, *run)
            query_loss[columns] = self._closing.losses
        if self.estimator != "gaussian":
            mu, se = estimators.compute(state, self.estimator)
            mu[~seen], se[~seen] = np.nan, np.nan
            null_sd = se.copy()
        return Scores(
            queries=self._queries,
            mu=mu,
            se=se,
            p=p,
            q=tests.benjamini_hochberg(p),
            t=t,
            p_t=p_t,
            null_sd=null_sd,
            observations=observations,
            mean_loss=np.full(self._rows, np.nan),
            null_mu=np.stack(nulls),
            null_ks_p=null_ks_p,
            unit=unit,
            query_loss=query_loss,
        )

    def _sketch_error(self, column: int) -> Floats:
        """Variance [N] of the error that sketches leave in the shifts of a query; 0 but for self-influence."""
        found = [self._state["halves"][:, place] for place, k in enumerate(self._self_columns.tolist()) if k == column]
        return sketch_noise.error_variance(host(found[0]), host(self._state["informative"])) if found else np.zeros(1)

    def _sketch_noise(self, scale: Floats) -> Floats:
        """The fraction of each query's scores [Q] that is noise of sketches."""
        shift = host(self._state["shift"])
        columns = range(len(self._queries))
        return np.array([sketch_noise.fraction(self._sketch_error(k), shift[:, k], scale[:, k]) for k in columns])

    @property
    def wants_closing(self) -> bool:  # type: ignore[override]  # of the class for other methods
        """Whether mu is made of a closing pass."""
        return self.closing and self.estimator == "gaussian"

    def close(self, closing: Closing) -> None:
        """Takes the shifts that mu is made of; the tests stay those of the run."""
        self._closing = closing

    def _on_data(self) -> list[int]:
        return [k for k, query in enumerate(self._queries) if query.kind != "self"]

    def _scale(self, noise: Floats, observations: NDArray[np.int64]) -> Floats:
        """Returns what turns a row's shift into its mu [N, Q]; NaN for a query whose signals never varied.

        ``noise`` assumes independent draws of the batches. Where the initial weights are random, it is multiplied by
        the rows' index of dispersion (variance of the number of observations over its mean, at most 1): a loader that
        shuffles uses all rows equally often, and the effect of the order alone is then a tenth of that of the initial
        weights (docs/methods/fine.md). For self-influence it is 0: the scatter of the rows' signals is not the noise of
        a row's own loss.
        """
        self_columns = self._self_columns.cpu().numpy()
        counts = np.trim_zeros(observations, "b")  # without the places reserved for rows to come
        dispersion = np.full(len(noise), min(1.0, float(counts.var() / counts.mean())) if counts.size else 0.0)
        dispersion[self_columns] = 0.0
        randomness = 1.0 + dispersion * noise if self._random_weights else noise
        scale = np.tile(np.where(noise > 0, 1 / np.sqrt(randomness), np.nan), (self._rows, 1))
        scale[:, self_columns] *= host(self._state["profile"]) / host(self._state["informative"])[:, None]
        return scale

    def notes(self) -> list[str]:
        """Whether sizes can be believed, and the average self-influence, of which scores are differences."""
        size = [] if self._closing is None else unreliable(self._closing)
        return [*size, *self._self_notes()]

    def _self_notes(self) -> list[str]:
        if not len(self._self_columns) or self.estimator != "gaussian":
            return []
        state = self._started("notes")
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = self._scale(host(state["noise"]), state["observations"].cpu().numpy())
        told, profile = sketch_noise.notes(self._sketch_noise(scale)), host(state["profile"])
        if not self._random_weights or not profile.any():
            return told
        average = profile[profile > 0].mean()
        return [
            *told,
            f"self-influence: an average row lowers its own loss by {average:.2g} standard deviations of training "
            "randomness; scores are differences to that",
        ]

    def grow(self, rows: int) -> None:
        """Enlarges the state to ``rows`` rows; a null that becomes too large loses draws, then rows."""
        state = self._started("grow")
        if rows <= self._rows:
            return
        for name in PER_ROW:
            if name in state:
                state[name] = enlarged(state[name], rows)
        draws, stride = null_size(rows, self._draws, self._stride)
        retained = state["null"][:-1][:: stride // self._stride, : draws + 1]
        state["null"] = enlarged(retained, -(-rows // stride) + 1)
        self._rows, self._draws, self._stride = rows, draws, stride

    def state_dict(self) -> dict[str, Any]:
        """Returns a snapshot: copies of the tensors, and primitives."""
        tensors = {name: value.clone() for name, value in self._started("state_dict").items()}
        return {
            **tensors,
            "generator": self._generator.get_state(),
            "estimator": self.estimator,
            "queries": [query.name for query in self._queries],
            "steps": self._steps,
            "draws": self._draws,
            "stride": self._stride,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a snapshot after :meth:`start`; updates continue bit-identically on the same kind of device.

        A snapshot from another kind of device restarts the permutations from a fresh seed: still random, not identical.
        """
        fresh = self._started("load_state_dict")
        names = [query.name for query in self._queries]
        if state["queries"] != names or state["estimator"] != self.estimator:
            raise ValueError(
                f"FINE.load_state_dict: the checkpoint holds estimator={state['estimator']!r} and queries "
                f"{state['queries']}, this run has {self.estimator!r} and {names}; resume with the same settings"
            )
        rows, device = self._rows, fresh["noise"].device
        self._state = {name: state.get(name, value).to(device, copy=True) for name, value in fresh.items()}
        self._rows = self._state["shift"].shape[0]
        self._steps, self._draws, self._stride = int(state["steps"]), int(state["draws"]), int(state["stride"])
        saved = state["generator"].cpu()
        if saved.shape == self._generator.get_state().shape:
            self._generator.set_state(saved)
        else:
            self._generator.manual_seed((self.seed + 1 + self._steps) % 2**63)
        self.grow(rows)

    def _started(self, caller: str) -> dict[str, Tensor]:
        if not self._state:
            raise RuntimeError(f"FINE.{caller}: no state yet; call start(rows, queries, device) first")
        return self._state
