"""Where a report comes from: JSON-able facts about the run. No paths, no hostnames, no code revision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ine_callback.utilities.jsonable import jsonable


@dataclass(frozen=True)
class RunInfo:
    """Provenance of a report; everything is normalised to plain JSON types when it is built.

    Attributes:
        config: Arguments of the callback.
        versions: Package versions (ine_callback, torch, lightning, numpy, python).
        seed: The run's seed, None when it was not seeded.
        started: ISO 8601 start time.
        seconds: Wall-clock seconds of the run.
        steps: Optimizer steps that were observed.
        rows: Rows of the training set.
        captured_share: Share of the trainable parameters that were captured exactly, 0 to 1.
        approximate: Module name to the reason why its signals are approximate.
        uncaptured: Module or parameter name to the reason why it is left out, with its fraction of the parameters.
        nonfinite: Query name to the number of its signals that were dropped as non-finite.
        incomplete: Why the scores cover less than the run, the first line of every view; empty where they cover it.
        schedule: planned_steps, steps, planned_lr_sum, realised_lr_sum and a note.
        notes: Sentences for the reader, shown in every view.

    Example:
        >>> run = RunInfo(steps=160, rows=1000, seed=7, schedule={"planned_lr_sum": float("nan")})
        >>> run.schedule, RunInfo.from_dict(run.to_dict()) == run
        ({'planned_lr_sum': None}, True)
    """

    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    started: str = ""
    seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    captured_share: float = 1.0
    approximate: dict[str, str] = field(default_factory=dict)
    uncaptured: dict[str, str] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    incomplete: str = ""
    schedule: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = jsonable(getattr(self, each.name), f"RunInfo: {each.name}")
            object.__setattr__(self, each.name, _typed(each.name, str(each.type), value))
        if not 0.0 <= self.captured_share <= 1.0:
            raise ValueError(f"RunInfo: captured_share is {self.captured_share}; give a fraction between 0 and 1")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types (a deep copy)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunInfo:
        """Builds a RunInfo from :meth:`to_dict`'s result.

        Raises:
            ValueError: On unknown fields and wrong types.
        """
        unknown = sorted(set(values) - {each.name for each in fields(cls)})
        if unknown:
            raise ValueError(f"RunInfo: unknown fields {unknown}; was it written by a newer ine_callback?")
        return cls(**values)


def _typed(name: str, declared: str, value: Any) -> Any:
    if declared == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kinds: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (float,),
        "str": (str,),
        "int | None": (int, type(None)),
        "list[str]": (list,),
    }
    expected = kinds.get(declared, (dict,))
    right = isinstance(value, expected) and not (isinstance(value, bool) and int in expected)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    part = {"dict[str, str]": str, "list[str]": str, "dict[str, int]": int}.get(declared, object)
    if not right or not all(isinstance(item, part) for item in parts):
        raise ValueError(f"RunInfo: {name} must be {declared}, got {value!r}")
    return value
