"""What the trainer's loggers get: a few scalars at the end of an epoch; figures, tables and files in the end.

Loggers have only ``log_metrics`` in common. What else one can do is seen by its methods; what it cannot is left out.
Nothing goes through the module's ``self.log``: the user's metrics and ``trainer.callback_metrics`` stay what they are.
"""

from __future__ import annotations

import io
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ine_callback.report import InfluenceReport
from ine_callback.report.report import save_with_page
from ine_callback.scores import Scores

PREFIX = "influence"
MAX_TIME_FRACTION = 0.02  # of the time since the start that the epochs' scalars may take
MAX_FIGURES = 4  # queries, as in the HTML page


def report_folder(trainer: Trainer, dirpath: str | Path | None) -> Path | None:
    """Where the report goes: the folder that the user named, else ``influence`` in the run's; None: nowhere."""
    if dirpath is not None:
        return Path(dirpath)
    folder = run_folder(trainer)
    return None if folder is None else folder / "influence"


def run_folder(trainer: Trainer) -> Path | None:
    """Where the first logger keeps files of this very run; None without one. All processes must ask.

    Lightning's ``log_dir`` is that for its own loggers alone. For the others it is a folder of all runs, MLflow's store
    itself among them; so there it is the folder where Lightning puts the run's checkpoints.
    """
    folder = trainer.log_dir
    if folder is None or not trainer.loggers:
        return None
    first = trainer.loggers[0]
    if isinstance(first, TensorBoardLogger | CSVLogger):
        return Path(folder)
    version = first.version if isinstance(first.version, str) else f"version_{first.version}"
    own: str = trainer.strategy.broadcast(str(Path(folder, str(first.name), version)))
    return Path(own)


class RunLog:
    """Tells a Trainer's loggers about the recording; only the first process does.

    Args:
        trainer: The Trainer.
        owner: Class named in messages.
        strict: Whether an exception of a logger is raised, for tests; else it is a warning.
    """

    def __init__(self, trainer: Trainer, owner: str, strict: bool) -> None:
        self._trainer, self._owner, self._strict = trainer, owner, strict
        self._began, self._spent = time.monotonic(), 0.0

    def epoch(self, scores: Callable[[], Scores]) -> None:
        """Logs the scalars, unless making scores has taken too large a fraction of the time so far."""
        began = time.monotonic()
        if not self._loggers or self._spent > MAX_TIME_FRACTION * (began - self._began):
            return
        with self._guarded("the scores of an epoch"):
            self._metrics(scalars(scores()))
        self._spent += time.monotonic() - began

    def end(self, report: InfluenceReport) -> None:
        """Logs what the report says."""
        if not self._loggers:
            return
        self._metrics(scalars(report.scores) | ({f"{PREFIX}/incomplete": 1.0} if report.run.incomplete else {}))
        for logger in self._loggers:
            with self._guarded(f"{type(logger).__name__}: the report"):
                _show(logger, report, self._step)

    @property
    def _loggers(self) -> list[Any]:
        return self._trainer.loggers if self._trainer.is_global_zero else []

    @property
    def _step(self) -> int:
        """The step that Lightning's own metrics are logged at."""
        return int(self._trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _metrics(self, values: dict[str, float]) -> None:
        for logger in self._loggers:
            with self._guarded(f"{type(logger).__name__}: scalars"):
                logger.log_metrics(values, step=self._step)

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a training must never be lost to its logger
            if self._strict:
                raise
            warnings.warn(f"{self._owner}: not logged: {what}: {type(error).__name__}: {error}", stacklevel=3)


def scalars(scores: Scores, q: float = 0.05) -> dict[str, float]:
    """For each query how many rows are beyond chance, how strong they are, and whether the test holds.

    Example:
        >>> from ine_callback.report import example_report
        >>> found = scalars(example_report().scores)
        >>> found["influence/self/flagged"], round(found["influence/self/flagged_mean_abs_mu"], 2)
        (3.0, 0.56)
    """
    out = {f"{PREFIX}/rows_seen": float((scores.observations > 0).sum())}
    for k, query in enumerate(scores.queries):
        flagged = scores.q[:, k] <= q
        name = f"{PREFIX}/{_name(query.name)}"
        out[f"{name}/flagged"] = float(flagged.sum())
        if flagged.any():
            out[f"{name}/flagged_mean_abs_mu"] = float(np.abs(scores.mu[flagged, k]).mean())
        if np.isfinite(scores.null_ks_p[k]):
            out[f"{name}/null_check_p"] = float(scores.null_ks_p[k])
    return out


def _name(text: str) -> str:
    """A query's name of the letters that all loggers take."""
    return re.sub(r"[^\w./ -]", "_", text, flags=re.ASCII)


@contextmanager
def _files(report: InfluenceReport) -> Iterator[str]:
    """The report's files for a server: its page shows scores alone, never training rows."""
    with tempfile.TemporaryDirectory() as made:
        save_with_page(report, Path(made))
        yield made


def _show(logger: Any, report: InfluenceReport, step: int) -> None:
    experiment: Any = getattr(logger, "experiment", None)
    figures = {_name(q): report.figure(q) for q in report.queries[:MAX_FIGURES]} if find_spec("matplotlib") else {}
    if hasattr(logger, "log_table") and hasattr(logger, "log_image"):  # Weights & Biases
        if report.queries:
            first = report.top(100, report.recommended_query)
            logger.log_table(f"{PREFIX}/first_rows", columns=list(first[0]._fields), data=[list(row) for row in first])
        for name, figure in figures.items():
            logger.log_image(f"{PREFIX}/{name}/figure", [_image(figure)])
        with _files(report) as files:
            experiment.log_artifact(files, name="influence-report", type="report")
    elif hasattr(experiment, "log_artifacts") and hasattr(logger, "run_id"):  # MLflow
        for name, figure in figures.items():
            experiment.log_figure(logger.run_id, figure, f"{PREFIX}/{name.replace('/', '_')}.png")
        with _files(report) as files:
            experiment.log_artifacts(logger.run_id, files, PREFIX)
    elif hasattr(experiment, "add_figure"):  # TensorBoard
        experiment.add_text(PREFIX, report.to_markdown(), step)
        for name, figure in figures.items():
            experiment.add_figure(f"{PREFIX}/{name}", figure, step)


def _image(figure: Any) -> Any:
    from PIL import Image  # matplotlib brings it

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return Image.open(drawn)
