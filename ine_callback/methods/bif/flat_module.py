"""A module as a function of one flat vector of its trainable parameters, evaluated for many vectors at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.dense_embeddings import DenseEmbeddings

Batch = Any
Function = Callable[[nn.Module, Batch], Tensor]
Named = dict[str, Tensor]
Over = Callable[[Callable[[Named], Tensor]], Callable[[Named], Tensor]]  # vmap, or what does the same for one vector


class FlatModule:
    """Weights [P] in float32 or better, whatever the module's dtypes; the module's own parameters are never written.

    Args:
        module: The model, in evaluation mode. Its trainable parameters make up the vector, each once (tied ones too).

    Attributes:
        module: The module.
        weights: The trained weights w* [P].
        notes: What the report says about how the module was run.

    Example:
        >>> import torch
        >>> flat = FlatModule(torch.nn.Linear(1, 1, bias=False))
        >>> vectors = torch.tensor([[2.0], [3.0]])
        >>> flat.values(vectors, lambda module, x: module(x)[:, 0], torch.ones(1, 1))
        tensor([[2.],
                [3.]])
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self._call = module, Caller(module)
        self._parameters = {name: p for name, p in self._call.named_parameters() if p.requires_grad}
        first = {id(p): name for name, p in self._parameters.items()}
        names = self._call.named_parameters(remove_duplicate=False)
        # found once here, because torch would find tied parameters anew in each call
        self._tied = {name: first[id(p)] for name, p in names if id(p) in first}
        if not self._parameters:
            raise InfluenceError(f"BIF: no parameter of {type(module).__name__} requires a gradient; unfreeze some.")
        parts = [p.detach().flatten() for p in self._parameters.values()]
        widest = torch.float32
        for part in parts:
            widest = torch.promote_types(widest, part.dtype)
        self.weights = torch.cat([part.to(widest) for part in parts])
        self.notes: list[str] = []
        self._batched = True

    def _named(self, vectors: Tensor) -> Named:
        """Vectors [..., P] as named parameters, each [..., *shape]."""
        parts = vectors.split([p.numel() for p in self._parameters.values()], -1)
        named = zip(self._parameters.items(), parts, strict=True)
        return {name: part.view((*vectors.shape[:-1], *p.shape)).to(p.dtype) for (name, p), part in named}

    def _at(self, named: Named, function: Function, batch: Batch) -> Tensor:
        tied = {name: named[first] for name, first in self._tied.items()}
        with DenseEmbeddings():
            value: Tensor = functional_call(self._call, tied, (function, batch), tie_weights=False)
        return value.to(torch.promote_types(value.dtype, torch.float32))

    def values(self, vectors: Tensor, function: Function, batch: Batch) -> Tensor:
        """``function(module, batch)`` [k] at each of the vectors [C, P], as [C, k], without a gradient."""

        def compute(vectors: Tensor, over: Over) -> Tensor:
            return over(lambda named: self._at(named, function, batch))(self._named(vectors))

        with torch.no_grad():
            return self._map(compute, vectors)

    def gradients(self, vectors: Tensor, function: Function, batch: Batch) -> Tensor:
        """Gradient [C, P] of the mean of ``function(module, batch)`` at each of the vectors [C, P]."""

        def compute(vectors: Tensor, over: Over) -> Tensor:
            # autograd around vmap takes a quarter less time than ``vmap(grad(...))``, which wraps every tensor twice
            leaf = vectors.detach().requires_grad_()
            means = over(lambda named: self._at(named, function, batch).mean())(self._named(leaf))
            return torch.autograd.grad(means.sum(), leaf)[0]

        return self._map(compute, vectors)

    def jacobian(self, vector: Tensor, function: Function, batch: Batch) -> Tensor:
        """Gradient [k, P] of every entry of ``function(module, batch)`` [k] at one vector [P]."""
        vector = vector.detach().requires_grad_()
        values = self._at(self._named(vector), function, batch)
        rows = [torch.autograd.grad(value, vector, retain_graph=True)[0] for value in values]
        return torch.stack(rows) if rows else vector.new_zeros(0, len(vector))

    def products(self, directions: Tensor, function: Function, batch: Batch) -> Tensor:
        """Change of ``function(module, batch)`` [k] along each of the directions [C, P] at the trained weights, [C, k].

        A directional derivative costs about two evaluations and needs no gradient of a single row.
        """

        def compute(directions: Tensor, over: Over) -> Tensor:
            def along(direction: Named) -> Tensor:
                change: Tensor = jvp(lambda named: self._at(named, function, batch), (here,), (direction,))[1]
                return change

            return over(along)(self._named(directions))

        here = self._named(self.weights)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward derivative
            return self._map(compute, directions)

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        """No fused attention on a CPU, because vmap would run it chain by chain."""
        return sdpa_kernel(SDPBackend.MATH) if self.weights.device.type == "cpu" else contextlib.nullcontext()

    def _map(self, compute: Callable[[Tensor, Over], Tensor], vectors: Tensor) -> Tensor:
        """All vectors in one batched pass; one by one where the module has an operation that cannot be batched."""
        if not self._batched:
            return _singly(compute, vectors)
        try:
            with self._attention():
                return compute(vectors, partial(vmap, randomness="different")).detach()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            # an error that is not vmap's is raised again by the next line
            single = _singly(compute, vectors)
            self._batched = False
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.notes.append(f"chains ran one by one, which is slower: the model cannot be batched ({first})")
            return single


def _singly(compute: Callable[[Tensor, Over], Tensor], vectors: Tensor) -> Tensor:
    """One vector [1, P] at a time, so that memory does not grow with their number."""

    def alone(function: Callable[[Named], Tensor]) -> Callable[[Named], Tensor]:
        return lambda named: function({name: part[0] for name, part in named.items()})[None]

    return torch.cat([compute(vector[None], alone).detach() for vector in vectors])


class Caller(nn.Module):
    """Lets ``functional_call`` run any function of a module, not only its forward method."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, function: Function, batch: Batch) -> Tensor:
        return function(self.module, batch)
