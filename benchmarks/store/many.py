"""Hundreds of queries in the run: memory and time of their directions, and what GPT-2 small would need."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.lds.measure import measure
from benchmarks.lds.problems import Transformer, row_losses
from benchmarks.recorded import recorded_step
from ine_callback import Recorder
from ine_callback.curvature.low_rank import FORCED_RANK, MAX_FRACTION, MAX_RANK
from ine_callback.scoring import refresh

QUERIES, ROWS, LENGTH, CHARACTERS = 481, 32, 32, 65
BATCH, STEPS = 4, 4
GPT2 = {"blocks": 12, "width": 768, "vocabulary": 50257, "positions": 1024}


def loss_of(module: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over tokens."""
    return row_losses(module(batch[0]), batch[1]).mean()


def steps(queries: int, width: int, blocks: int, whole: int, chunk: int) -> dict[str, float]:
    """Seconds of the first step, which makes directions, and of others; bytes of the directions."""
    refresh.WHOLE_BYTES, refresh.CHUNK_BYTES = whole, chunk
    torch.manual_seed(0)
    model = Transformer(CHARACTERS, LENGTH, width, 4, blocks)
    x, xq = (torch.randint(CHARACTERS, (n, LENGTH + 1)) for n in (ROWS, queries))
    asked = {f"row {k}": (xq[k : k + 1, :-1], xq[k : k + 1, 1:]) for k in range(queries)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recorder = Recorder(model, optimizer, ROWS, asked, loss_of, total_steps=100, refresh_every=100, on_error="raise")
    recorder.start()
    seconds = []
    for rows in torch.arange(ROWS).split(BATCH)[:STEPS]:
        started, batch = time.process_time(), (x[rows, :-1], x[rows, 1:])
        recorded_step(recorder, model, optimizer, loss_of, rows, batch)
        seconds.append(time.process_time() - started)
    retained = recorder.signals.retained_variance
    recorder.stop(closing=False)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "first step": seconds[0],
        "other steps": min(seconds[1:]),
        "retained": 1.0 if retained is None else float(retained),
    }


def measured(queries: int, width: int, blocks: int, chunked: bool) -> dict[str, Any]:
    """In a process of its own, with its peak of memory."""
    sizes = (0, refresh.CHUNK_BYTES // 8) if chunked else (2**62, 2**62)
    found = measure(partial(steps, queries, width, blocks, *sizes))
    one = 4 * found.result["parameters"]
    return {
        "queries": queries,
        "chunked": chunked,
        **found.result,
        "peak_mb": found.peak_mb,
        "gradients_mb": one * queries / 1e6,
        "chunk": max(1, sizes[1] // one),
    }


def gpt2_small(queries: int) -> dict[str, float]:
    """Gigabytes: whole gradients of all queries, directions by chunks at most, and what making a chunk takes."""
    width, blocks = GPT2["width"], GPT2["blocks"]
    sides = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * blocks  # outputs, inputs
    sides.append((width, GPT2["vocabulary"]))  # the tied head, transposed
    others = GPT2["positions"] * width + blocks * 13 * width + 2 * width  # held as they are
    parameters = sum(o * i for o, i in sides) + others
    size = max(1, refresh.CHUNK_BYTES // (4 * parameters))
    directions = 4.0 * queries * others
    for outputs, inputs in sides:
        rank = min(FORCED_RANK * size, MAX_RANK, int(MAX_FRACTION * inputs))
        directions += 4 * rank * (queries * outputs + -(-queries // size) * inputs)
    return {
        "queries": queries,
        "queries in a chunk": size,
        "whole gradients": 4e-9 * parameters * queries,
        "directions": 1e-9 * directions,
        "making a chunk": 3 * 4e-9 * parameters * size,
    }


def all_of(quick: bool) -> dict[str, Any]:
    """A transformer of 4 blocks and width 256 with many queries by chunks, with fewer both ways, and GPT-2 small."""
    width, blocks, few, many = (32, 1, 6, 9) if quick else (256, 4, 48, QUERIES)
    rows = [measured(few, width, blocks, False), measured(few, width, blocks, True)]
    rows.append(measured(many, width, blocks, True))
    return {"rows": rows, "gpt2": gpt2_small(QUERIES)}
