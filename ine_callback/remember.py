"""What an object holds, remembered and put back: which object each name holds, and what is in it.

The walk only reads, and calls nothing that a user's class can define (no ``__eq__``, ``__getattr__``, ``__copy__`` or
property): identities are compared, and the methods of the base types are called. Putting back writes only what was
changed, so that what nobody touched may be shared with a live graph, with read-only memory or with another thread.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import random
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import UninitializedTensorMixin
from torchmetrics import Metric

DEEP = 10_000  # containers longer than this (a data set kept as an attribute) are restored one level deep

Restore = Callable[[], None]

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
# What is written to a file is output, as what is printed; a reader's place cannot always be told.
_OUTPUT = (io.IOBase, np.memmap)
# The machinery of a training goes on while a step runs on the side (and holds our own recording).
_MACHINERY = ("lightning", "pytorch_lightning", "lightning_fabric", "ine_callback", "logging", "multiprocessing")
_TORCH_MACHINERY = ("torch.utils.", "torch.optim.", "torch.distributed.", "torch.profiler.", "torch.amp.")
_LIVE = (type(threading.Lock()), type(threading.RLock()), threading.Thread, threading.Condition, threading.Event)
_FROZEN_SHARE = 2  # frozen parameters are kept up to so many times the trained ones: copies of the model, no backbone
_UNSET = object()


class Memory:
    """Remembers what objects hold.

    Args:
        register: Takes what puts one thing back; called before anything is changed.
    """

    def __init__(self, register: Callable[[Restore], None]) -> None:
        self._register = register
        self._seen: dict[int, object] = {}  # holds the objects, so that no other one gets their ids
        self._stand_ins: dict[int, object] = {}
        self._lend: list[Callable[[], None]] = []
        self._parameters: list[nn.Parameter] = []

    def take(self, *objects: object) -> None:
        """Remembers objects and all that they reach.

        Raises:
            RuntimeError: If something can be changed, and cannot be remembered; nothing was changed then.
        """
        waiting: list[object] = list(objects)
        while waiting:
            value = waiting.pop()
            kind = type(value)
            if kind in _ATOMS or id(value) in self._seen or issubclass(kind, _CODE + _OUTPUT):
                continue
            self._seen[id(value)] = value
            try:
                waiting.extend(self._parts(value, kind))
            except Exception as error:
                raise RuntimeError(
                    f"{kind.__name__} cannot be remembered ({type(error).__name__}: {error}), so nothing that may "
                    "change it can be run on the side; keep it off the module"
                ) from error
        self._keep_parameters()

    def lend(self) -> None:
        """Puts stand-ins in the place of what must not be touched. From here on things change."""
        for lend in self._lend:
            lend()

    def _parts(self, value: Any, kind: type) -> Iterable[object]:
        """Remembers one object; returns what it holds."""
        if issubclass(kind, Tensor):
            self._tensor(value)
        elif issubclass(kind, np.ndarray):
            self._array(value)
        elif (state := generator_state(value)) is not None:
            self._register(state)
            return ()
        elif _is_spent_by_reading(value, kind):
            self._stand_ins[id(value)] = _Sealed(kind.__name__)
            return ()
        return [*self._contents(value, kind), *self._attributes(value, kind)]

    # -- what holds others --------------------------------------------------------------------------------------------

    def _contents(self, value: Any, kind: type) -> Iterable[object]:
        if issubclass(kind, tuple | frozenset):
            parts = list(tuple.__iter__(value) if issubclass(kind, tuple) else frozenset.__iter__(value))
        elif issubclass(kind, types.MappingProxyType):  # read-only itself, but not what it shows
            parts = list(value.values())
        elif issubclass(kind, dict):
            parts = self._mapping(value, OrderedDict if issubclass(kind, OrderedDict) else dict)
        elif issubclass(kind, list | deque):
            parts = self._sequence(value, list if issubclass(kind, list) else deque)
        elif issubclass(kind, set):
            return self._set(value)
        else:
            return ()
        return parts if len(parts) <= DEEP else ()

    def _mapping(self, value: Any, base: Any) -> list[object]:
        before = list(base.items(value))

        def restore() -> None:
            if not _same([x for pair in base.items(value) for x in pair], [x for pair in before for x in pair]):
                base.clear(value)
                base.update(value, before)

        def lend() -> None:
            for key, part in before:
                if (other := self._lent(part)) is not part:
                    base.__setitem__(value, key, other)

        self._register(restore)
        self._lend.append(lend)
        return [part for _, part in before]

    def _sequence(self, value: Any, base: Any) -> list[object]:
        before = list(base.__iter__(value))

        def restore() -> None:
            if not _same(list(base.__iter__(value)), before):
                base.clear(value)
                base.extend(value, before)

        def lend() -> None:
            for k, part in enumerate(before):
                if (other := self._lent(part)) is not part:
                    base.__setitem__(value, k, other)

        self._register(restore)
        if len(before) <= DEEP:
            self._lend.append(lend)
        return before

    def _set(self, value: Any) -> Iterable[object]:
        before = set.copy(value)
        identities = set(map(id, before))

        def restore() -> None:
            if set(map(id, set.__iter__(value))) != identities:
                set.clear(value)
                set.update(value, before)

        self._register(restore)
        return before if len(before) <= DEEP else ()

    def _attributes(self, value: Any, kind: type) -> Iterable[object]:
        own = attributes(value)
        is_module = issubclass(kind, nn.Module)
        slots = list(_slots(value, kind))
        parts = [*(() if own is None else own.values()), *(part for _, part in slots)]
        if not is_module and (_is_machinery(kind) or any(issubclass(type(part), _LIVE) for part in parts)):
            return ()  # what holds a lock belongs to several threads: turning it back would be a change
        if issubclass(kind, Metric):  # updates write to states in place: on copies, and the states stay as they are
            for part in parts:
                if issubclass(type(part), Tensor):
                    self._stand_in(part)
        self._slots(value, slots)
        if own is None:
            return parts
        if is_module and any(map(_is_moved_by_fsdp, own.get("_parameters", {}).values())):
            self._seen[id(own["_parameters"])] = own["_parameters"]
        self._seen[id(own)] = own
        self._mapping(own, dict)
        if issubclass(kind, torch.jit.ScriptModule):  # keeps its buffers elsewhere
            parts.extend(value.buffers(recurse=False))
        return parts if len(parts) <= DEEP else ()

    def _slots(self, value: object, slots: list[tuple[Any, object]]) -> None:
        def write(slot: Any, part: object) -> None:
            if part is not _slot(slot, value):
                slot.__delete__(value) if part is _UNSET else slot.__set__(value, part)

        def lend() -> None:
            for slot, part in slots:
                write(slot, self._lent(part))

        if slots:
            self._register(lambda: [write(*each) for each in slots].clear())
            self._lend.append(lend)

    # -- tensors and arrays -------------------------------------------------------------------------------------------

    def _tensor(self, value: Tensor) -> None:
        if issubclass(type(value), UninitializedTensorMixin) or _is_moved_by_fsdp(value) or value.is_meta:
            return  # nothing in it, or not ours to move
        if value.is_inference() or value.grad_fn is not None:
            self._stand_in(value)  # part of a graph: writing to it, even the same, would break that
        elif issubclass(type(value), nn.Parameter):
            self._parameters.append(value)  # type: ignore[arg-type]
        elif id(value) not in self._stand_ins:
            self._register(_tensor_restore(value))

    def _stand_in(self, value: Any) -> None:
        self._stand_ins.setdefault(id(value), value.detach().clone())

    def _lent(self, value: Any) -> Any:
        """What takes the place of a value meanwhile."""
        other = self._stand_ins.get(id(value), value)
        if other is value and issubclass(type(value), tuple) and self._stand_ins and len(value) <= DEEP:
            parts = [self._lent(part) for part in tuple.__iter__(value)]
            if not _same(parts, list(tuple.__iter__(value))):
                return tuple.__new__(type(value), parts)
        return other

    def _array(self, value: Any) -> None:
        if value.flags.writeable:
            before = np.array(value, subok=False)
            self._register(lambda: np.copyto(value, before))

    def _keep_parameters(self) -> None:
        """Steps may write to them: momentum copies of the model, weights that are normalized before they are used."""
        found, self._parameters = self._parameters, []
        sizes = {True: 0, False: 0}
        for p in found:
            sizes[p.requires_grad] += p.numel() * p.element_size()
        for p in found:
            small = p.requires_grad or sizes[False] <= _FROZEN_SHARE * sizes[True]
            self._register(_tensor_restore(p) if small else _untouched(p))
            if p.grad is not None:  # a backward pass inside of a step would add to it
                self._register(functools.partial(setattr, p, "grad", p.grad))
                self._lend.append(functools.partial(setattr, p, "grad", None))
            else:
                self._register(functools.partial(setattr, p, "grad", None))


class _Sealed:
    """Stands for an iterator that cannot be turned back: what asks it for more fails, and the training's loses nothing."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __iter__(self) -> _Sealed:
        return self

    def __next__(self) -> NoReturn:
        raise RuntimeError(
            f"a step takes from a {self._kind} that the module holds; it cannot be turned back, so the step cannot be "
            "run on the side: pass a callable query (module, batch) -> scalar that leaves it alone"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return next(self)


def attributes(value: object) -> dict[str, Any] | None:
    """The attributes that an instance holds itself, read past whatever its class defines."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except Exception:
        return None
    return found if type(found) is dict else None


def generator_state(value: Any) -> Restore | None:
    """How to turn a random number generator back; None for anything else."""
    kind = type(value)
    if issubclass(kind, torch.Generator):
        state = value.get_state()
        return lambda: _ignore(value.set_state(state))
    if issubclass(kind, np.random.Generator):
        return generator_state(value.bit_generator)
    if issubclass(kind, np.random.BitGenerator):
        bits = copy.deepcopy(value.state)
        return lambda: setattr(value, "state", bits)
    if issubclass(kind, np.random.RandomState):
        legacy = value.get_state()
        return lambda: value.set_state(legacy)
    if issubclass(kind, random.Random) and not issubclass(kind, random.SystemRandom):
        python = value.getstate()
        return lambda: value.setstate(python)
    return None


def _ignore(result: object) -> None:
    """Makes a restoring call return nothing."""


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _slots(value: object, kind: type) -> Iterator[tuple[Any, object]]:
    """The slots of a class and what an instance holds in them."""
    for parent in kind.__mro__:
        if "__slots__" in parent.__dict__:
            for slot in parent.__dict__.values():
                if type(slot) is types.MemberDescriptorType:
                    yield slot, _slot(slot, value)


def _slot(slot: Any, value: object) -> object:
    try:
        return slot.__get__(value, type(value))
    except AttributeError:
        return _UNSET


def _is_machinery(kind: type) -> bool:
    names = [str(parent.__dict__.get("__module__")) for parent in kind.__mro__]
    return any(name.partition(".")[0] in _MACHINERY or f"{name}.".startswith(_TORCH_MACHINERY) for name in names)


def _is_spent_by_reading(value: object, kind: type) -> bool:
    """Whether it is an iterator whose place nobody can read: a generator, a loader's iterator, one of itertools."""
    return issubclass(kind, Iterator) and (attributes(value) is None or _is_machinery(kind))


def _is_moved_by_fsdp(value: object) -> bool:
    return hasattr(type(value), "full_tensor")


def _tensor_restore(value: Tensor) -> Restore:
    """How to put a leaf's contents back in place, for others may hold it or share its memory."""
    data, before, learns = value.data, value.detach().clone(), value.requires_grad
    version = _unsafe_preserve_version_counter(value)
    plain = value.layout is torch.strided and not value.is_quantized and not value.is_nested

    def restore() -> None:
        if value.grad_fn is not None:  # written to in place by what requires a gradient
            value.detach_()
        if value.requires_grad != learns:
            value.requires_grad_(learns)
        if plain and (value.data_ptr() != data.data_ptr() or value.shape != data.shape):
            value.data = data
        # BatchNorm hides its changes from the version, and so does `.data`.
        if value._version != version.prev_versions[0] or (plain and not torch.equal(data, before)):
            data.copy_(before)
            version.__exit__()  # a live graph may have saved it: the contents are as they were

    return restore


def _untouched(value: Tensor) -> Restore:
    version = value._version

    def check() -> None:
        if value._version != version:
            raise RuntimeError(
                f"a step writes to a frozen parameter of shape {tuple(value.shape)}, and there are too many of them to "
                "be put back: pass a callable query (module, batch) -> scalar that leaves them alone"
            )

    return check
