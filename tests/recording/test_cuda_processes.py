"""Two processes on one GPU, over gloo: they train and record as one process with their joined batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ine_callback import FINE, InfluenceReport, Recorder
from ine_callback.queries import LossQuery
from tests.helpers.identical import unequal
from tests.helpers.once import spawned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ROWS, BATCH, STEPS, DEVICE = 48, 16, 24, "cuda"


def loss_of(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0].to(DEVICE)), batch[1].to(DEVICE))


def trained(rank: int, parts: int, recorded: bool = True) -> tuple[list[Tensor], InfluenceReport | None]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.LayerNorm(16))
    module.append(nn.Linear(16, 3)).to(DEVICE)
    x, y = torch.randn(ROWS + 16, 1, 6, 6), torch.randint(3, (ROWS + 16,))
    order = torch.stack([torch.randperm(ROWS)[:BATCH] for _ in range(STEPS)])
    run = DistributedDataParallel(module) if parts > 1 else module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5)
    queries = {"val": LossQuery((x[ROWS:], y[ROWS:])), "own": "self"}
    options = {"total_steps": STEPS, "refresh_every": 4, "curvature_every": 1, "distributed": parts > 1}
    options |= {"reservoir": 0, "rank": None}  # whose samples and bases depend on how rows are divided
    recorder = Recorder(module, optimizer, ROWS, queries, loss_of, methods=[FINE(closing=False)], **options)
    if recorded:
        recorder.start()
    for batch in order:
        rows = batch[rank::parts]
        recorder.start_batch(rows, (x[rows], y[rows]))
        loss = loss_of(run, (x[rows], y[rows]))
        recorder.see(loss)
        loss.backward()
        recorder.end_batch()
        optimizer.step()
        optimizer.zero_grad()
    recorder.stop()
    return [p.detach().cpu() for p in module.parameters()], recorder.report() if recorded else None


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = trained(rank, 2), trained(rank, 2, recorded=False)[0]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_on_one_device_are_one_training() -> None:
    torch.backends.cudnn.deterministic = True
    ((weights, one), plain), ((_, other), _) = spawned("cuda", process)
    assert not unequal(one, other) and not one.run.uncaptured
    for a, b in zip(weights, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    _, alone = trained(0, 1)
    assert alone is not None and np.array_equal(one.observations, alone.observations)
    np.testing.assert_allclose(one.scores.mu, alone.scores.mu, rtol=2e-4, atol=1e-4)
