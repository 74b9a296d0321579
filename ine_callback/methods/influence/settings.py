"""The settings of IF, checked; :class:`.IF` documents them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ine_callback.errors import InfluenceError
from ine_callback.methods.fit_end import check_stages
from ine_callback.methods.influence.fisher import Fisher
from ine_callback.methods.influence.samplers import SamplerName
from ine_callback.scores import Stage

SolverName = Literal["ekfac", "kfac", "diagonal", "identity", "exact", "cg", "pcg", "astra", "lissa", "datainf"]
Damping = Literal["auto", "run"]
TokenParts = Literal["position", "label"]
STOCHASTIC = ("astra", "lissa")
ITERATIVE = (*STOCHASTIC, "cg", "pcg")
ACROSS_LAYERS = (*ITERATIVE, "exact")  # which need more damping than approximations by layer do


@dataclass(frozen=True)
class IFSettings:
    """What :class:`.IF` is constructed with.

    Raises:
        InfluenceError: For invalid settings.
    """

    solver: SolverName = "ekfac"
    fisher: Fisher | None = None
    basis: Literal["end", "run"] = "end"
    damping: Damping | float | None = None
    rescale: Literal["rif"] | None = None
    sampler: SamplerName = "uniform"
    iterations: int = 200
    batch_size: int = 256
    step: float | None = None
    momentum: float = 0.0
    tol: float = 1e-3
    rows: Sequence[int] | None = None
    layers: Sequence[str] | None = None
    query_rank: int | None = None
    per_layer: bool = False
    per_token: bool | TokenParts = False
    groups: Mapping[str, Sequence[int]] | None = None
    at: Sequence[Stage] = ("end",)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "query_rank"):
            value = getattr(self, name)
            if name == "query_rank" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InfluenceError(f"IF: {name}={value!r} must be an integer of at least 1.")
        for name, kind in (("solver", SolverName), ("sampler", SamplerName)):
            if getattr(self, name) not in get_args(kind):
                raise InfluenceError(f"IF: {name}={getattr(self, name)!r} is none of {', '.join(get_args(kind))}.")
        if self.fisher not in (None, *get_args(Fisher)):
            raise InfluenceError(f"IF: fisher={self.fisher!r} is none of {', '.join(get_args(Fisher))}.")
        if self.basis not in ("end", "run"):
            raise InfluenceError(f"IF: basis={self.basis!r} is neither 'end' nor 'run'.")
        if self.basis == "run" and self.solver not in ("ekfac", "pcg", "astra"):
            raise InfluenceError(f"IF: basis='run' is EK-FAC's, which solver={self.solver!r} does not use.")
        if self.rescale not in (None, "rif"):
            raise InfluenceError(f"IF: rescale={self.rescale!r} is neither 'rif' nor None.")
        if not self._valid_damping():
            raise InfluenceError(f"IF: damping={self.damping!r} must be 'auto', 'run' or a number above 0.")
        for name, low, high in (("tol", 0.0, 1.0), ("momentum", -1e-12, 1.0), ("step", 0.0, math.inf)):
            value = getattr(self, name)
            if value is not None and not low < value < high:
                raise InfluenceError(f"IF: {name}={value!r} must be between {max(low, 0.0):g} and {high:g}.")
        if self.sampler != "uniform" and self.solver not in STOCHASTIC:
            raise InfluenceError(
                f"IF: sampler={self.sampler!r} draws minibatches, which solver={self.solver!r} has none of; use "
                "solver='lissa' or 'astra'."
            )
        for option, asked in (("rescale='rif'", self.rescale is not None), ("groups", bool(self.groups))):
            if asked and self.solver == "identity":
                raise InfluenceError(f"IF: {option} needs a curvature; choose another solver than 'identity'.")
            if asked and self.fisher not in (None, "exact"):
                raise InfluenceError(f"IF: {option} goes through all labels; fisher={self.fisher!r} does not.")
        for name, rows in (self.groups or {}).items():
            if not len(rows) or len(set(rows)) < len(rows):
                raise InfluenceError(f"IF: groups[{name!r}] must list at least one row, each once.")
        if self.per_token not in (False, True, *get_args(TokenParts)):
            raise InfluenceError(f"IF: per_token={self.per_token!r} is neither 'position' nor 'label', True nor False.")
        if self.per_token and self.rescale:
            raise InfluenceError(f"IF: per_token={self.per_token!r} has no rescaled scores; leave out rescale.")
        check_stages("IF", self.at)

    def _valid_damping(self) -> bool:
        if self.damping is None:
            return True
        if isinstance(self.damping, str):
            return self.damping in get_args(Damping)
        return not isinstance(self.damping, bool) and self.damping > 0 and math.isfinite(self.damping)

    def settings(self) -> dict[str, Any]:
        """The settings as plain types; a list of rows becomes its length."""
        rows = None if self.rows is None else len(self.rows)
        layers = None if self.layers is None else list(self.layers)
        groups = {name: [int(row) for row in group] for name, group in (self.groups or {}).items()}
        return asdict(self) | {"rows": rows, "layers": layers, "groups": groups, "at": list(self.at)}


def settings_name(settings: IFSettings) -> str:
    """Name of the method in reports.

    Example:
        >>> settings_name(IFSettings(solver="pcg", rescale="rif"))
        'RIF-PCG'
    """
    return f"{'RIF' if settings.rescale else 'IF'}-{settings.solver.upper()}"
