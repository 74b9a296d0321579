"""Several runs of one training set as one report: mean scores, and tests that speak about other seeds too.

Per row and query, over the R runs that scored the row:

    mu = mean of mu_r
    se = sqrt(s^2 / R)                            s^2: variance of mu_r between runs, moderated
    t  = mu / se,  d0 + R - 1 degrees of freedom  H0: the row's score, averaged over all seeds, is 0
    p  = 2 Phi(-|sum z_r| / sqrt(R)),  z_r = sign_r Phi^-1(1 - p_r / 2)   H0: exchangeable in every run (Stouffer 1949)

With R = 2 .. 5 the plain variance is noise, so it is shrunk to the other rows' as limma does (Smyth 2004), in units of
the row's squared standard error within the runs, because the strongest rows vary most. On digits ``mu +- 1.96 se`` of
3 runs holds the mean of 27 others for 91-93 % of the rows, and for 88-89 % of the tenth with the largest scores
(``python -m benchmarks.runs``). Stouffer's z, not Fisher's sum of logarithms: p_r are two-sided, and runs that disagree
in sign must cancel, not add up.

A run's mu is a shift over a unit, the query's standard deviation over trainings, which a single run can only predict.
Several runs measure it, as the spread of the query's values at the end of training. Where all runs know value and unit,

    mu_r = (mu_r of the run) unit_r / sd          and likewise se_r and null_sd_r
    sd   = measured_spread(values [R], u)         u: geometric mean of the unit_r

with sd shrunk to u (:mod:`ine_callback.stats.measured_spread`). So mu is the mean shift of the query over its measured
spread. One number multiplies all rows of a query in a run: p and q do not depend on it, and t only on the unit_r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from ine_callback.report.runinfo import RunInfo
from ine_callback.scores import Floats, QueryInfo, Scores
from ine_callback.stats import hypothesis_tests as tests
from ine_callback.stats.measured_spread import measured_spread
from ine_callback.utilities.words import MEASURED, SIZE

WHO = "InfluenceReport.combine"
FLAG_AT = 0.05
ENOUGH = 5  # runs whose measured spread makes a doubtful prediction of it irrelevant
MAX_NOTES = 4  # queries with a note each; as many as the views show in full
MIN_P = 1e-300  # a p-value of 0 would be an infinite z
Value = TypeVar("Value")


def combine_scores(runs: Sequence[Scores]) -> Scores:
    """Combines the scores of runs with different seeds; formulas above.

    Of the rest, ``null_sd`` is the mean's, ``sqrt(sum of null_sd_r^2) / R``; ``null_mu`` holds draws of
    ``mu / null_sd`` under the null, sums of one draw a run over sqrt(R); ``null_ks_p`` is the smallest of the runs
    times their number (Bonferroni), at most 1; ``observations`` are summed; ``mean_loss`` is weighted by them;
    ``margins`` are means over the runs; ``unit`` is the measured spread, ``query_loss`` the mean, where all runs know
    them.

    Raises:
        ValueError: When the runs do not belong together; see :meth:`InfluenceReport.combine`.
    """
    _check(runs)
    queries = runs[0].queries
    order = [[query.name for query in run.queries].index(one.name) for run in runs for one in queries]
    columns = np.reshape(order, (len(runs), len(queries)))
    unit, loss_at_end, factors = _units(runs, columns)
    observations = np.stack([run.observations for run in runs])
    shape = (observations.shape[1], len(queries))
    result = {name: np.full(shape, np.nan) for name in ("mu", "se", "p", "t", "p_t", "null_sd")}
    null_mu, null_ks_p = [], np.full(len(queries), np.nan)
    for k in range(len(queries)):
        names = ("mu", "se", "p", "t", "null_sd")
        of = {n: np.stack([getattr(run, n)[:, c] for run, c in zip(runs, columns[:, k], strict=True)]) for n in names}
        of |= {name: of[name] * factors[:, k, None] for name in ("mu", "se", "null_sd")}
        scored = np.isfinite(of["mu"])
        count = scored.sum(0)
        mean = mean_over(of["mu"], scored)
        fit, se = between(of["mu"], mean, count, of["se"])
        result["mu"][:, k], result["se"][:, k], result["t"][:, k], result["p_t"][:, k] = mean, se, fit.t, fit.p
        result["p"][:, k] = _stouffer(of["p"], np.where(np.isfinite(of["t"]), of["t"], of["mu"]))
        # NaN in a scored row's null_sd stays: its estimator has none
        squares = np.where(scored, np.square(of["null_sd"]), 0.0).sum(0)
        result["null_sd"][:, k] = np.where(count > 0, np.sqrt(squares) / np.maximum(count, 1), np.nan)
        null_mu.append(_null([run.null_mu[c] for run, c in zip(runs, columns[:, k], strict=True)]))
        checks = np.array([run.null_ks_p[c] for run, c in zip(runs, columns[:, k], strict=True)])
        if (known := np.isfinite(checks)).any():
            null_ks_p[k] = min(1.0, float(checks[known].min()) * int(known.sum()))
    loss, margins = np.stack([run.mean_loss for run in runs]), [run.margins for run in runs]
    return Scores(
        queries=queries,
        q=tests.benjamini_hochberg(result["p"]),
        observations=observations.sum(0),
        mean_loss=mean_over(loss, np.where(np.isfinite(loss), observations, 0)),
        null_mu=np.stack(null_mu) if null_mu else np.zeros((0, 0)),
        null_ks_p=null_ks_p,
        margins=_mean_margins([each for each in margins if each is not None]),
        unit=unit,
        query_loss=loss_at_end,
        **result,
    )


def _units(runs: Sequence[Scores], columns: NDArray[np.int64]) -> tuple[Floats | None, Floats | None, Floats]:
    """Measured units [Q], mean losses [Q], and what the runs' scores are multiplied with [R, Q]."""
    units, losses = (_of_queries(runs, columns, name) for name in ("unit", "query_loss"))
    known = np.isfinite(units + losses).all(axis=0)
    unit, factors = np.full(units.shape[1], np.nan), np.ones(units.shape)
    predicted = np.exp(np.log(units[:, known]).mean(0))
    unit[known] = measured_spread(losses[:, known], predicted)
    factors[:, known] = units[:, known] / unit[known]
    mean = losses.mean(0)
    return (unit if known.any() else None), (mean if np.isfinite(mean).any() else None), factors


