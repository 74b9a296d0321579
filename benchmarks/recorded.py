"""One recorded step of a training, as all benchmarks take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ine_callback import Recorder

Batch = tuple[Tensor, Tensor]


def recorded_step(
    recorder: Recorder,
    model: nn.Module,
    optimizer: Optimizer,
    loss_of: Callable[[nn.Module, Any], Tensor],
    rows: Tensor,
    batch: Batch,
    scheduler: Any = None,
) -> None:
    """Records the rows of a batch, takes the step, and the scheduler's where there is one."""
    with recorder.batch(rows, batch):
        loss = loss_of(model, batch)
        recorder.see(loss)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if scheduler is not None:
        scheduler.step()
