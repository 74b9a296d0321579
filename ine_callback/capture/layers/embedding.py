"""Embeddings: a row's gradient is nonzero only in the entries that it looked up."""

from __future__ import annotations

from torch import Tensor, nn

from ine_callback.capture.attributes import setting
from ine_callback.capture.layers.registry import RowMismatch, register_layer
from ine_callback.capture.per_sample_gradients import GradSample, Lookup


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
