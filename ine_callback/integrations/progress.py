"""Bars for work at the end of training, in the trainer's own progress bar where it has one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar


def progress_of(trainer: Trainer) -> Callable[[Sequence[Any], str], Iterable[Any]]:
    """A function ``(steps, description)`` that yields the steps and counts them in the trainer's progress bar."""

    def track(steps: Sequence[Any], description: str) -> Iterator[Any]:
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar) and bar.progress is not None:
            task = bar.progress.add_task(description, total=len(steps))
            for step in steps:
                yield step
                bar.progress.update(task, advance=1, visible=True)
            return
        if isinstance(bar, TQDMProgressBar) and not bar.is_disabled:
            from tqdm.auto import tqdm  # type: ignore[import-untyped]  # comes with Lightning

            yield from tqdm(steps, desc=description, leave=False)
            return
        yield from steps

    return track
