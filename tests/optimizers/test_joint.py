"""Several optimizers seen as one: whose parameter, which rule, which rate, how often each has stepped."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, SparseAdam

from ine_callback.optimizers.joint import JointOptimizer, as_one, each_of
from ine_callback.optimizers.registry import own_step_rate, rate_of, remaining_lr, same_rate, summed_rates


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


def test_each_parameter_has_its_own_optimizers_rule_and_rate() -> None:
    a, b, c, nobody = parameters(4)
    slow = SGD([{"params": [a]}, {"params": [b], "lr": 0.3}], lr=0.1, momentum=0.5)
    fast = AdamW([c], lr=0.02, weight_decay=0.4)
    joint = JointOptimizer([slow, fast])
    c.grad = torch.tensor([3.0, 4.0])  # mean square 12.5
    assert rate_of(joint, [a]) == rate_of(slow, [a]) and rate_of(joint, [b]).step == pytest.approx(0.6)
    found = rate_of(joint, [c])
    assert found.step == 0.02 and found.decay == 0.4
    assert float(found.weight) == pytest.approx(12.5**-0.5, rel=1e-6)
    assert rate_of(joint, [nobody]).step == 0.0
    assert own_step_rate(joint, b) == pytest.approx(0.2) and own_step_rate(joint, c) == 0.02
    assert [group["lr"] for group in joint.param_groups] == [0.1, 0.3, 0.02]


def test_parameters_of_two_optimizers_share_no_direction() -> None:
    a, b, c, d, e = parameters(5)
    joint = JointOptimizer([SGD([a, b], lr=0.1), SGD([c], lr=0.1)])
    assert same_rate(joint, a, b) and not same_rate(joint, a, c)
    assert same_rate(joint, d, e) and not same_rate(joint, a, d)


def test_parameters_may_join_and_be_shared() -> None:
    a, b, late = parameters(3)
    one, other = SGD([a], lr=0.1), SGD([b], lr=0.1)
    joint = JointOptimizer([one, other])
    assert joint.of(late) is None and not joint.shared()
    other.add_param_group({"params": [late]})
    assert joint.of(late) is other
    one.add_param_group({"params": [late]})
    assert joint.shared() == {late}


def test_one_optimizer_stays_itself() -> None:
    one, other = (SGD([p], lr=0.1) for p in parameters(2))
    assert as_one(one) is one and as_one([one]) is one and each_of(one) == (one,)
    assert each_of(as_one([one, other])) == (one, other)


def test_summed_and_remaining_rates_count_an_optimizers_own_steps() -> None:
    a, b = parameters(2)
    critic, generator = SGD([a], lr=0.1), SGD([b], lr=0.2, momentum=0.5, weight_decay=0.1)
    joint = JointOptimizer([critic, generator])
    for batch in range(20):
        for _ in range(2):  # both of them one update
            joint.count(critic)
        if batch % 4 == 3:
            joint.count(generator)
        joint.end_update()
    assert summed_rates(joint, 99.0, [a]) == (pytest.approx(4.0), 0.0)
    curvature, decay = summed_rates(joint, 99.0, [b])
    assert (curvature, decay) == (pytest.approx(5 * 0.2 * 2), pytest.approx(5 * 0.2 * 2 * 0.1))
    assert remaining_lr(joint, 3.0, a, 0.1) == pytest.approx(3.0)
    assert remaining_lr(joint, 3.0, b, 0.2) == pytest.approx(3.0 * 2 * 6 / 21)  # a quarter, less and less guessed
    again = JointOptimizer([critic, generator])
    again.load_state_dict(joint.state_dict())
    again.count(critic)
    joint.count(critic)
    for each in (again, joint):
        each.end_update()
    assert again.state_dict() == joint.state_dict()


@pytest.mark.parametrize(
    ("updates", "by_turns"),
    [
        ([{0: [1], 1: [1]}, {0: [2], 1: [2]}], False),
        ([{0: [1], 1: [1]}, {}], False),  # a step without any recorded pass
        ([{0: [1], 1: [2]}], True),
        ([{0: [1]}, {1: [2]}], True),
        ([{0: [1, 2], 1: [2]}], True),
    ],
)
def test_who_takes_other_passes_takes_turns(updates: list[dict[int, list[int]]], by_turns: bool) -> None:
    joint = JointOptimizer([SGD([p], lr=0.1) for p in parameters(2)])
    for update in updates:
        for k, passes in update.items():
            joint.count(joint.each[k], passes)
        joint.end_update()
    assert joint.by_turns is by_turns


def test_a_single_optimizers_rates_are_as_before() -> None:
    (a,) = parameters(1)
    optimizer = SGD([a], lr=0.1, momentum=0.5)
    assert summed_rates(optimizer, 20.0, [a]) == (40.0, 0.0)
    assert remaining_lr(optimizer, 3.0, a, 0.3) == 3.0 * (0.3 / 0.1)


def test_sparse_adam_has_the_mean_over_the_elements_that_moved() -> None:
    """Rows of an embedding that no gradient has come to do not count: with Adam's mean they would halve it."""
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = SparseAdam(embedding.parameters(), lr=0.1)
    rates = []
    for _ in range(2):
        embedding.weight.grad = None
        (2.0 * embedding(torch.tensor([1, 3]))).sum().backward()
        rates.append(rate_of(optimizer, [embedding.weight]))
        optimizer.step()
    assert [float(rate.weight) for rate in rates] == pytest.approx([0.5, 0.5], rel=1e-5)  # all gradients are 2
    dense = nn.Parameter(torch.ones(3))
    dense.grad = torch.full((3,), 2.0)
    assert float(rate_of(Adam([dense], lr=0.1), [dense]).weight) == pytest.approx(0.5, rel=1e-5)
