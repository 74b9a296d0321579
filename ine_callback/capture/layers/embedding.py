"""Embeddings: a row's gradient is nonzero only in the entries that it looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.attributes import setting
from ine_callback.capture.layers.calls import LayerCall, register_call
from ine_callback.capture.layers.registry import RowMismatch, register_layer
from ine_callback.capture.per_sample_gradients import GradSample, Lookup, of_entries, sums_by_row


@register_layer(nn.Embedding)
def embedding(module: nn.Module, activations: Tensor, output_grads: Tensor, rows: int) -> dict[str, GradSample]:
    """The activations are the looked-up entries; the padding entry has no gradient."""
    entries, width = setting(module, "num_embeddings"), setting(module, "embedding_dim")
    if activations.dim() == 0 or activations.shape[0] != rows:  # e.g. one list of positions for all rows
        raise RowMismatch(
            f"looked-up entries of shape {tuple(activations.shape)} do not lead with the batch size {rows}"
        )
    ids, output_grads = activations.reshape(rows, -1), output_grads.reshape(rows, -1, width)
    padding = setting(module, "padding_idx")
    if padding is not None:
        output_grads = output_grads * (ids != padding)[..., None]
    if setting(module, "scale_grad_by_freq"):
        output_grads = output_grads / ids.flatten().bincount(minlength=entries)[ids][..., None]
    return {"weight": Lookup(ids, output_grads, entries)}


@register_call(nn.EmbeddingBag)
def read_bags(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> LayerCall:
    """Inputs by name: the entries, where each bag begins, weights. The output has a row for each bag."""
    names = ("input", "offsets", "per_sample_weights")
    given = {name: x for name, x in {**dict(zip(names, args, strict=False)), **kwargs}.items() if x is not None}
    if type(module).forward is not nn.EmbeddingBag.forward or "forward" in vars(module):
        return LayerCall(fault=f"{type(module).__name__} has a forward of its own")
    if setting(module, "mode") == "max":
        return LayerCall(fault="a bag's largest entries (mode='max') are its kernel's alone; use 'sum' or 'mean'")
    if setting(module, "scale_grad_by_freq"):
        return LayerCall(fault="its gradients are scaled by the entries' frequency in the batch (scale_grad_by_freq)")
    return LayerCall(output.detach(), given, {"y": output})


@register_layer(nn.EmbeddingBag)
def embedding_bag(
    module: nn.Module, inputs: dict[str, Tensor], output_grads: dict[str, Tensor], rows: int
) -> dict[str, GradSample]:
    """An embedding whose entries are added up, or averaged, in bags; a row may have several bags."""
    ids, grads = inputs["input"], output_grads["y"]
    if len(grads) % rows:
        raise RowMismatch(f"{len(grads)} bags are not those of {rows} rows")
    bag = _bags(ids, inputs.get("offsets"), setting(module, "include_last_offset"))
    ids, weights = ids.flatten(), torch.ones_like(ids.flatten(), dtype=grads.dtype)
    padding = setting(module, "padding_idx")
    counted = weights if padding is None else weights * (ids != padding)
    if "per_sample_weights" in inputs:
        counted = counted * inputs["per_sample_weights"].flatten()
    if setting(module, "mode") == "mean":
        counted = counted / sums_by_row(counted, bag, len(grads) + 1)[bag].clamp(min=1)
    of_bag = torch.cat([grads, torch.zeros_like(grads[:1])])[bag]
    row = torch.div(bag, len(grads) // rows, rounding_mode="floor")
    lookup = Lookup(ids[:, None], (of_bag * counted[:, None])[:, None], setting(module, "num_embeddings"))
    return {"weight": of_entries(lookup, row.clamp(max=rows), rows)}


def _bags(ids: Tensor, offsets: Tensor | None, has_end: bool) -> Tensor:
    """The bag of each entry; behind the last one's end: the number of bags."""
    places = torch.arange(ids.numel(), device=ids.device)
    if offsets is None:
        return torch.div(places, ids.shape[1], rounding_mode="floor")
    begins = offsets.to(places.dtype)
    bag = torch.searchsorted(begins, places, right=True) - 1
    return bag if has_end else bag.clamp(max=len(begins) - 1)
