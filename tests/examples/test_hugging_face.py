"""A Hugging Face Trainer: the scores of a plain loop with the same batches, and a training that nothing touches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from torch.utils.data import default_collate

from ine_callback import InfluenceReport, Recorder
from ine_callback.errors import InfluenceError
from ine_callback.integrations.hugging_face import InfluenceTrainerCallback

Load = Callable[[str], ModuleType]
ROWS, MICRO, TOGETHER, CLIP = 20, 4, 2, 0.5  # five micro-batches an epoch: the last step has one
OPTIONS = {"per_device_train_batch_size": MICRO, "gradient_accumulation_steps": TOGETHER, "max_grad_norm": CLIP}


class Run:
    """A Trainer, its model's first weights, and the batches that it trains on."""

    def __init__(self, hf: ModuleType, out: Path, dropout: float = 0.0) -> None:
        self.train, self.val = hf.Texts(ROWS, 0.1, 0), hf.Texts(8, 0.0, 1)
        self.trainer = hf.make_trainer(self.train, self.val, str(out), 2, 0, warmup_steps=2, logging_steps=1, **OPTIONS)
        for module in self.trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        self.first = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}
        self.batches: list[list[int]] = []

    def journal(self, items: list[dict[str, Any]]) -> Any:
        batch = default_collate(items)
        found = (batch["input_ids"][:, None] == self.train.ids).all(2).nonzero()[:, 1]
        self.batches.append(found.tolist())
        return batch

    def end(self) -> list[Any]:
        logs = [{k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k} for line in self.logs]
        return [*self.trainer.model.state_dict().values(), torch.get_rng_state(), logs]

    @property
    def logs(self) -> list[dict[str, float]]:
        return self.trainer.state.log_history


def queries(val: Any) -> dict[str, Any]:
    return {"val": {key: torch.stack([row[key] for row in val]) for key in ("input_ids", "labels")}, "self": "self"}


@pytest.fixture(scope="module")
def recorded(example: Load, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, InfluenceTrainerCallback]]:
    run = Run(example("hf_trainer.py"), tmp_path_factory.mktemp("hf"))
    run.trainer.data_collator = run.journal
    influence = InfluenceTrainerCallback(run.trainer, ["val", "self"], refresh_every=2, on_error="raise")
    run.trainer.train()
    run.batches = [batch for batch in run.batches if len(batch)][-10:]  # the first ones are the query's
    return run, influence


def test_scores_are_those_of_a_plain_loop(recorded: tuple[Run, InfluenceTrainerCallback]) -> None:
    run, influence = recorded
    report = influence.report
    assert report is not None and report.run.steps == 6 and (report.observations == 2).all()
    model = run.trainer.model
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(run.first)
    trainer = type(run.trainer)(model, run.trainer.args, train_dataset=run.train)
    trainer.create_optimizer_and_scheduler(6)
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    recorder = Recorder(
        model,
        optimizer,
        ROWS,
        queries(run.val),
        lambda module, batch: module(**batch).loss,
        total_steps=6,
        schedulers=[(scheduler, 1)],
        initial_weights="fixed",
        refresh_every=2,
        accumulate=TOGETHER,
        on_error="raise",
    )
    model.train()
    with recorder:
        for step in (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 7), slice(7, 9), slice(9, 10)):
            for rows in run.batches[step]:
                batch = {"input_ids": run.train.ids[rows], "labels": run.train.labels[rows]}
                with recorder.batch(rows, batch):
                    loss = model(**batch).loss  # transformers adds a BERT's micro-batches up, whatever their number
                    recorder.see(loss)
                    loss.backward()
            recorder.measure_clipping()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    plain = recorder.report()
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    np.testing.assert_allclose(report.scores.mu, plain.scores.mu, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(report.scores.mean_loss, plain.scores.mean_loss, rtol=1e-6)
    np.testing.assert_array_equal(report.observations, plain.observations)
    assert report.run.schedule["planned_lr_sum"] == pytest.approx(plain.run.schedule["planned_lr_sum"])
    assert report.run.captured_share == plain.run.captured_share


def test_the_report_is_saved_and_the_trainer_left_as_it_was(recorded: tuple[Run, InfluenceTrainerCallback]) -> None:
    run, _ = recorded
    saved = InfluenceReport.load(Path(run.trainer.args.output_dir) / "influence")
    assert saved.queries == ("val", "self")
    wrapped = {"get_train_dataloader", "get_batch_samples", "training_step"}
    assert not wrapped & set(run.trainer.__dict__)
    assert not {"backward", "clip_grad_norm_"} & set(run.trainer.accelerator.__dict__)


def test_training_is_bit_identical_also_when_the_recording_breaks_down(example: Load, tmp_path: Path) -> None:
    hf = example("hf_trainer.py")

    def broken(module: Any, batch: Any) -> Any:
        if seen[0] > 1:
            raise RuntimeError("the query broke")
        seen[0] += 1
        return module(**batch).loss

    seen, ends = [0], []
    for query in (None, ["val", "self"], broken):
        run = Run(hf, tmp_path / "run", dropout=0.2)
        influence = None if query is None else InfluenceTrainerCallback(run.trainer, query, refresh_every=1)
        run.trainer.train()
        ends.append(run.end())
    for end in ends[1:]:
        for one, other in zip(ends[0], end, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert influence is not None and influence.report is not None
    assert "the query broke" in " ".join(influence.report.run.notes)


def test_what_cannot_be_recorded_is_refused_before_the_first_step(example: Load, tmp_path: Path) -> None:
    run = Run(example("hf_trainer.py"), tmp_path)
    InfluenceTrainerCallback(run.trainer, "self")
    run.trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(InfluenceError, match="float16 with a gradient scaler"):
        run.trainer.train()
