"""Ways to train with a Hugging Face Trainer, each against a plain loop, and what trainings and broken ones leave."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from transformers import TrainerCallback, TrainingArguments

from ine_callback import FINE, InfluenceCallback, InfluenceReport
from ine_callback.errors import InfluenceError
from ine_callback.integrations.hugging_face import InfluenceTrainerCallback
from tests.helpers.texts import ROWS, Journal, Texts, plain_loop, same, small_model, state_of, trainer_of

since_5 = pytest.mark.skipif(
    "group_by_length" in TrainingArguments.__dataclass_fields__,
    reason="transformers before 5 counts words, and the batches of a step, in ways of its own",
)
WAYS: dict[str, dict[str, Any]] = {
    "a last batch that is smaller": {},
    "accumulation over it": {"gradient_accumulation_steps": 4},
    "the last batch dropped": {"dataloader_drop_last": True},
    "batches of like lengths": {"train_sampling_strategy": "group_by_length"},
    "an order of its own, three epochs": {"num_train_epochs": 3, "data_seed": 7},
    "evaluation on the way": {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    "bfloat16": {"bf16": True},
    "workers that stay": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
}


def recorded(trainer: Journal, **options: Any) -> InfluenceTrainerCallback:
    return InfluenceTrainerCallback(trainer, ["val", "self"], **{"refresh_every": 2, "on_error": "raise", **options})


def clean(trainer: Journal) -> bool:
    """Whether nothing of us is left but the one wrapper that waits for the next training."""
    ours = {"get_train_dataloader", "get_batch_samples", "training_step", "backward", "clip_grad_norm_"}
    hooks = [hook for module in trainer.model.modules() for hook in module._forward_hooks.values()]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    hooks += [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    return not hooks and not ours & {*trainer.__dict__, *trainer.accelerator.__dict__}


@since_5
@pytest.mark.parametrize("way", WAYS)
def test_rows_and_scores_are_those_of_a_plain_loop(way: str, tmp_path: Path) -> None:
    trainer, without = trainer_of(tmp_path, **WAYS[way]), trainer_of(tmp_path, **WAYS[way])
    influence, ends = recorded(trainer, methods=[FINE(closing=False)]), []
    for each in (trainer, without):
        torch.manual_seed(6)
        each.train()
        ends.append(state_of(each))
    assert same(*ends)
    model, plain = plain_loop(trainer, ["val", "self"])
    report = influence.report
    assert report is not None and report.run.steps == plain.run.steps == trainer.state.global_step
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(report.observations, plain.observations)
    np.testing.assert_array_equal(report.observations, trainer.visits)
    np.testing.assert_allclose(report.scores.mu, plain.scores.mu, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(report.scores.mean_loss, plain.scores.mean_loss, rtol=1e-5)
    assert clean(trainer)


def test_a_second_training_is_a_second_recording(tmp_path: Path) -> None:
    """Its report is that of a new Trainer from the same weights; both trainings are those of a Trainer without us."""

    def made(name: str) -> Journal:
        return trainer_of(tmp_path / name, small_model(dropout=0.1), logging_steps=1)

    def train(trainer: Journal, seed: int) -> list[Any]:
        torch.manual_seed(seed)
        trainer.train()
        return state_of(trainer)

    trainer, plain, reports = made("one"), made("plain"), []
    influence = recorded(trainer)
    for seed in (4, 5):
        between = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        assert same(train(trainer, seed), train(plain, seed)) and clean(trainer)
        assert influence.report is not None and (influence.report.observations == 2).all()
        reports.append(influence.report)
    assert not np.array_equal(reports[0].scores.mu, reports[1].scores.mu)
    fresh = made("fresh")
    fresh.model.load_state_dict(between)
    alone = recorded(fresh)
    train(fresh, 5)
    assert alone.report is not None
    np.testing.assert_array_equal(alone.report.scores.mu, reports[1].scores.mu)
    saved = InfluenceReport.load(tmp_path / "one/influence")  # the last one, as of two fits of a Lightning Trainer
    np.testing.assert_array_equal(saved.scores.mu, reports[1].scores.mu)


def test_a_training_that_breaks_down_is_reported_and_the_next_one_is_as_without_us(tmp_path: Path) -> None:
    ends = []
    for with_us in (True, False):
        trainer = trainer_of(tmp_path, small_model(dropout=0.1), gradient_accumulation_steps=2)
        influence = recorded(trainer) if with_us else None
        trainer.breaks = 2
        with pytest.raises(ConnectionError, match="the file server is gone"):
            trainer.train()
        if influence is not None:
            report = influence.report
            assert report is not None and report.run.steps == 2 and report.observations.sum() == 16
            assert any("ended by ConnectionError" in note for note in report.run.notes), report.run.notes
            assert InfluenceReport.load(tmp_path / "influence").run.steps == 2 and clean(trainer)
        trainer.train()
        ends.append(state_of(trainer))
        if influence is not None:
            assert influence.report is not None and (influence.report.observations == 2).all() and clean(trainer)
            assert not any("ended by" in note for note in influence.report.run.notes)
    assert same(*ends)


@since_5
def test_a_resumed_training_is_recorded_from_there_on(tmp_path: Path) -> None:
    trainer_of(tmp_path / "whole", save_strategy="steps", save_steps=3, num_train_epochs=3).train()
    for step, seen in ((6, 2), (9, 1)):  # the end of an epoch, and inside of one
        ends = []
        for with_us in (True, False):
            trainer = trainer_of(tmp_path / "resumed", num_train_epochs=3)
            influence = recorded(trainer) if with_us else None
            trainer.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
            ends.append(state_of(trainer))
            if influence is not None:
                assert influence.report is not None and (influence.report.observations == seen).all()
                assert any(f"at step {step} of a resumed run" in note for note in influence.report.run.notes)
        assert same(*ends)


class Stop(TrainerCallback):
    """Ends the first epoch within an accumulated step, of which two batches more were fetched."""

    stopped = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = state.global_step == 1 and not self.stopped
        self.stopped |= control.should_epoch_stop


@since_5
def test_a_step_that_is_broken_off_leaves_no_rows_to_the_next(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=3)
    influence = recorded(trainer)
    trainer.add_callback(Stop())
    trainer.train()
    assert influence.report is not None
    assert sum(trainer.visits) == 12 + 4 + ROWS  # the gradient of the four is part of the next step
    np.testing.assert_array_equal(influence.report.observations, trainer.visits)


def test_val_is_a_random_sample_of_all_evaluation_sets(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, val={"one": Texts(6, 1), "other": Texts(9, 2)}, dataloader_drop_last=True)
    influence = recorded(trainer, max_query_rows=8)
    trainer.train()
    assert influence.report is not None and influence.report.queries == ("val", "self")
    assert "query data 'val': a random 8 of 9 rows" in influence.report.run.notes


def test_what_a_user_put_on_the_trainer_stays(tmp_path: Path) -> None:
    trainer, asked = trainer_of(tmp_path), []
    step = trainer.training_step
    trainer.training_step = own = lambda *args: asked.append(1) or step(*args)
    recorded(trainer)
    trainer.train()
    assert trainer.training_step is own and len(asked) == trainer.state.global_step


def test_two_of_them_and_rows_without_indices_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    recorded(trainer), recorded(trainer)
    with pytest.raises(InfluenceError, match="one Trainer holds two of them"):
        trainer.train()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter([Texts(ROWS, 0)[row] for row in range(ROWS)])

    trainer = trainer_of(tmp_path, max_steps=3)
    trainer.train_dataset = Stream()
    recorded(trainer)
    with pytest.raises(InfluenceError, match="iterable dataset Stream has no row indices; give a training set"):
        trainer.train()
    assert "training_step" not in trainer.__dict__


def test_options_are_those_of_the_lightning_callback_and_reach_the_recording(tmp_path: Path) -> None:
    ours = inspect.signature(InfluenceTrainerCallback).parameters
    theirs = inspect.signature(InfluenceCallback).parameters
    alike = set(ours) & set(theirs) - {"queries", "initial_weights"}  # a Hugging Face model is mostly pretrained
    assert len(alike) > 9 and all(ours[name].default == theirs[name].default for name in alike)
    last = {"layers": ["*.layers.1.*"], "discount": False, "reservoir": 0, "rank": None, "curvature_every": 3}
    trainer = trainer_of(tmp_path)
    influence = recorded(trainer, max_dim=64, **last)
    trainer.train()
    assert influence.report is not None and 0 < influence.report.run.captured_share < 0.7
    assert {name: influence.report.run.config[name] for name in last} == last
