"""What an object holds, read past whatever its class defines."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Iterator
from typing import Any, NoReturn

# The machinery of a training goes on while a step runs on the side (and holds the recording itself).
_MACHINERY = (
    *("lightning.", "pytorch_lightning.", "lightning_fabric.", "ine_callback.", "torch.utils.", "torch.optim."),
    *("torch.distributed.", "torch.profiler.", "torch.amp.", "torch.fx.", "torch._dynamo.", "torch._inductor."),
    *("torch._functorch.", "torch._ops.", "logging.", "threading.", "queue.", "multiprocessing.", "concurrent."),
)
UNSET: Any = object()  # what a slot or variable holds that has no value


class Sealed:
    """Stands for an iterator that cannot be reset: taking from it fails, so the iterator loses nothing."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __iter__(self) -> Sealed:
        return self

    def __next__(self) -> NoReturn:
        raise RuntimeError(
            f"a step takes from a {self._kind} that the module holds; it cannot be reset, so the step cannot be "
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


def same(one: list[Any], other: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def slots_of(value: object, kind: type) -> Iterator[tuple[Any, object]]:
    """The slots of a class and what an instance holds in them."""
    for slot in _slots_of_class(kind):
        yield slot, slot_value(slot, value)


@functools.lru_cache(maxsize=4096)
def _slots_of_class(kind: type) -> tuple[Any, ...]:
    parents = [parent for parent in kind.__mro__ if "__slots__" in parent.__dict__]
    return tuple(s for p in parents for s in p.__dict__.values() if type(s) is types.MemberDescriptorType)


def slot_value(slot: Any, value: object) -> object:
    """What an instance holds in a slot; ``UNSET``: nothing."""
    try:
        return slot.__get__(value, type(value))
    except AttributeError:
        return UNSET


@functools.lru_cache(maxsize=4096)
def is_machinery(kind: type) -> bool:
    """Whether a class belongs to the machinery of a training."""
    return any(is_of(parent, _MACHINERY) for parent in kind.__mro__)


def is_of(kind: type, packages: tuple[str, ...]) -> bool:
    """Whether a class is defined in one of some packages, each with a dot at its end."""
    return f"{kind.__dict__.get('__module__', 'builtins')}.".startswith(packages)


def is_spent_by_reading(value: object, kind: type) -> bool:
    """Whether it is an iterator whose position is unreadable: a generator, a loader's iterator, one of itertools."""
    return issubclass(kind, Iterator) and (attributes(value) is None or is_machinery(kind))


def is_moved_by_fsdp(value: object) -> bool:
    """Whether FSDP2 splits a tensor."""
    return hasattr(type(value), "full_tensor")
