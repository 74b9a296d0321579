"""One direction of one recurrent layer, run again: its states, and the gradients of its pre-activations.

Time comes first [T, n, ...]. Each cell runs forward when it is made. ``pre_activation_grads`` is its backward pass through
time, for all rows at once: what loops over time is linear in the gradient of the state, its coefficients are made before.
The equations are those of torch.nn.LSTM, GRU and RNN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        return torch.nn.functional.linear(x, self.w_ih, self.b_ih)

    def of_state(self, h: Tensor) -> Tensor:
        """The state's part of the pre-activations [..., gates * H]."""
        return torch.nn.functional.linear(h, self.w_hh, self.b_hh)


class Cell:
    """What all kinds have.

    Args:
        weights: The weights.
        x: Inputs [T, n, I].
        h: Initial state [n, H].

    Attributes:
        states: The states before each step, and the last one [T + 1, n, H].
    """

    states: Tensor

    def __init__(self, weights: Weights, x: Tensor, h: Tensor) -> None:
        raise NotImplementedError

    def pre_activation_grads(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the input's and of the state's part of the pre-activations [T, n, gates * H].

        Args:
            grad: Gradients of the states after each step [T, n, H], as their other uses give them.
        """
        raise NotImplementedError


class RNN(Cell):
    """``h' = act(W_ih x + W_hh h)``, act: tanh or relu."""

    def __init__(self, weights: Weights, x: Tensor, h: Tensor, relu: bool) -> None:
        self.weights, self.relu, states = weights, relu, [h]
        for each in weights.of_input(x):
            h = weights.of_state(h).add_(each)
            h = h.relu_() if relu else h.tanh_()
            states.append(h)
        self.states = torch.stack(states)

    def pre_activation_grads(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        after = self.states[1:]
        slope = (after > 0).to(after) if self.relu else 1 - after.square()
        out, from_later = torch.empty_like(grad), torch.zeros_like(grad[0])
        for t in reversed(range(len(grad))):
            torch.mul(from_later + grad[t], slope[t], out=out[t])
            from_later = out[t] @ self.weights.w_hh
        return out, out


class GRU(Cell):
    """``h' = (1 - z) n + z h`` with ``n = tanh(W_in x + r (W_hn h))`` and gates r, z."""

    def __init__(self, weights: Weights, x: Tensor, h: Tensor) -> None:
        self.weights, states, gates = weights, [h], []
        for each in weights.of_input(x):
            i_r, i_z, i_n = each.chunk(3, 1)
            h_r, h_z, h_n = weights.of_state(h).chunk(3, 1)
            r, z = (i_r + h_r).sigmoid_(), (i_z + h_z).sigmoid_()
            n = torch.addcmul(i_n, r, h_n).tanh_()
            h = torch.lerp(n, h, z)
            states.append(h)
            gates.append(torch.stack([r, z, n, h_n]))
        self.states, self._gates = torch.stack(states), torch.stack(gates, 1)

    def pre_activation_grads(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        r, z, n, h_n = self._gates
        to_n = (1 - z) * (1 - n.square())
        to_r, to_z = to_n * h_n * r * (1 - r), (self.states[:-1] - n) * z * (1 - z)
        slopes = torch.stack([to_r, to_z, to_n * r], 2)  # of the state's part [T, n, 3, H]
        totals, out, from_later = torch.empty_like(grad), torch.empty_like(slopes), torch.zeros_like(grad[0])
        for t in reversed(range(len(grad))):
            torch.add(from_later, grad[t], out=totals[t])
            torch.mul(totals[t][:, None], slopes[t], out=out[t])
            from_later = torch.addmm(totals[t] * z[t], out[t].flatten(1), self.weights.w_hh)
        of_input = torch.stack([out[:, :, 0], out[:, :, 1], totals * to_n], 2)
        return of_input.flatten(2), out.flatten(2)


class LSTM(Cell):
    """``c' = f c + i g`` and ``h' = o tanh(c')`` with gates i, f, o and g = tanh(...).

    Args:
        c: Initial cell state [n, H].
    """

    def __init__(self, weights: Weights, x: Tensor, h: Tensor, c: Tensor) -> None:
        self.weights, states, cells = weights, [h], [c]
        gates = weights.of_input(x).unflatten(2, (4, -1))
        for each in gates:
            each += weights.of_state(h).view_as(each)
            each[:, :2].sigmoid_()
            each[:, 2].tanh_()
            each[:, 3].sigmoid_()
            i, f, g, o = each.unbind(1)
            c = torch.addcmul(f * c, i, g)
            h = o * c.tanh()
            states.append(h)
            cells.append(c)
        self.states, self._cells, self._gates = torch.stack(states), torch.stack(cells), gates

    def without_output(self, grad: Tensor, total: Tensor) -> Tensor:
        """Gradients of the cell state after a single step, without what came to it through the state h' [1, n, H]."""
        return total - grad * self._gates[:, :, 3] * (1 - self._cells[1:].tanh().square())

    def pre_activation_grads(self, grad: Tensor, grad_c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Also of gradients of the cell states after each step [T, n, H]."""
        i, f, g, o = self._gates.unbind(2)
        tanh_c = self._cells[1:].tanh()
        to_c, to_o = o * (1 - tanh_c.square()), tanh_c * o * (1 - o)
        to_ifg = torch.stack([g * i * (1 - i), self._cells[:-1] * f * (1 - f), i * (1 - g.square())], 2)
        out = torch.empty_like(self._gates)
        from_later, c_from_later = torch.zeros_like(grad[0]), torch.zeros_like(grad[0])
        for t in reversed(range(len(grad))):
            total = from_later + grad[t]
            c_total = torch.addcmul(c_from_later, total, to_c[t])
            if grad_c is not None:
                c_total += grad_c[t]
            torch.mul(c_total[:, None], to_ifg[t], out=out[t, :, :3])
            torch.mul(total, to_o[t], out=out[t, :, 3])
            c_from_later, from_later = c_total * f[t], out[t].flatten(1) @ self.weights.w_hh
        return out.flatten(2), out.flatten(2)
