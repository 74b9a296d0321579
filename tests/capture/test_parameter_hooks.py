"""Hooks of the user's on parameters change gradients where nobody measures: what they do is seen, and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from tests.helpers.kept_steps import Net, check, recorded

Register = Callable[[nn.Parameter], object]


def halve(parameter: nn.Parameter) -> None:
    parameter.grad.mul_(0.5)  # type: ignore[union-attr]


def look(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None


def remove(parameter: nn.Parameter) -> None:
    parameter.grad = None


class Hooked(Net):
    """Hooks on the first layer's weight."""

    def __init__(self, register: Register) -> None:
        super().__init__()
        self.register = register

    def configure_optimizers(self) -> Any:
        assert isinstance(self.net, nn.Sequential)
        self.register(self.net[0].weight)  # type: ignore[arg-type]
        return super().configure_optimizers()


CHANGING: dict[str, Register] = {
    "register_hook": lambda p: p.register_hook(lambda g: g * 0.5),
    "register_post_accumulate_grad_hook": lambda p: p.register_post_accumulate_grad_hook(halve),
    "clamped (register_hook)": lambda p: p.register_hook(lambda g: g.clamp(-1e-4, 1e-4)),
    "removed (register_post_accumulate_grad_hook)": lambda p: p.register_post_accumulate_grad_hook(remove),
}


def unchanged(gradient: Tensor) -> Tensor:
    return gradient


HARMLESS: dict[str, Register] = {
    "register_hook": lambda p: p.register_hook(unchanged),
    "register_post_accumulate_grad_hook": lambda p: p.register_post_accumulate_grad_hook(look),
    "clamped, but not here": lambda p: p.register_hook(lambda g: g.clamp(-1e4, 1e4)),
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_layer_whose_gradient_a_hook_changes_is_left_out_with_that_reason(name: str) -> None:
    module, recorder, keep = recorded(lambda: Hooked(CHANGING[name]))
    told = recorder.coverage.uncaptured
    assert set(told) == {"net.0.weight", "net.0.bias"}
    kind = "register_post_accumulate_grad_hook" if "post" in name else "register_hook"
    assert all(kind in why and "on_before_optimizer_step" in why for why in told.values())
    check(module, keep, {"2.weight", "2.bias"})


@pytest.mark.parametrize("name", HARMLESS)
def test_hooks_that_change_nothing_cost_nothing(name: str) -> None:
    module, recorder, keep = recorded(lambda: Hooked(HARMLESS[name]))
    assert not recorder.coverage.uncaptured
    check(module, keep)
    noted = any("hooks on parameters" in note and "net.0.weight" in note for note in recorder.coverage.notes)
    assert noted == ("post" not in name)
