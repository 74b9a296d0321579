"""Recurrent layers: LSTM, GRU and RNN, and their cells; linear layers at every step of time.

Fused kernels keep the gates and their gradients to themselves, and training must run them as they are. So the layer is
run again on the side, from its inputs and initial states, and backward through time from the gradients of its outputs,
for all rows at once (:mod:`.cells`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ine_callback.capture.attributes import plain_parameters, setting
from ine_callback.capture.errors import LayerError
from ine_callback.capture.layers.calls import LayerCall, register_call
from ine_callback.capture.layers.cells import GRU, LSTM, RNN, Cell, Weights
from ine_callback.capture.layers.linear import bias_of
from ine_callback.capture.layers.registry import RowMismatch, register_layer
from ine_callback.capture.layers.rnn_dropout import masks_between
from ine_callback.capture.per_sample_gradients import GradSample, Outer

_FORWARDS = {kind.forward for kind in (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)}
_DROPOUT = "dropout between its layers is drawn inside of its kernel, so the inputs of the upper layers are not known"


def drops_between_layers(module: nn.Module) -> bool:
    """Whether it is a stack of recurrent layers with dropout between them, which no call in training records."""
    return isinstance(module, nn.RNNBase) and module.num_layers > 1 and module.dropout > 0


@register_call(nn.RNNBase, nn.RNNCellBase)
def read_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> LayerCall:
    """Inputs by name: x, the initial states h and c, and how x is packed. Outputs: y, and the last states h and c."""
    given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
    x, is_cell, inputs = given["input"], isinstance(module, nn.RNNCellBase), dict[str, Tensor]()
    if type(module).forward not in _FORWARDS or "forward" in vars(module):
        return LayerCall(fault=f"{type(module).__name__} has a forward of its own")
    if getattr(module, "proj_size", 0):
        return LayerCall(fault="its states are projected (proj_size)")
    if drops_between_layers(module) and module.training:
        masks = None if isinstance(x, PackedSequence) else masks_between(module, output[0])  # type: ignore[arg-type]
        if masks is None:
            return LayerCall(fault=_DROPOUT)
        inputs |= {f"mask {k}": mask for k, mask in enumerate(masks)}
    if given.get("hx") is not None:
        inputs |= _by_name(given["hx"], "h")
    outputs = _by_name(output, "h") if is_cell else {"y": output[0], **_by_name(output[1], "h")}
    if is_cell and "c" in outputs and outputs["c"].grad_fn is not outputs["h"].grad_fn:
        outputs["total of c"] = outputs.pop("c")  # not fused: h is computed from c, whose gradient has h's part, too
    if isinstance(x, PackedSequence):
        inputs |= {"x": x.data, "sizes": x.batch_sizes}
        inputs |= {} if x.unsorted_indices is None else {"order": x.unsorted_indices}
        outputs["y"] = outputs["y"].data
        return LayerCall(_padded(x.data.detach(), inputs).transpose(0, 1), inputs, outputs)
    if x.dim() != (2 if is_cell else 3):
        return LayerCall(fault=f"its input of shape {tuple(x.shape)} has no dimension of rows")
    led = is_cell or setting(module, "batch_first")
    return LayerCall(x if led else x.transpose(0, 1), {"x": x, **inputs}, outputs)


def _by_name(states: Any, name: str) -> dict[str, Tensor]:
    """The states of an LSTM (h, c), or the state h of another layer."""
    return dict(zip((name, "c"), states if isinstance(states, tuple) else (states,), strict=False))


def _padded(data: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Packed data as [T, n, K], zeros behind the end of each sequence; no size is asked of the device."""
    sizes = inputs["sizes"]
    padded: Tensor = torch._VF._pad_packed_sequence(data, sizes, False, 0.0, len(sizes))[0]
    return padded.index_select(1, inputs["order"]) if "order" in inputs else padded


def _time_first(module: nn.Module, inputs: dict[str, Tensor], x: Tensor) -> Tensor:
    """What a call got or returned at each step, as [T, n, K]."""
    if "sizes" in inputs:
        return _padded(x, inputs)
    if isinstance(module, nn.RNNCellBase):
        return x[None]
    return x.transpose(0, 1) if setting(module, "batch_first") else x


@register_layer(nn.RNNBase, nn.RNNCellBase)
def recurrent(
    module: nn.Module, inputs: dict[str, Tensor], output_grads: dict[str, Tensor], rows: int
) -> dict[str, GradSample]:
    """Weights of the input and of the state: those of linear layers, whose positions are the steps of time."""
    x = _time_first(module, inputs, inputs["x"])
    if x.shape[1] % rows:
        raise RowMismatch(f"its {x.shape[1]} sequences are not those of the batch's {rows} rows")
    layers = _run_again(module, inputs, x)
    out: dict[str, GradSample] = {}
    width = sum(direction.cell.states.shape[2] for direction in layers[-1])
    grad = _time_first(module, inputs, output_grads["y"]) if "y" in output_grads else x.new_zeros(*x.shape[:2], width)
    for k, layer in reversed(list(enumerate(layers))):
        below = torch.zeros_like(layer[0].x)
        for direction, own in zip(layer, grad.chunk(len(layer), 2), strict=True):
            of_input, of_state = direction.pre_activation_grads(own, output_grads)
            left = _by_row(of_input, rows)
            right = left if of_state is of_input else _by_row(of_state, rows)
            out |= {
                f"weight_ih{direction.suffix}": Outer(_by_row(direction.x, rows), left),
                f"bias_ih{direction.suffix}": bias_of(left),
                f"weight_hh{direction.suffix}": Outer(_by_row(direction.states_before(), rows), right),
                f"bias_hh{direction.suffix}": bias_of(right),
            }
            if layer is not layers[0]:
                below += of_input @ direction.cell.weights.w_ih
        grad = below * inputs.get(f"mask {k - 1}", 1.0)
    return out


