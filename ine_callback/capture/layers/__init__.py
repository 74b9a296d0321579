"""How the layers of each type compute per-sample gradients: one small function each, one file a family.

A new type needs one decorated function, here or in a user's code::

    @register_layer(MyLayer)
    def my_layer(module, activations, output_grads, rows):
        return {"scale": torch.einsum("b...d,b...d->bd", activations, output_grads)}
"""

from ine_callback.capture.layers import (  # noqa: F401  register their types
    convolution,
    embedding,
    linear,
    normalization,
    recurrent,
)
from ine_callback.capture.layers.registry import (
    LayerFunction,
    RowMismatch,
    by_row,
    entries_of,
    given_parameters,
    grad_samples_of,
    is_capturable,
    is_users,
    layer_function,
    register_layer,
)

__all__ = [
    "LayerFunction",
    "RowMismatch",
    "by_row",
    "entries_of",
    "given_parameters",
    "grad_samples_of",
    "is_capturable",
    "is_users",
    "layer_function",
    "register_layer",
]
