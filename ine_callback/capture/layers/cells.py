"""One direction of one recurrent layer, run again: its states, and the gradients of its pre-activations.

Time comes first [T, n, ...]. A cell runs forward when it is made: torch's own operation gives the states, and these the
gates of all steps at once. ``pre_activation_grads`` is the backward pass through time, of all rows at once: linear in
the states' gradients, with coefficients that are known before. The equations are those of torch.nn.LSTM, GRU and RNN.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class Weights:
    """The weights of one direction of one layer.

    Attributes:
        w_ih: Of the input [gates * H, I].
        w_hh: Of the last state [gates * H, H].
        b_ih: The input's biases [gates * H], or None.
        b_hh: The state's biases, or None.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None

    def of_input(self, x: Tensor) -> Tensor:
        """The input's part of the pre-activations [T, n, gates * H]."""
        return linear(x, self.w_ih, self.b_ih)

    def of_state(self, h: Tensor) -> Tensor:
        """The state's part of the pre-activations [T, n, gates * H]."""
        return linear(h, self.w_hh, self.b_hh)

    def states(self, run: Callable[..., Any], x: Tensor, *initial: Tensor) -> Tensor:
        """The states before each step and after the last one [T + 1, n, H], by an operation of torch."""
        flat = [each for each in (self.w_ih, self.w_hh, self.b_ih, self.b_hh) if each is not None]
        first = tuple(each[None].contiguous() for each in initial)
        with _without_cudnn():
            after = run(x, first if len(first) > 1 else first[0], flat, len(flat) > 2, 1, 0.0, False, False, False)[0]
        return torch.cat([first[0], after])


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """cuDNN warns of weights that are not in one piece of memory. ``cudnn.flags`` would set TF32's flags as well."""
    enabled = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(enabled)


class Cell(ABC):
    """What all kinds have.

    Attributes:
        weights: Its weights.
        states: The states before each step, and the last one [T + 1, n, H].
    """

    weights: Weights
    states: Tensor

    @abstractmethod
    def pre_activation_grads(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the input's and of the state's part of the pre-activations [T, n, gates * H].

        Args:
            grad: Gradients of the states after each step [T, n, H], as their uses outside of the layer give them.
        """


class RNN(Cell):
    """``h' = act(W_ih x + W_hh h)``, act: tanh or relu.

    Args:
        weights: The weights.
        x: Inputs [T, n, I].
        h: Initial state [n, H].
        relu: Whether act is relu.
    """

    def __init__(self, weights: Weights, x: Tensor, h: Tensor, relu: bool) -> None:
        self.weights = weights
        self.states = weights.states(torch._VF.rnn_relu if relu else torch._VF.rnn_tanh, x, h)
        after = self.states[1:]
        self._slope = (after > 0).to(after) if relu else 1 - after.square()

    def pre_activation_grads(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        out, from_later = torch.empty_like(grad), torch.zeros_like(grad[0])
        for t in reversed(range(len(grad))):
            torch.mul(from_later + grad[t], self._slope[t], out=out[t])
            from_later = out[t] @ self.weights.w_hh
        return out, out


class GRU(Cell):
    """``h' = (1 - z) n + z h`` with ``n = tanh(W_in x + r (W_hn h))`` and gates r, z.

    Args:
        weights: The weights.
        x: Inputs [T, n, I].
        h: Initial state [n, H].
    """

    def __init__(self, weights: Weights, x: Tensor, h: Tensor) -> None:
        self.weights, self.states = weights, weights.states(torch._VF.gru, x, h)
        before = self.states[:-1]
        i_r, i_z, i_n = weights.of_input(x).chunk(3, 2)
        h_r, h_z, h_n = weights.of_state(before).chunk(3, 2)
        r, z = (i_r + h_r).sigmoid_(), (i_z + h_z).sigmoid_()
        n = torch.addcmul(i_n, r, h_n).tanh_()
        to_n = (1 - z) * (1 - n.square())
        # of each gate's pre-activation, by that of h' [T, n, 3, H]: the input's part, and the state's
        self._of_input = torch.stack([to_n * h_n * r * (1 - r), (before - n) * z * (1 - z), to_n], 2)
        self._of_state = torch.cat([self._of_input[:, :, :2], (to_n * r)[:, :, None]], 2)
        self._z = z

    def pre_activation_grads(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        totals, out = torch.empty_like(grad), torch.empty_like(self._of_state)
        from_later = torch.zeros_like(grad[0])
        for t in reversed(range(len(grad))):
            torch.add(from_later, grad[t], out=totals[t])
            torch.mul(totals[t][:, None], self._of_state[t], out=out[t])
            from_later = torch.addmm(totals[t] * self._z[t], out[t].flatten(1), self.weights.w_hh)
        return (totals[:, :, None] * self._of_input).flatten(2), out.flatten(2)


class LSTM(Cell):
    """``c' = f c + i g`` and ``h' = o tanh(c')`` with gates i, f, o and g = tanh(...).

    Args:
        weights: The weights.
        x: Inputs [T, n, I].
        h: Initial state [n, H].
        c: Initial cell state [n, H].
    """

    def __init__(self, weights: Weights, x: Tensor, h: Tensor, c: Tensor) -> None:
        self.weights, self.states = weights, weights.states(torch._VF.lstm, x, h, c)
        gates = weights.of_input(x).add_(weights.of_state(self.states[:-1])).unflatten(2, (4, -1))
        i, f, o = (gates[:, :, k].sigmoid() for k in (0, 1, 3))
        g = gates[:, :, 2].tanh()
        cells, gained = torch.cat([c[None], torch.empty_like(g)]), i * g
        for t in range(len(g)):
            torch.addcmul(gained[t], f[t], cells[t], out=cells[t + 1])
        tanh_c = cells[1:].tanh()
        self._f, self._to_c = f, o * (1 - tanh_c.square())
        self._to_ifg = torch.stack([g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g.square())], 2)
        self._to_o = tanh_c * o * (1 - o)

    def without_output(self, grad: Tensor, total: Tensor) -> Tensor:
        """Gradients of the cell state after a single step, without what came to it through the state h' [1, n, H]."""
        through_state: Tensor = grad * self._to_c
        return total - through_state

    def pre_activation_grads(self, grad: Tensor, grad_c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Also of gradients of the cell states after each step [T, n, H]."""
        out = grad.new_empty(*grad.shape[:2], 4, grad.shape[2])
        from_later, c_from_later = torch.zeros_like(grad[0]), torch.zeros_like(grad[0])
        for t in reversed(range(len(grad))):
            total = from_later + grad[t]
            c_total = torch.addcmul(c_from_later, total, self._to_c[t])
            if grad_c is not None:
                c_total += grad_c[t]
            torch.mul(c_total[:, None], self._to_ifg[t], out=out[t, :, :3])
            torch.mul(total, self._to_o[t], out=out[t, :, 3])
            c_from_later, from_later = c_total * self._f[t], out[t].flatten(1) @ self.weights.w_hh
        return out.flatten(2), out.flatten(2)