def _run_again(module: nn.Module, inputs: dict[str, Tensor], x: Tensor) -> list[list[_Direction]]:
    """All layers and directions, from the inputs x [T, n, I]."""
    time = _Time(_time_first(module, inputs, torch.ones_like(inputs["x"][..., :1])))
    layers: list[list[_Direction]] = []
    for suffixes in _suffixes(module):
        places = (len(suffixes) * len(layers) + d for d in range(len(suffixes)))
        layers.append([_Direction(module, inputs, x, time, *each) for each in zip(suffixes, places, strict=True)])
        x = torch.cat([direction.states_after() for direction in layers[-1]], 2)
        x = x * inputs.get(f"mask {len(layers) - 1}", 1.0)
    return layers


def _by_row(x: Tensor, rows: int) -> Tensor:
    """x [T, n, K] as [b, 1, P, K]; a row may have several sequences behind one another."""
    return x.transpose(0, 1).reshape(rows, 1, -1, x.shape[2])


def _suffixes(module: nn.Module) -> list[list[str]]:
    """Endings of the parameters' names, by layer and direction."""
    if isinstance(module, nn.RNNCellBase):
        return [[""]]
    directions = ["", "_reverse"][: 1 + setting(module, "bidirectional")]
    return [[f"_l{k}{ending}" for ending in directions] for k in range(setting(module, "num_layers"))]


class _Time:
    """The steps of sequences that may end early; ``valid`` [T, n, 1] is 1 at a sequence's steps, 0 behind its end."""

    def __init__(self, valid: Tensor) -> None:
        steps = torch.arange(len(valid), device=valid.device)[:, None, None]
        lengths = valid.sum(0).long()
        self._valid, self._at_end = valid > 0, steps == lengths - 1
        self._turned = torch.where(self._valid, lengths - 1 - steps, steps)

    def turned(self, x: Tensor) -> Tensor:
        """Each sequence in the other order of time, from its own end."""
        return x.gather(0, self._turned.expand_as(x))

    def kept(self, x: Tensor) -> Tensor:
        """Zero behind the end, where states that were computed on and on may have overflowed."""
        return torch.where(self._valid, x, 0.0)

    def with_last(self, grad: Tensor, last: Tensor | None) -> Tensor:
        """Adds gradients of the last states [n, H] to those at each step."""
        return grad if last is None else torch.where(self._at_end, grad + last, grad)


class _Direction:
    """One direction of one layer, run again. All it gets and gives is in the order of time."""

    def __init__(
        self, module: nn.Module, inputs: dict[str, Tensor], x: Tensor, time: _Time, suffix: str, place: int
    ) -> None:
        self.x, self.suffix, self._time, self._place = x, suffix, time, place
        weights = _weights(module, suffix, x)
        zeros = x.new_zeros(x.shape[1], weights.w_hh.shape[1])
        h, c = (self._own(inputs, name, zeros) for name in "hc")
        if isinstance(module, nn.LSTM | nn.LSTMCell):
            self.cell: Cell = LSTM(weights, self._turned(x), h, c)
        elif isinstance(module, nn.GRU | nn.GRUCell):
            self.cell = GRU(weights, self._turned(x), h)
        else:
            self.cell = RNN(weights, self._turned(x), h, relu=setting(module, "nonlinearity") == "relu")

    def states_before(self) -> Tensor:
        return self._turned(self._time.kept(self.cell.states[:-1]))

    def states_after(self) -> Tensor:
        return self._turned(self._time.kept(self.cell.states[1:]))

    def pre_activation_grads(self, grad: Tensor, output_grads: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As :meth:`.Cell.pre_activation_grads`; the gradients of the last states are those of all directions."""
        grads = [self._time.with_last(self._turned(grad), self._own(output_grads, "h"))]
        if "c" in output_grads:
            grads.append(self._time.with_last(torch.zeros_like(grads[0]), self._own(output_grads, "c")))
        if "total of c" in output_grads and isinstance(self.cell, LSTM):
            grads.append(self.cell.without_output(grads[0], output_grads["total of c"][None]))
        of_input, of_state = self.cell.pre_activation_grads(*grads)
        turned = self._turned(of_input)
        return turned, turned if of_state is of_input else self._turned(of_state)

    def _turned(self, x: Tensor) -> Tensor:
        return self._time.turned(x) if self.suffix.endswith("_reverse") else x

    def _own(self, states: dict[str, Tensor], name: str, default: Tensor | None = None) -> Any:
        """Its part [n, H] of the states of all directions, or of a cell's."""
        found = states.get(name)
        return default if found is None else found.view(-1, *found.shape[-2:])[self._place]


def _weights(module: nn.Module, suffix: str, like: Tensor) -> Weights:
    parameters, values = plain_parameters(module), list[Tensor | None]()
    for name in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if setting(module, "bias") else ())):
        parameter = parameters.get(f"{name}{suffix}")
        if parameter is None or hasattr(parameter, "full_tensor"):
            raise LayerError(f"its '{name}{suffix}' is computed, or split between processes")
        values.append(parameter.detach().to(like))
    return Weights(*[*values, None, None][:4])  # type: ignore[arg-type]
