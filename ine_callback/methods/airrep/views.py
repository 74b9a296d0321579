"""AirRep's scores in the form of every method's, and as a report of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray

from ine_callback.methods.airrep.evaluate import Evaluation
from ine_callback.methods.airrep.settings import NAME, AirRepSettings
from ine_callback.methods.observation_counts import ObservationCounts
from ine_callback.report import InfluenceReport
from ine_callback.report.runinfo import RunInfo
from ine_callback.scores import Attribution, Check, Floats, QueryInfo

LEGEND = (
    "A score > 0: training on the row helps the query. Compare rows of one query, not queries. A group's score is no "
    "sum: AirRep.group(rows, queries)."
)
NOT_USABLE = "NOT USABLE: on held-out queries and subsets the trained encoder ranks no better than the untrained one."


def attribution(scores: Floats, names: Sequence[str], evaluation: Evaluation, settings: AirRepSettings) -> Attribution:
    """Scores [N, Q] with the evaluation as check, headline and notes."""
    infos = tuple(QueryInfo(n, "loss", f"Does training on this row lower the loss of {n}?") for n in names)
    gain = Check(
        "gain of the held-out LDS over the untrained encoder, lower end of its 95 % interval",
        evaluation.gain_interval[0],
        "above 0",
        evaluation.usable,
        "collect more subsets or seeds, or take an encoder that sees what matters",
    )
    notes = [] if evaluation.usable else [NOT_USABLE]
    if evaluation.dropped:
        notes.append(f"{evaluation.dropped:,} dev rows were left out: their loss was the same after every training.")
    if settings.seeds == 1:
        notes.append(
            "The noise ceiling is 1 for one seed a subset, where the training is deterministic; it was not measured."
        )
    return Attribution(
        NAME,
        np.arange(len(scores)),
        infos,
        scores,
        checks=(gain,),
        settings=asdict(settings) | {"evaluation": asdict(evaluation)},
        notes=tuple(notes),
        title="Learned representation",
        headline=str(evaluation),
        legend=LEGEND,
    )


def report_of(found: Attribution, counts: NDArray[np.int64], settings: AirRepSettings) -> InfluenceReport:
    """A report without scores by f-INE; a row's observations are the trainings on subsets that held it [N].

    That the encoder is not usable is the first line of every view of the report.
    """
    rows = len(found.rows)
    observed = ObservationCounts()
    observed.start(rows, (), torch.device("cpu"))
    observed.update(torch.arange(rows).repeat_interleave(torch.from_numpy(counts)), torch.zeros(0, 0), rate=0.0)
    run = RunInfo(
        config=asdict(settings),
        seed=settings.seed,
        rows=rows,
        incomplete="" if found.reliable else NOT_USABLE,
        notes=[
            f"{NAME}: {found.headline}.",
            "Observations count the trainings on subsets that held the row; there was no run to record.",
        ],
    )
    return InfluenceReport(observed.compute(), run, [found])
