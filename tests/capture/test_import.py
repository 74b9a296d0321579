"""What is made when the package is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.long
@pytest.mark.parametrize("mode", ["inference_mode", "no_grad"])
def test_the_package_can_be_imported_where_no_graph_is_made(mode: str) -> None:
    """And records what is trained afterwards."""
    code = f"""
import torch
with torch.{mode}():
    from ine_callback import Recorder
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
x, y = torch.randn(8, 3), torch.randint(2, (8,))
loss_of = lambda net, batch: torch.nn.functional.cross_entropy(net(batch[0]), batch[1])
sgd = torch.optim.SGD(net.parameters(), lr=0.1)
with Recorder(net, sgd, 8, {{"val": (x, y)}}, loss_of, total_steps=4, on_error="raise") as recorder:
    for rows in torch.arange(8).split(4):
        with recorder.batch(rows, (x[rows], y[rows])):
            loss = loss_of(net, (x[rows], y[rows]))
            recorder.see(loss)
            loss.backward()
        sgd.step()
        sgd.zero_grad()
assert recorder.report().run.captured_share == 1.0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