def _of_queries(runs: Sequence[Scores], columns: NDArray[np.int64], name: str) -> Floats:
    """A number of each query in each run [R, Q]; NaN where a run does not know it."""
    values = [getattr(run, name) for run in runs]
    unknown = np.full(columns.shape[1], np.nan)
    return np.stack([unknown if each is None else each[c] for each, c in zip(values, columns, strict=True)])


def mean_over(values: Floats, weights: NDArray[Any]) -> Floats:
    """Weighted mean over the first axis; NaN without weight."""
    total = weights.sum(0)
    return np.where(total > 0, np.where(weights > 0, values * weights, 0.0).sum(0) / np.maximum(total, 1), np.nan)


def _mean_margins(runs: Sequence[Floats]) -> Floats | None:
    """Mean margins [N, W] over the runs that knew them, each in its own window."""
    if not runs or len({run.shape for run in runs}) > 1:
        return None
    stacked = np.stack(runs)
    return mean_over(stacked, np.isfinite(stacked))


def between(mu: Floats, mean: Floats, count: NDArray[np.int64], within: Floats) -> tuple[tests.ModeratedT, Floats]:
    """Moderated t of the mean over runs and its standard error, from mu [R, N] and its error within the runs [R, N]."""
    known = np.isfinite(mu)
    variance = np.where(known, np.square(mu - mean), 0.0).sum(0) / np.maximum(count - 1, 1)
    variance = np.where(count > 1, variance, np.nan)
    unit = mean_over(np.square(within), (known & np.isfinite(within)).astype(np.int64))
    good = unit[unit > 0]
    unit = np.where(unit > 0, unit, float(np.median(good)) if good.size else 1.0)
    fit = tests.moderated_t(mean, variance / unit, count - 1.0, unit / np.maximum(count, 1))
    return fit, np.sqrt(fit.variance * unit / np.maximum(count, 1))


