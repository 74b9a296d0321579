"""Blocks: parameters with one layout, one direction and one curvature; usually a layer's weight and bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ine_callback.capture.attributes import own_parameters, setting
from ine_callback.capture.errors import LayerError
from ine_callback.capture.layers import layer_function
from ine_callback.capture.layers.convolution import convolution
from ine_callback.capture.layers.embedding import embedding
from ine_callback.capture.layers.linear import linear
from ine_callback.capture.per_sample_gradients import CompressedGradients, GradSample, Lookup, Outer, Vector

_PlaceOf = tuple[str, tuple[nn.Parameter, ...]]


@dataclass(eq=False)
class Block:
    """One or two parameters whose per-sample gradients come as one :class:`~.GradSample`.

    Attributes:
        name: Dotted name of the first parameter.
        parameters: A single parameter, or weight and bias joined as a matrix with the bias as last column.
        layout: Shape of one row's gradient, see :mod:`ine_callback.capture.per_sample_gradients`.
        position: Index of the first parameter among the model's parameters.
        matrix: Whether all its per-sample gradients are of activations and output gradients (:class:`~.Outer`).
        tied: Whether several modules use the parameter (tied weights).
        reused: Whether it was used more than once in one batch: self-influence then needs the sum over uses first.
        outputs: Whether its units are the network's outputs.
        waiting: The contracted uses in the current batch, which wait to be added up.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    layout: tuple[int, ...]
    position: int = 0
    matrix: bool = False
    tied: bool = False
    reused: bool = False
    outputs: bool = False
    waiting: list[GradSample | CompressedGradients] = field(default_factory=list)

    def to_layout(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients of the parameters, each [Q, *shape], as one [Q, *layout]."""
        queries = gradients[0].shape[0]
        if len(self.parameters) == 1:
            return gradients[0].reshape(queries, *self.layout)
        groups, out, inputs = self.layout
        weight = gradients[0].reshape(queries, groups, out, inputs - 1)
        return torch.cat([weight, gradients[1].reshape(queries, groups, out, 1)], -1)

    def fits(self, grad_sample: GradSample) -> bool:
        """Whether per-sample gradients are of the kind that the block's direction and curvature are made for."""
        kinds = Vector if len(self.layout) == 1 else Outer if self.matrix else Outer | Lookup
        return grad_sample.layout == self.layout and isinstance(grad_sample, kinds)

    def from_layout(self, gradient: Tensor) -> list[Tensor]:
        """One gradient [*layout] as a gradient of each parameter, in the parameter's shape."""
        if len(self.parameters) == 1:
            return [gradient.reshape(self.parameters[0].shape)]
        weight, bias = self.parameters
        return [gradient[..., :-1].reshape(weight.shape), gradient[..., -1].reshape(bias.shape)]

    @property
    def key(self) -> str:
        """What identifies the block in other processes and in a resumed training."""
        return f"{self.name} {self.layout}"

    @property
    def elements(self) -> int:
        return sum(p.numel() for p in self.parameters)


def _fitted(grad_sample: GradSample, block: Block, parameter: nn.Parameter) -> GradSample:
    """Gradients of another use of a block's parameter in the block's layout; as they are where that cannot be."""
    joined = len(block.parameters) > 1
    if isinstance(grad_sample, Outer) and joined and parameter is block.parameters[0]:  # without a bias
        formed = grad_sample.formed()
        return Outer(torch.cat([formed, torch.zeros_like(formed[..., :1])], -1), grad_sample.output_grads)
    if len(block.layout) == 1:
        return Vector(grad_sample.wide().gradient(slice(None)).flatten(1))
    groups, out, inputs = block.layout
    if isinstance(grad_sample, Vector) and parameter is block.parameters[-1] and (joined or inputs == 1):  # a bias
        output_grads = grad_sample.g.view(-1, groups, 1, out)
        activations = torch.zeros_like(output_grads[..., :1]).repeat(1, 1, 1, inputs)
        activations[..., -1] = 1
        return Outer(activations, output_grads)
    return grad_sample


class BlockTable:
    """Finds or makes the block of all per-sample gradients; knows which parameters are tied between modules.

    Args:
        module: The model.
        joinable: Whether a weight and its bias have the same learning rate, so that they can share a direction.
    """

    def __init__(
        self, module: nn.Module, joinable: Callable[[nn.Parameter, nn.Parameter], bool] = lambda a, b: True
    ) -> None:
        self._joinable = joinable
        self.names = {p: n for n, p in module.named_parameters()}
        self._positions = {p: k for k, p in enumerate(self.names)}
        uses: dict[nn.Parameter, int] = {}
        self._first: dict[tuple[nn.Module, str], nn.Parameter] = {}
        for child in module.modules():
            for name, parameter in own_parameters(child).items():
                uses[parameter] = uses.get(parameter, 0) + 1
                self._first[child, name] = parameter
        self._tied = {p for p, count in uses.items() if count > 1}
        self._blocks: dict[tuple[nn.Parameter, ...], Block] = {}
        self._joined: dict[nn.Parameter, Block] = {}  # blocks of a weight and its bias, by either
        self._refused: set[nn.Parameter] = set()
        self._places: dict[tuple[object, ...], list[_PlaceOf]] = {}  # by layers and their kinds of gradients
        self._from_fallback: set[nn.Parameter] = set()

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks.values())

    def sort(self, module: nn.Module, grad_samples: Mapping[str, GradSample]) -> list[tuple[Block, GradSample]]:
        """Pairs the per-sample gradients of a module call with blocks; joins weight and bias if both are matrices."""
        kind = (module, *grad_samples, *map(type, grad_samples.values()))
        places = self._places.get(kind)
        if places is None:
            places = self._places[kind] = self._find(module, grad_samples)
        pairs = []
        for name, joined in places:
            parameter, grad_sample = self._parameter(module, name), grad_samples[name]
            if joined:
                assert isinstance(grad_sample, Outer)
                grad_sample, parameters = grad_sample.with_bias(), joined
            else:
                block = self._joined.get(parameter) or self._blocks.get((parameter,))
                if block is not None and block.layout != grad_sample.layout:
                    grad_sample = _fitted(grad_sample, block, parameter)
                parameters = block.parameters if block else (parameter,)
            pairs.append((self._block(parameters, grad_sample), grad_sample))
        return pairs

    def _find(self, module: nn.Module, grad_samples: Mapping[str, GradSample]) -> list[_PlaceOf]:
        """What becomes of per-sample gradients of such kinds: names, and the parameters of those that are joined."""
        places: list[_PlaceOf] = []
        left = [name for name in grad_samples if self._parameter(module, name) not in self._refused]
        for name in [name for name in left if name.startswith("weight")]:
            of_bias = name.replace("weight", "bias", 1)
            both = of_bias in left and all(isinstance(grad_samples[one], Outer) for one in (name, of_bias))
            parameters = tuple(self._parameter(module, one) for one in (name, of_bias)) if both else ()
            if both and not self._tied.intersection(parameters) and self._joinable(*parameters):
                places.append((name, parameters))
                left = [one for one in left if one not in (name, of_bias)]
        return places + [(name, ()) for name in left]

    def tie(self, parameter: nn.Parameter) -> None:
        """A parameter is also used outside of its layer's call, which may come first in a backward pass.

        The block of a table must take other gradients than lookups, too. A weight still shares its block with the bias.
        """
        if any(parameter in set(block.parameters) for block in self):
            return
        for module, name in [place for place, p in self._first.items() if p is parameter]:
            bias = self._first.get((module, name.replace("weight", "bias", 1)))
            weight = self._first.get((module, name.replace("bias", "weight", 1)))
            if layer_function(module) is embedding:
                self._tied.add(parameter)
                self._places.clear()
            elif weight is not None and bias is not None and weight is not bias:
                self._join(module, weight, bias)

    def _join(self, module: nn.Module, weight: nn.Parameter, bias: nn.Parameter) -> None:
        """Makes the block of a weight and its bias before either comes, where its layer gives both as matrices."""
        both = weight.requires_grad and bias.requires_grad and not self._tied.intersection((weight, bias))
        if both and layer_function(module) in (linear, convolution) and self._joinable(weight, bias):
            groups = setting(module, "groups", 1)
            layout = (groups, len(weight) // groups, weight[0].numel() + 1)
            self._add(Block(self.names[weight], (weight, bias), layout, self._positions[weight], matrix=True))

    def trainable(self, module: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """A module's own trainable parameters: as the module uses them now, and as the optimizer has them."""
        named = module._parameters.items()
        return [(p, self._parameter(module, name)) for name, p in named if p is not None and p.requires_grad]

    def _parameter(self, module: nn.Module, name: str) -> nn.Parameter:
        """The optimizer's parameter. During a pass, FSDP2 replaces it in the module by an unsharded one."""
        found = self._first.get((module, name))
        if found is None:  # a known one by another name than before
            found = next((p for own, p in own_parameters(module).items() if own == name and p in self._positions), None)
        if found is None:
            raise LayerError(f"its parameter '{name}' was not there when the recording began")
        return found

    def _block(self, parameters: tuple[nn.Parameter, ...], grad_sample: GradSample) -> Block:
        if parameters not in self._blocks:
            first = parameters[0]
            name, position, tied = self.names[first], self._positions[first], first in self._tied
            matrix = isinstance(grad_sample, Outer) and not tied
            self._add(Block(name, parameters, grad_sample.layout, position, matrix, tied))
        block = self._blocks[parameters]
        if not block.fits(grad_sample):
            raise LayerError(
                f"its function returned a {type(grad_sample).__name__} of {grad_sample.layout} for '{block.name}', "
                f"which does not fit the {'Outer' if block.matrix else 'gradients'} of {block.layout} of earlier calls"
            )
        return block

    def state_dict(self) -> list[dict[str, Any]]:
        """The blocks that layers made, in their order; plain types."""
        kinds = ("layout", "matrix", "reused", "outputs")
        return [
            {"parameters": [self.names[p] for p in block.parameters]} | {kind: getattr(block, kind) for kind in kinds}
            for block in self
            if self._from_fallback.isdisjoint(block.parameters)
        ]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Makes the blocks that :meth:`state_dict` told of, before their layers are called."""
        named = {name: p for p, name in self.names.items()}
        for saved in state:
            parameters = tuple(named[name] for name in saved["parameters"])
            first = parameters[0]
            kinds = {**saved, "layout": tuple(saved["layout"]), "parameters": parameters}
            self._add(Block(name=self.names[first], position=self._positions[first], tied=first in self._tied, **kinds))

    def _add(self, block: Block) -> None:
        self._blocks[block.parameters] = block
        if len(block.parameters) > 1:
            self._joined.update(dict.fromkeys(block.parameters, block))

    def vector(self, parameter: nn.Parameter) -> Block:
        """The block of a parameter whose per-sample gradients come from the fallback."""
        self._from_fallback.add(parameter)
        return self._block((parameter,), Vector(parameter.detach().reshape(1, -1)))

    def drop(self, block: Block) -> None:
        """Drops a block: its parameters are refused from now on."""
        self._remove(block)
        self._refused.update(block.parameters)

    def drop_all(self, lost: nn.Module | nn.Parameter) -> list[Block]:
        """Refuses a module's parameters, or one, from now on; returns the dropped blocks, which others may use too."""
        found = {p for (owner, _), p in self._first.items() if owner is lost}
        refused = ({lost} if isinstance(lost, nn.Parameter) else found) - self._from_fallback
        self._refused |= refused
        self._places.clear()
        dropped = [block for block in self if refused.intersection(block.parameters)]
        for block in dropped:
            self.drop(block)
        return dropped

    def follow(self, module: nn.Module, root: nn.Module) -> list[Block]:
        """Takes a module's parameters by the names that they have now in ``root``; returns their blocks, now gone."""
        self.names = {p: name for name, p in root.named_parameters()}
        own = {name: p for name, p in own_parameters(module).items() if p in self._positions}
        others = {place: p for place, p in self._first.items() if place[0] is not module}
        self._first = others | {(module, name): p for name, p in own.items()}
        self._places.clear()
        gone = [block for block in self if not set(own.values()).isdisjoint(block.parameters)]
        for block in gone:
            self._remove(block)
        return gone

    def _remove(self, block: Block) -> None:
        self._places.clear()
        del self._blocks[block.parameters]
        for parameter in block.parameters:
            self._joined.pop(parameter, None)

    def owners(self, block: Block) -> list[nn.Module]:
        """The modules that use one of a block's parameters."""
        return [owner for (owner, _), p in self._first.items() if any(p is one for one in block.parameters)]

    def captured(self) -> set[nn.Parameter]:
        """Parameters whose per-sample gradients come from layer functions."""
        return {p for block in self for p in block.parameters} - self._from_fallback
