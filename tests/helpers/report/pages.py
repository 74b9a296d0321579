"""A synthetic report of everything that the page can draw, with rows to show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.special import ndtr
from scipy.stats import false_discovery_control

from ine_callback.methods.bif.scores import BIFScores, attribution
from ine_callback.report import InfluenceReport, example_report
from ine_callback.report.stored_vectors import StoredBlock, StoredVectors
from ine_callback.scores import Attribution, Check, LayerScores, QueryInfo, QueryKind, Scores, TokenScores

CLASSES, TERMS = ("cat", "dog", "owl"), 12


def report_of(rows: int = 240, named: str = "", chains: bool = True) -> InfluenceReport:
    """Self-influence, a margin and one query a class, with chains at three stages; ``named`` is in every name."""
    random = np.random.default_rng(1)
    kinds: dict[str, QueryKind] = {"self": "self", "margin": "margin"} | {f"class/{name}": "loss" for name in CLASSES}
    queries = tuple(QueryInfo(f"{named}{name}", kind, f"What about {name}? {named}") for name, kind in kinds.items())
    z = random.standard_normal((rows, len(queries)))
    which = classes_of(rows)
    for k in range(len(CLASSES)):  # a class helps itself, and harms the next one
        z[which == k, 2 + k] += 3.0
        z[which == (k + 1) % len(CLASSES), 2 + k] -= 2.0
    z[:8, 0] += np.linspace(9.0, 5.0, 8)
    z[:8, 1] -= 6.0
    z[-1] = np.nan
    seen = np.arange(rows) < rows - 1
    p = 2.0 * ndtr(-np.abs(z))
    q = np.full_like(p, np.nan)
    q[seen] = np.stack([false_discovery_control(column) for column in p[seen].T], axis=1)
    null_sd = np.where(seen[:, None], 0.05, np.nan) * np.ones(len(queries))
    scores = Scores(
        queries=queries, mu=z * null_sd, se=null_sd, p=p, q=q, t=z, p_t=p, null_sd=null_sd,
        observations=np.where(seen, 9, 0), mean_loss=np.where(seen, random.gamma(1.5, 0.3, rows), np.nan),
        null_mu=random.standard_normal((len(queries), 4 * rows)), null_ks_p=np.full(len(queries), 0.4),
    )  # fmt: skip
    run = replace(example_report().run, rows=rows, notes=[f"Synthetic. {named}"])
    asked = queries[:2]
    stages = [_chains(scores, asked, at, weight, named) for at, weight in ((2, 0.2), (5, 0.7), ("end", 1.0))]
    return InfluenceReport(scores, run, stages if chains else ())


def other(rows: int = 240, named: str = "") -> Attribution:
    """Scores of another method, at one stage and on the margin alone, with a text in each place that has one."""
    random = np.random.default_rng(3)
    scored = np.arange(0, rows - 1, 2)
    scores = random.standard_normal((len(scored), 1))
    return Attribution(
        f"other{named}", scored, (QueryInfo(f"{named}margin", "margin", f"What? {named}"),), scores,
        columns={f"halves{named}": scores / 2, f"halves{named}_se": np.abs(scores)}, ranked_by=f"halves{named}",
        layers=LayerScores((f"one{named}", f"two{named}"), np.stack([scores, 0 * scores], 1)),
        checks=(Check(f"size{named}", np.inf, f"below 1{named}", False, f"turn it{named}"),),
        settings={f"size{named}": [named]}, arrays={f"trace{named}": scores}, notes=(f"A note.{named}",),
        title=f"Another method{named}", headline=f"120 rows{named}", legend=f"How to read it.{named}",
    )  # fmt: skip


def classes_of(rows: int) -> np.ndarray:
    """Each row's class, as a number."""
    return np.arange(rows) % len(CLASSES)


def labels_of(rows: int, named: str = "") -> list[str]:
    """Each row's class, as a name."""
    return [f"{named}{CLASSES[k]}" for k in classes_of(rows)]


def _chains(scores: Scores, queries: tuple[QueryInfo, ...], at: int | str, weight: float, named: str) -> BIFScores:
    random = np.random.default_rng(2)
    rows = np.arange(min(60, len(scores.mu) - 1))
    found = weight * scores.mu[rows][:, : len(queries)] + 0.03 * random.standard_normal((len(rows), len(queries)))
    small = np.full_like(found, 0.03)
    q = np.full_like(found, 0.2)
    sd = np.full(len(rows), 1.0)
    terms = (random.standard_normal((len(rows), TERMS, len(queries))) * found[:, None]).reshape(-1, len(queries))
    return attribution(
        rows, queries, scores=found, se=small, p=q, q=q, plain=found, plain_se=small, laplace=found, trend=0 * found,
        effective_draws=found + 400.0, row_sd=sd, query_sd=sd[: len(queries)], loss=np.zeros((4, 20)),
        checks=(Check(f"drift{named}", 0.1, "below 0.5", True, "raise burn_in"),),
        settings={"step_size": 1e-4, "n_beta": 30.0, "localization": 100.0}, at=at,  # type: ignore[arg-type]
        tokens=TokenScores(np.arange(len(rows) + 1) * TERMS, terms, np.abs(terms), np.abs(terms)),
    )  # fmt: skip


TWINS, ALIKE = [(20, 120), (21, 121), (22, 122)], range(150, 180)  # near duplicates, and a weak group


def store_of(numbers: np.ndarray, seen: np.ndarray | None = None) -> StoredVectors:
    """A store of the rows' numbers [N, k] as they are."""
    rows, k = numbers.shape
    block, one = StoredBlock(("w",), (k,), np.arange(k)), np.ones(k, np.float32)
    there = np.ones(rows, np.bool_) if seen is None else seen
    return StoredVectors(
        numbers.astype(np.float32), np.ones(rows, np.float32), (block,), np.eye(k, dtype=np.float32), one, there
    )


def stored(report: InfluenceReport) -> InfluenceReport:
    """The report with a gradient store, in which some rows are twins and some lower the margin together."""
    random = np.random.default_rng(7)
    numbers = random.standard_normal((report.rows, 100))
    for one, other in TWINS:
        numbers[other] = numbers[one] + 0.05 * random.standard_normal(100)
    rows = np.array(ALIKE)
    numbers[rows] = 0.8 * numbers[rows] + 0.9 * random.standard_normal(100)
    scores, mu, q = report.scores, report.scores.mu.copy(), report.scores.q.copy()
    column = report.queries.index(next(name for name in report.queries if name.endswith("margin")))
    mu[rows, column] = 0.05 * (1.4 + 0.5 * random.standard_normal(len(rows)))
    q[rows, column] = 0.5
    store = store_of(numbers, report.observations > 0)
    return InfluenceReport(replace(scores, mu=mu, q=q), report.run, report.attributions, store)
