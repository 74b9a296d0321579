"""What a batch does otherwise than those before: other operations on a parameter, a layer's parameter renamed.

``torch.nn.utils.prune`` registers a layer's weight, the same object, by another name, and computes the weight that the
layer uses from it and a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

_MOST = 3  # times that a parameter's uses are checked again
RENAMED = "its parameters have other names than when the recording began (torch.nn.utils.prune)"


@dataclass
class Unfamiliar:
    """Parameters and layers that the present batch uses in a way that is not known.

    Attributes:
        follows: Whether they can be checked again; else they are dropped at once.
        uses: Of parameters outside of layers, the operation that is not known.
        layers: Layers whose parameters were renamed.
    """

    follows: bool = False
    uses: dict[nn.Parameter, str] = field(default_factory=dict)
    layers: set[nn.Module] = field(default_factory=set)
    _times: dict[nn.Parameter, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.uses or self.layers)

    def add(self, parameter: nn.Parameter, operation: str) -> bool:
        """Takes a parameter that is used by an operation which is not known; False if it cannot be checked again."""
        if not self.follows or self._times.get(parameter, 0) >= _MOST:
            return False
        self.uses[parameter] = operation
        return True

    def count(self, parameter: nn.Parameter) -> None:
        """A parameter was checked again."""
        self._times[parameter] = self._times.get(parameter, 0) + 1

    def take(self) -> tuple[dict[nn.Parameter, str], set[nn.Module]]:
        """All of them; none is left."""
        taken = self.uses, self.layers
        self.uses, self.layers = {}, set()
        return taken


def renamed(now: Mapping[str, nn.Parameter], before: Mapping[str, nn.Parameter]) -> bool:
    """Whether a module has one of its parameters by another name than before."""
    return any(name not in now and any(p is other for other in now.values()) for name, p in before.items())


def other_weights(now: Mapping[str, nn.Parameter], before: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """Weights that have replaced the parameters which a module had before; FSDP2's replacements do not count."""
    return [
        now[name] for name, p in before.items() if name in now and now[name] is not p and not hasattr(p, "full_tensor")
    ]