def _stouffer(p: Floats, direction: Floats) -> Floats:
    """Two-sided p-value of the signed z-scores of two-sided p-values [R, N]; NaN entries are no runs."""
    tested = np.isfinite(p) & np.isfinite(direction)
    z = -np.sign(direction) * ndtri(np.maximum(p, MIN_P) / 2)
    count = tested.sum(0)
    total = np.where(tested, z, 0.0).sum(0) / np.sqrt(np.maximum(count, 1))
    return np.where(count > 0, np.maximum(2.0 * ndtr(-np.abs(total)), MIN_P), np.nan)


def _null(draws: Sequence[Floats]) -> Floats:
    """Draws of the combined null: sums of one draw from each run, in random order, over sqrt(R)."""
    finite = [each[np.isfinite(each)] for each in draws]
    finite = [each for each in finite if each.size]
    if not finite:
        return np.full(max(map(len, draws)), np.nan)
    random, size = np.random.default_rng(0), max(map(len, draws))
    total = np.sum([random.permutation(np.resize(each, size)) for each in finite], axis=0)
    return np.asarray(total / math.sqrt(len(finite)), dtype=np.float64)


def _check(runs: Sequence[Scores]) -> None:
    if len(runs) < 2:
        raise ValueError(f"{WHO}: got {len(runs)} report(s); give at least two, of runs with different seeds")
    first = runs[0]
    check_rows(runs, WHO)
    for index, run in enumerate(runs[1:], start=1):
        here, there = ({_label(query) for query in each.queries} for each in (first, run))
        if here != there:
            raise ValueError(
                f"{WHO}: report 0 and report {index} ask different queries: only report 0 has "
                f"{sorted(here - there)}, only report {index} has {sorted(there - here)}; "
                "give all runs the same queries"
            )
        for other, earlier in enumerate(runs[:index]):
            if np.isfinite(run.mu).any() and np.array_equal(earlier.mu, run.mu, equal_nan=True):
                raise ValueError(
                    f"{WHO}: reports {other} and {index} are equal: the same run twice gives no error bars: "
                    "give another seed"
                )


def check_rows(runs: Sequence[Scores], who: str) -> None:
    """Raises ValueError where the runs cannot be of one training set."""
    first = len(runs[0].observations)
    for index, run in enumerate(runs[1:], start=1):
        if len(run.observations) != first:
            raise ValueError(
                f"{who}: report 0 has {first:,} rows, report {index} {len(run.observations):,}; "
                "give runs of the same training set, in the same order"
            )


def _label(query: QueryInfo) -> str:
    return f"{query.name} ({query.kind})"


def combine_runs(infos: Sequence[RunInfo], runs: Sequence[Scores]) -> RunInfo:
    """Provenance of the combined report: sums, unions, and notes on what agrees between the runs.

    Raises:
        ValueError: When one of the reports is combined already: runs must weigh the same.
    """
    for index, info in enumerate(infos):
        if "combined" in info.config:
            raise ValueError(
                f"{WHO}: report {index} is combined already; give the reports of the single runs, all at once"
            )
    first, seeds = infos[0], [info.seed for info in infos]
    known_seeds = ", ".join("unknown" if seed is None else str(seed) for seed in seeds)
    notes = [
        f"Combined from {len(infos)} runs (seeds: {known_seeds}): μ is their mean; se, interval, t and p_t come from "
        "the scatter between runs; p joins the runs' permutation p-values. "
        "More runs see smaller differences and flag more rows that are merely hard: look at what repeats."
    ]
    if differing := differing_settings(infos):
        notes.append(f"The runs' settings differ ({', '.join(differing)}): their scatter is not that of seeds alone.")
    nonfinite: dict[str, int] = {}
    for info in infos:
        for name, count in info.nonfinite.items():
            nonfinite[name] = nonfinite.get(name, 0) + count
    schedules = [info.schedule for info in infos]
    return RunInfo(
        config=first.config | {"combined": len(infos), "seeds": seeds},
        versions={
            name: ", ".join(dict.fromkeys(info.versions[name] for info in infos if name in info.versions))
            for name in _union([info.versions for info in infos])
        },
        seed=None,
        started=min((info.started for info in infos if info.started), default=""),
        seconds=sum(info.seconds for info in infos),
        steps=sum(info.steps for info in infos),
        rows=first.rows,
        captured_share=min(info.captured_share for info in infos),
        approximate=_union([info.approximate for info in infos]),
        uncaptured=_union([info.uncaptured for info in infos]),
        nonfinite=nonfinite,
        schedule=schedules[0] if all(each == schedules[0] for each in schedules) else {"runs": schedules},
        notes=[*notes, *_replication(runs), *_size(infos, runs)],
    )


