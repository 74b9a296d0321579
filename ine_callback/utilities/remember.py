"""What an object holds, remembered and put back: which object each name holds, and what is in it.

The walk only reads, and calls nothing that a user's class can define (no ``__eq__``, ``__getattr__``, ``__copy__`` or
property): identities are compared, and the methods of the base types are called. Putting back writes only what was
changed, so that an untouched value may be shared with a live graph, with read-only memory or with another thread.
"""

from __future__ import annotations

import builtins
import functools
import io
import threading
import types
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from math import inf
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ine_callback.utilities.held import (
    UNSET,
    Sealed,
    attributes,
    is_machinery,
    is_moved_by_fsdp,
    is_of,
    is_spent_by_reading,
    same,
    slot_value,
    slots_of,
)
from ine_callback.utilities.reached import (
    FUNCTIONS,
    CellVariable,
    GlobalVariable,
    Variable,
    functions_of,
    global_names,
    is_stateful,
    is_users,
    parts_of_optimizer,
    parts_of_trainer,
)
from ine_callback.utilities.restores import (
    Restore,
    array_restore,
    generator_restore,
    is_plain,
    tensor_restore,
    untouched,
)

MAX_LENGTH = (
    10_000  # of longer containers (a data set as an attribute) only the elements are restored, not what they hold
)

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})
_CODE = (type, types.ModuleType, types.BuiltinFunctionType)
_MAX_BESIDE = 5_000  # objects followed beside the module: what its code reaches, from the nearest on
# What is written to a file is output, like what is printed; the position of a reader is not always known.
_OUTPUT = (io.IOBase, np.memmap)
_LIVE = (threading.Thread, threading.Condition, threading.Event)
_LIBRARIES = ("builtins.", "abc.", "typing.", "torch.", "numpy.", "torchmetrics.", "lightning.", "pytorch_lightning.")
_CONTAINERS = (list, dict, set, deque, Tensor, np.ndarray)
_MAX_FROZEN_RATIO = (
    2  # of frozen to trained bytes up to which frozen parameters are copied: copies of the model, no backbone
)
_BARE = frozenset({tuple, frozenset, dict, OrderedDict, list, set, deque})  # have no attributes of a user's
_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)  # most are empty dicts of hooks


