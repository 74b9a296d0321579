"""What the code of a module reaches beside the module: closures, defaults, globals, and what a Trainer holds for it."""

from __future__ import annotations

import dis
import functools
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, Dataset, Sampler

from ine_callback.utilities.held import UNSET

FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
# Users' classes of these kinds hold state of their own, and go on only when a step or a loader calls them.
_STATEFUL = (pl.LightningDataModule, pl.Callback, Dataset, Sampler, BatchSampler)
_OWN = str(Path(__file__).parents[1])  # our hooks collect what passes find
_INSTALLED = tuple({_OWN} | {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_INSTALLED_PARTS = ("site-packages", "dist-packages", "<frozen")


class Variable(Protocol):
    """A variable of code that can be read, and written to."""

    def read(self) -> Any:
        """What it holds; ``UNSET`` where it has no value."""

    def write(self, value: Any) -> None:
        """Lets it hold a value; ``UNSET``: none."""


@dataclass(frozen=True)
class CellVariable:
    """A variable of a closure."""

    cell: types.CellType

    def read(self) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # still empty
            return UNSET

    def write(self, value: Any) -> None:
        if value is UNSET:
            del self.cell.cell_contents
        else:
            self.cell.cell_contents = value


@dataclass(frozen=True)
class GlobalVariable:
    """A variable of a module of code."""

    space: dict[str, Any]
    name: str

    def read(self) -> Any:
        return self.space.get(self.name, UNSET)

    def write(self, value: Any) -> None:
        if value is UNSET:
            self.space.pop(self.name, None)
        else:
            self.space[self.name] = value


@functools.lru_cache(maxsize=4096)
def is_users(code: types.CodeType) -> bool:
    """Whether code is the user's, of a script, a notebook or a package in work: libraries keep no state of a run."""
    file = code.co_filename
    return not (file.startswith(_INSTALLED) or any(part in file for part in _INSTALLED_PARTS))


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """The globals that code reads, writes or deletes, functions inside of it included."""
    own = {one.argval for one in dis.get_instructions(code) if one.opname.endswith("_GLOBAL")}
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return tuple(sorted(own.union(*map(global_names, inner))))


def functions_of(kind: type) -> Iterator[types.FunctionType]:
    """The functions that the user wrote in one class: methods, and those of properties."""
    for value in kind.__dict__.values():
        found = type(value)
        if issubclass(found, staticmethod | classmethod):
            value = value.__func__
        elif issubclass(found, property):
            value = value.fget
        elif issubclass(found, functools.cached_property):
            value = value.func
        if type(value) is types.FunctionType:
            yield value


def is_stateful(kind: type) -> bool:
    """Whether a class is of a kind that libraries define, with state of the user's or of a schedule."""
    users = not kind.__module__.startswith(("lightning.", "torch.", "ine_callback."))
    of_ours = any(parent.__module__.startswith("ine_callback.") for parent in kind.__mro__)
    return (users and not of_ours and issubclass(kind, _STATEFUL)) or issubclass(kind, LRScheduler)


def parts_of_optimizer(value: Optimizer) -> list[object]:
    """What a scheduler changes in an optimizer; its moments are nobody's to change but its own step's."""
    found: Any = value.__dict__.get("param_groups")
    return [] if found is None else [found]


def parts_of_trainer(held: dict[str, Any]) -> list[object]:
    """What steps may change through ``self.trainer``: callbacks, the data module, schedulers."""
    callbacks = [one for one in held.get("callbacks") or () if is_stateful(type(one))]
    strategy = getattr(held.get("_accelerator_connector"), "strategy", None)
    configs = getattr(strategy, "lr_scheduler_configs", None) or ()
    optimizers = getattr(strategy, "_optimizers", None) or ()
    return [*callbacks, held.get("datamodule"), *optimizers, *(config.scheduler for config in configs)]