def _size(infos: Sequence[RunInfo], runs: Sequence[Scores]) -> list[str]:
    """Which queries' spread was measured, then the runs' own notes, each once.

    Those that doubt a prediction go where it was replaced for all queries on data, by enough runs.
    """
    own = dict.fromkeys(note for info in infos for note in info.notes)
    on_data = [query.name for query in runs[0].queries if query.kind != "self"]
    if not on_data:
        return list(own)
    measured = [name for name in on_data if all(_knows_size(run, name) for run in runs)]
    if not measured:
        return ["sizes are predicted by single runs: no query's spread was measured", *own]
    others = " (others: predicted by single runs)" if len(measured) < len(on_data) else ""
    plural = "y" if len(measured) == 1 else "ies"
    note = f"{MEASURED}{len(measured):,} quer{plural} was measured over {len(runs)} runs{others}"
    replaced = len(runs) >= ENOUGH and len(measured) == len(on_data)
    return [note, *(each for each in own if not (replaced and each.startswith(SIZE)))]


def _knows_size(run: Scores, name: str) -> bool:
    column = [query.name for query in run.queries].index(name)
    return all(each is not None and bool(np.isfinite(each[column])) for each in (run.unit, run.query_loss))


def differing_settings(infos: Sequence[RunInfo]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    missing, first = object(), infos[0].config
    keys = {key for info in infos for key in info.config}
    return sorted(key for key in keys if any(i.config.get(key, missing) != first.get(key, missing) for i in infos))


def _union(parts: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """All entries; of a repeated key the first."""
    return {key: value for part in reversed(parts) for key, value in part.items()}


def _replication(runs: Sequence[Scores]) -> list[str]:
    """How many findings repeat, a sentence for each of the first queries and one for the sum over many."""
    total_any = total_all = 0
    notes = []
    for name in (query.name for query in runs[0].queries):
        flagged = flag_signs(runs, name, FLAG_AT)
        some, every = int((flagged != 0).any(0).sum()), int((np.abs(flagged.sum(0)) == len(runs)).sum())
        total_any, total_all = total_any + some, total_all + every
        notes.append(_found(f"Query {name!r}: of {some:,} rows", every, len(runs)))
    if len(notes) > MAX_NOTES:
        everything = _found(f"All {len(notes)} queries: of {total_any:,} scores", total_all, len(runs))
        return [*notes[:MAX_NOTES], everything]
    return notes


def flag_signs(runs: Sequence[Scores], query: str, q: float) -> Floats:
    """Sign of the score where its q-value is at most ``q``, else 0 [R, N]."""
    columns = [[each.name for each in run.queries].index(query) for run in runs]
    return np.stack(
        [np.where(run.q[:, c] <= q, np.sign(run.mu[:, c]), 0.0) for run, c in zip(runs, columns, strict=True)]
    )


def _found(whole: str, every: int, runs: int) -> str:
    return f"{whole} flagged (q ≤ {FLAG_AT:g}) in any run, {every:,} are flagged in all {runs} with the same sign."
