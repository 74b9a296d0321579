"""A small synthetic report for documentation, tests and first steps; nothing is trained."""

from __future__ import annotations

import numpy as np

from ine_callback.report.report import InfluenceReport
from ine_callback.report.runinfo import RunInfo
from ine_callback.scores import QueryInfo, Scores

PLANTED = (3, 17, 29)


def example_report(rows: int = 60, seed: int = 0, planted: tuple[int, ...] = PLANTED) -> InfluenceReport:
    """A report of three queries in which the ``planted`` rows are mislabelled and the last row was never observed.

    Args:
        rows: Number of rows.
        seed: Seed of a private generator.
        planted: Rows with a large self-influence that harm the validation margin, where they exist.

    Example:
        >>> report = example_report()
        >>> report.rows, report.queries, report.drop_list().tolist()
        (60, ('self', 'val', 'val margin'), [3, 17, 29])
    """
    from scipy.stats import false_discovery_control, kstest, norm  # slow to import, and only needed here

    random = np.random.default_rng(seed)
    queries = (
        QueryInfo("self", "self", "Which rows lower their own loss the most: mislabelled or hard?"),
        QueryInfo("val", "loss", "Which rows lower the mean loss of my validation set?"),
        QueryInfo("val margin", "margin", "Which rows help or hurt the predictions on my validation set?"),
    )
    null_sd = np.repeat(random.uniform(0.048, 0.052, (rows, 1)), 3, axis=1)
    z = random.standard_normal((rows, 3)).clip(-2.5, 2.5)  # only planted rows stand out
    bad = np.array([row for row in planted if row < rows - 1], dtype=np.int64)
    z[bad, 0] = 14.0 - np.arange(bad.size) * 8.0 / max(bad.size, 1)
    z[bad, 2] = -9.0 + np.arange(bad.size) * 4.0 / max(bad.size, 1)
    good = np.setdiff1d(np.arange(rows), bad)[: max(rows // 12, 1)]
    z[good, 1:] += np.linspace(5.0, 9.0, good.size)[:, None]
    z[-1] = np.nan
    mu, seen = z * null_sd, np.arange(rows) < rows - 1
    p = 2.0 * norm.sf(np.abs(z))
    t = z * random.uniform(0.7, 1.0, z.shape)
    q = np.full_like(p, np.nan)
    q[seen] = np.stack([false_discovery_control(column) for column in p[seen].T], axis=1)
    observations = np.where(seen, random.integers(6, 11, rows), 0)
    mean_loss = np.where(seen, random.gamma(1.5, 0.2, rows) + 2.5 * np.isin(np.arange(rows), bad), np.nan)
    null_mu = random.standard_normal((3, 8 * rows))
    scores = Scores(
        queries=queries,
        mu=mu,
        se=np.where(seen[:, None], null_sd * random.uniform(0.8, 1.2, z.shape), np.nan),
        p=p,
        q=q,
        t=t,
        p_t=2.0 * norm.sf(np.abs(t)),
        null_sd=np.where(seen[:, None], null_sd, np.nan),
        observations=observations.astype(np.int64),
        mean_loss=mean_loss,
        null_mu=null_mu,
        null_ks_p=np.array([kstest(draws, "norm").pvalue for draws in null_mu]),
    )
    run = RunInfo(
        config={"queries": "val", "refresh": 10},
        versions={"ine_callback": "0.1.0", "python": "3.11"},
        seed=seed,
        started="2026-01-01T12:00:00+00:00",
        seconds=12.5,
        steps=10 * max(rows // 20, 1),
        rows=rows,
        captured_share=0.984,
        approximate={"encoder.bn1": "BatchNorm mixes the rows of a batch"},
        uncaptured={"scale": "a bare parameter outside any layer (1.6 % of the parameters)"},
        schedule={"planned_steps": 10 * max(rows // 20, 1), "steps": 10 * max(rows // 20, 1), "note": "as planned"},
        notes=["Synthetic example: nothing was trained."],
    )
    return InfluenceReport(scores, run)
