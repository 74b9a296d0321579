"""A recording in a checkpoint: tensors and plain types. The keys are those of all earlier versions."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ine_callback.capture import Block
from ine_callback.recording.guard import Guard
from ine_callback.recording.provenance import Clock
from ine_callback.recording.setup import Parts
from ine_callback.recording.snapshots import Snapshots
from ine_callback.recording.steps import OptimizerSteps
from ine_callback.scoring.compression import Compression


def saved_state(
    guard: Guard, clock: Clock, parts: Parts, steps: OptimizerSteps, snapshots: Snapshots
) -> dict[str, Any]:
    """What :func:`restore_state` goes on from; with several processes, all must call it."""
    together = guard.recording or parts.processes.count == 1  # after the end others may be gone
    if together:
        parts.processes.exchange()
    steps.updates.saved_at = guard.steps
    return {
        "steps": guard.steps,
        "look": steps.updates.next_curvature_update,
        "failed": guard.failed,
        "reason": guard.reason,
        "taken": guard.taken,
        "widest": guard.widest,
        "notes": list(guard.notes),
        "left_out": dict(steps.left_out),
        "started": clock.started.isoformat(),
        "seconds": clock.seconds,
        "snapshots": snapshots.state_dict(),
        "lanes": [{"stepped": lane.stepped, "unused": sorted(lane.unused)} for lane in parts.lanes],
        "ledger": parts.accumulators.state_dict(),
        "store": _of_store(parts, together),
        "signals": parts.signals.state_dict(together) if guard.steps and not guard.failed else None,
    }


def restore_state(
    state: dict[str, Any], guard: Guard, clock: Clock, parts: Parts, steps: OptimizerSteps, snapshots: Snapshots
) -> None:
    """Goes on from what :func:`saved_state` returned.

    Raises:
        InfluenceError: If it was recorded with other queries or methods, or with more rows.
    """
    parts.accumulators.load_state_dict(state["ledger"])
    guard.steps, steps.updates.next_curvature_update = state["steps"], state["look"]
    # checkpoints of 0.1 have no more than the steps
    guard.reason, guard.taken = state.get("reason", ""), state.get("taken", state["steps"])
    guard.widest = state.get("widest", 0)
    if "snapshots" in state:  # earlier checkpoints have none
        snapshots.load_state_dict(state["snapshots"])
    for lane, saved in zip(parts.lanes, state.get("lanes", ()), strict=False):  # earlier checkpoints have none
        lane.stepped, lane.unused = saved["stepped"], set(saved["unused"])
    guard.notes = [*state["notes"], *guard.notes]
    steps.left_out = Counter(state.get("left_out", {}))
    clock.resume(datetime.datetime.fromisoformat(state["started"]), state["seconds"])
    if state["failed"]:
        guard.give_up()
    elif state["signals"] is not None:
        parts.signals.load_state_dict(state["signals"])
        if parts.store is not None:
            _restore_store(state.get("store"), parts, guard)


def _of_store(parts: Parts, together: bool) -> list[dict[str, Any]] | None:
    """Each process's part of the store, or this one's alone."""
    if parts.store is None or parts.store.failure or not parts.store.compression.bases:
        return None
    own = parts.store.vectors.state_dict() | {"blocks": _blocks(parts.store.compression, parts.signals.table.names)}
    return parts.processes.gather(own) if together else [own]


def _restore_store(saved: list[dict[str, Any]] | None, parts: Parts, guard: Guard) -> None:
    """Goes on from the store's parts; a checkpoint without them, or of another number of processes, begins anew."""
    assert parts.store is not None
    if saved is None or len(saved) != parts.processes.count:
        there = "no store" if saved is None else f"a store of {len(saved)} processes"
        guard.warn(f"the gradient store lacks the steps before: the checkpoint holds {there}")
    else:
        own = saved[parts.processes.rank]
        parts.store.vectors.load_state_dict(own)
        parts.store.compression.weights = _weights(own["blocks"], parts.signals.table.names)


def _blocks(compression: Compression, names: Mapping[nn.Parameter, str]) -> list[dict[str, Any]]:
    """The store's blocks as plain types: a run that is resumed after its last step meets none before its end."""
    return [
        {"parameters": [names[p] for p in block.parameters], "layout": block.layout, "tied": block.tied}
        | {"matrix": block.matrix, "outputs": block.outputs, "weight": float(weight)}
        for block, weight in compression.weights.items()
    ]


def _weights(saved: Sequence[Mapping[str, Any]], names: Mapping[nn.Parameter, str]) -> dict[Block, Tensor | float]:
    """What :func:`_blocks` told: the factor of each block's contributions in a step."""
    named = {name: p for p, name in names.items()}
    found: dict[Block, Tensor | float] = {}
    for one in saved:
        parameters = tuple(named[name] for name in one["parameters"])
        kinds = {kind: one[kind] for kind in ("tied", "matrix", "outputs")}
        found[Block(one["parameters"][0], parameters, tuple(one["layout"]), **kinds)] = one["weight"]
    return found