class Memory:
    """Remembers what objects hold.

    Args:
        register: Takes what puts one thing back; called before anything is changed.
    """

    def __init__(self, register: Callable[[Restore], None]) -> None:
        self._register = register
        self._seen: dict[int, object] = {}  # holds the objects, so that no other one gets their ids
        self._stand_ins: dict[int, tuple[object, Any]] = {}  # id -> the object, and what takes its place
        self._holders: list[Callable[[], None]] = []
        self._parameters: list[nn.Parameter] = []
        self._graded: list[nn.Parameter] = []
        self._empty: list[Any] = []
        self._beside: deque[object] = deque()  # what is reached by code, or through a trainer
        self._is_beside = False
        register(self._clear)

    def take(self, *objects: object) -> None:
        """Remembers objects and all that they reach.

        Raises:
            RuntimeError: If something can be changed, and cannot be remembered; nothing was changed then.
        """
        self._walk(deque(objects), deque.pop)
        self._is_beside = True
        self._walk(self._beside, deque.popleft, _MAX_BESIDE)
        self._keep_parameters()

    def _walk(self, waiting: deque[object], take: Callable[[deque[object]], object], most: float = inf) -> None:
        while waiting and most > 0:
            value = take(waiting)
            kind = type(value)
            if kind in _ATOMS or id(value) in self._seen or issubclass(kind, _CODE + _OUTPUT):
                continue
            if issubclass(kind, FUNCTIONS) and not self._is_beside:
                self._beside.append(value)
                continue
            self._seen[id(value)] = value
            most -= 1
            try:
                waiting.extend(self._parts(value, kind))
            except Exception as error:
                raise RuntimeError(
                    f"{kind.__name__} cannot be remembered ({type(error).__name__}: {error}), so nothing that may "
                    "change it can be run on the side; keep it off the module"
                ) from error

    def lend(self) -> None:
        """Puts stand-ins in the place of what must not be touched. From here on things change."""
        for p in self._graded:  # a backward pass inside of a step would add to it
            p.grad = None
        for lend in self._holders if self._stand_ins else ():
            lend()
        self._holders.clear()

    def _parts(self, value: Any, kind: type) -> Iterable[object]:
        """Remembers one object; returns what it holds."""
        if issubclass(kind, FUNCTIONS):
            return self._function(value, kind)
        if issubclass(kind, Tensor):
            self._tensor(value)
            if value._is_view() and value._base is not None:
                self._view(value, value._base)
        elif issubclass(kind, np.ndarray):
            self._array(value)
        elif (state := generator_restore(value)) is not None:
            self._register(state)
            return ()
        elif is_spent_by_reading(value, kind):
            self._stand_ins[id(value)] = value, Sealed(kind.__name__)
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
        elif issubclass(kind, bytearray | array):
            return self._buffer(value)
        else:
            return ()
        return parts if len(parts) <= MAX_LENGTH else ()

    def _mapping(self, value: Any, base: Any) -> list[object]:
        before = list(base.items(value))
        names, parts = [name for name, _ in before], [part for _, part in before]

        def restore() -> None:
            if not (same(list(base.keys(value)), names) and same(list(base.values(value)), parts)):
                base.clear(value)
                base.update(value, before)

        def lend() -> None:
            for key, part in before:
                if (other := self._lent(part)) is not part:
                    base.__setitem__(value, key, other)

        self._register(restore)
        if len(before) <= MAX_LENGTH:
            self._holders.append(lend)
        return parts

    def _sequence(self, value: Any, base: Any) -> list[object]:
        before = list(base.__iter__(value))

        def restore() -> None:
            if not same(list(base.__iter__(value)), before):
                base.clear(value)
                base.extend(value, before)

        def lend() -> None:
            for k, part in enumerate(before):
                if (other := self._lent(part)) is not part:
                    base.__setitem__(value, k, other)

        self._register(restore)
        if len(before) <= MAX_LENGTH:
            self._holders.append(lend)
        return before

    def _set(self, value: Any) -> Iterable[object]:
        before = set.copy(value)
        identities = set(map(id, before))

        def restore() -> None:
            if set(map(id, set.__iter__(value))) != identities:
                set.clear(value)
                set.update(value, before)

        self._register(restore)
        return before if len(before) <= MAX_LENGTH else ()

    def _buffer(self, value: Any) -> Iterable[object]:
        before = value[:]

        def restore() -> None:
            if value != before:
                value[:] = before

        self._register(restore)
        return ()

    # -- what code reaches --------------------------------------------------------------------------------------------

    def _function(self, value: Any, kind: type) -> Iterable[object]:
        if issubclass(kind, types.MethodType):
            return [value.__self__, value.__func__]
        if issubclass(kind, functools.partial):
            return [value.func, *value.args, *value.keywords.values()]
        if not is_users(value.__code__):
            return [value.__dict__.get("__wrapped__")]
        names = [name for name in global_names(value.__code__) if not hasattr(builtins, name)]
        held = [self._variable(CellVariable(cell)) for cell in value.__closure__ or ()]
        held += [self._variable(GlobalVariable(value.__globals__, name)) for name in names]
        return [*held, value.__defaults__, value.__kwdefaults__, value.__dict__]

    def _variable(self, variable: Variable) -> object:
        """Remembers what a variable holds; returns that."""
        before = variable.read()

        def restore() -> None:
            if variable.read() is not before:
                variable.write(before)

        def lend() -> None:
            if (other := self._lent(before)) is not before:
                variable.write(other)

        self._register(restore)
        self._holders.append(lend)
        return None if before is UNSET else before

    def _clear(self) -> None:
        for books in self._empty:
            books.clear()

    def _attributes(self, value: Any, kind: type) -> Iterable[object]:
        if kind in _BARE:
            return ()
        own = attributes(value)
        is_module = issubclass(kind, nn.Module)
        slots = list(slots_of(value, kind))
        parts = [*(() if own is None else own.values()), *(part for _, part in slots)]
        stateful, machinery = is_stateful(kind), is_machinery(kind)
        if issubclass(kind, Trainer) and own is not None:
            self._mapping(own, dict)
            self._beside.extend(parts_of_trainer(own))
            return ()
        if issubclass(kind, Optimizer):
            return parts_of_optimizer(value)
        if stateful and not self._is_beside:
            self._seen.pop(id(value))
            self._beside.append(value)
            return ()
        live = (machinery and not stateful) or any(issubclass(type(part), _LIVE) for part in parts)
        if live and not is_module:
            return ()  # what holds a thread lives beside the step: restoring it would be a change
        if slots:
            self._keep_slots(value, slots)
        if id(kind) not in self._seen:
            self._seen[id(kind)] = kind
            parts.extend(part for parent in kind.__mro__ for part in self._of_class(parent))
        if own is None:
            return parts
        if is_module and any(map(is_moved_by_fsdp, own.get("_parameters", {}).values())):
            self._seen[id(own["_parameters"])] = own["_parameters"]
        self._seen[id(own)] = own
        self._mapping(own, dict)
        if is_module:
            empty = [d for k, d in own.items() if k in _MODULE_ATTRIBUTES and type(d) in (dict, OrderedDict) and not d]
            self._empty += empty
            self._seen.update((id(books), books) for books in empty)
        if issubclass(kind, torch.jit.ScriptModule):  # keeps its tensors elsewhere
            parts.extend([*value.buffers(recurse=False), *value.parameters(recurse=False)])
        return parts if len(parts) <= MAX_LENGTH else ()

    def _of_class(self, kind: type) -> list[object]:
        """Remembers the data that a user's class holds for all its instances."""
        if is_of(kind, _LIBRARIES):
            return []
        self._beside.extend(one for one in functions_of(kind) if is_users(one.__code__))
        data = {k: v for k, v in kind.__dict__.items() if type(v) in _ATOMS or issubclass(type(v), _CONTAINERS)}

        def restore() -> None:
            for name, part in data.items():
                if kind.__dict__.get(name, UNSET) is not part:
                    type.__setattr__(kind, name, part)

        self._register(restore)
        return list(data.values())

    def _keep_slots(self, value: object, slots: list[tuple[Any, object]]) -> None:
        def write(slot: Any, part: object) -> None:
            if part is not slot_value(slot, value):
                slot.__delete__(value) if part is UNSET else slot.__set__(value, part)

        def restore() -> None:
            for slot, part in slots:
                write(slot, part)

        def lend() -> None:
            for slot, part in slots:
                write(slot, self._lent(part))

        self._register(restore)
        self._holders.append(lend)

    # -- tensors and arrays -------------------------------------------------------------------------------------------

    def _tensor(self, value: Tensor) -> None:
        if is_lazy(value) or is_moved_by_fsdp(value) or value.is_meta:
            return  # it holds nothing, or FSDP moves it
        if issubclass(type(value), nn.Parameter) and value.is_leaf:
            self._parameters.append(value)  # type: ignore[arg-type]
        elif value.is_inference() or value.grad_fn is not None or not is_plain(value):
            self._stand_in(value)  # part of a graph: writing to it, even the same, would break that
        elif id(value) not in self._stand_ins and self._is_small(value.numel()):
            self._register(tensor_restore(value))

    def _view(self, value: Tensor, base: Tensor) -> None:
        """A view that gets into a graph by being written to never gets out again: lent together with its base."""
        if value.requires_grad or base.requires_grad or id(value) in self._stand_ins:
            return
        whole = self._stand_in(base)
        if whole.stride() == base.stride():
            place = value.storage_offset() - base.storage_offset() + whole.storage_offset()
            self._stand_ins[id(value)] = value, whole.as_strided(value.shape, value.stride(), place)
        else:
            self._stand_in(value)

    def _stand_in(self, value: Any) -> Any:
        if id(value) not in self._stand_ins:
            self._stand_ins[id(value)] = value, value.detach().clone()
        return self._stand_ins[id(value)][1]

    def _lent(self, value: Any) -> Any:
        """What takes the place of a value meanwhile."""
        other = self._stand_ins[id(value)][1] if id(value) in self._stand_ins else value
        if other is value and issubclass(type(value), tuple) and self._stand_ins and len(value) <= MAX_LENGTH:
            parts = [self._lent(part) for part in tuple.__iter__(value)]
            if not same(parts, list(tuple.__iter__(value))):
                new = type(value).__new__ if hasattr(type(value), "n_sequence_fields") else tuple.__new__
                return new(type(value), parts)
        return other

    def _array(self, value: Any) -> None:
        if value.flags.writeable and self._is_small(value.size):
            self._register(array_restore(value))

    def _is_small(self, elements: int) -> bool:
        """Whether numbers are few enough to be copied. Code may reach a whole data set, which no step writes to."""
        return not self._is_beside or elements <= MAX_LENGTH

    def _keep_parameters(self) -> None:
        """Steps may write to them: momentum copies of the model, weights that are normalized before they are used."""
        found, self._parameters = self._parameters, []
        sizes = {True: 0, False: 0}
        for p in found:
            sizes[p.requires_grad] += p.numel() * p.element_size()
        for p in found:
            small = p.requires_grad or sizes[False] <= _MAX_FROZEN_RATIO * sizes[True]
            self._register(tensor_restore(p) if small and is_plain(p) else untouched(p))
            self._register(functools.partial(setattr, p, "grad", p.grad))
        self._graded = [p for p in found if p.grad is not None]
