"""The recording in Lightning's checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from ine_callback.integrations.legacy import former
from ine_callback.integrations.trainer import restarts_in_an_epoch
from ine_callback.methods import FitEndMethods
from ine_callback.recording.recorder import Recorder

KEY = "ine_callback"  # of the recording in a checkpoint


def save(checkpoint: dict[str, Any], recorder: Recorder, fit_end: FitEndMethods, on_error: str) -> None:
    """Puts the recording into a checkpoint, which must not be lost to it."""
    try:
        checkpoint[KEY] = {"recorder": recorder.state_dict(), "fit_end": fit_end.state_dict()}
    except Exception as error:
        if on_error == "raise":
            raise
        recorder.guard.warn(f"a checkpoint was saved without the recording: {type(error).__name__}: {error}")


def resume(saved: dict[str, Any], trainer: Trainer, recorder: Recorder, fit_end: FitEndMethods, on_error: str) -> None:
    """Goes on from what :func:`save` put into the checkpoint that the Trainer resumed from."""
    step, why, guard = trainer.global_step, "there is no recording of them", recorder.guard
    try:
        if saved:
            recorder.load_state_dict(saved["recorder"])
            _resume_fit_end(saved, recorder, fit_end, on_error)
            guard.note(f"resumed at step {step} from a checkpoint")
            if restarts_in_an_epoch(trainer):
                guard.note(
                    "resumed inside of an epoch with a loader that does not know where it was: that epoch's rows "
                    "count as often as they were trained on, some twice, some never"
                )
            return
    except Exception as error:
        if on_error == "raise":
            raise
        why = f"{type(error).__name__}: {error}"
    note = f"recording began at step {step} of a resumed run; earlier steps are missing ({why})"
    (guard.warn if trainer.ckpt_path else guard.note)(note)


def _resume_fit_end(saved: dict[str, Any], recorder: Recorder, fit_end: FitEndMethods, on_error: str) -> None:
    """Restores what methods found before the checkpoint; where that fails, the recording is not lost."""
    try:
        fit_end.load_state_dict(saved["fit_end"] if "fit_end" in saved else former(saved["stages"]))
    except Exception as error:
        if on_error == "raise":
            raise
        recorder.guard.warn(f"the checkpoint's scores of earlier stages are lost: {type(error).__name__}: {error}")
