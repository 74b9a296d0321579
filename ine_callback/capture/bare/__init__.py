"""Per-sample gradients of bare parameters: used as tensors, outside of any known layer's call.

A class token, a position table, a layer scale, a logit scale, attention's fused weights. Which operations use them is
read off the autograd graph of the loss; a hook on the operation gets the gradient of its output, which is led by rows.
"""

from ine_callback.capture.bare.parameters import BareParameters

__all__ = ["BareParameters"]
