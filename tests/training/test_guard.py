"""Steps that are not taken leave no trace, and nothing else stops one."""

import math

import pytest
import torch
from torch import nn

from lemur_fast.training.guard import KNOWN_AFTER, Guard
from lemur_fast.training.optimizer import adamw


def make(spike=10.0, sharded_by=None):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    if sharded_by is not None:
        from lemur_fast.training.distributed import shard

        shard(model, [], sharded_by, torch.float32)
    optimizer = adamw(model, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    return model, Guard.new(optimizer, spike, torch.device("cpu"))


def step(model, guard, loss=1.0, norm=1.0, gradient=1.0):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    return guard.step(torch.tensor(loss), torch.tensor(norm)).tolist()


def everything(model, guard):
    states = list(guard.optimizer.state_dict()["state"].values())
    tensors = [*model.parameters(), *(value for state in states for value in state.values())]
    return [getattr(tensor, "full_tensor", lambda t=tensor: t)().detach().clone() for tensor in tensors]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (1.0, 10.5)]
)
def test_a_bad_step_changes_nothing(mesh, sharded, loss, norm):
    model, guard = make(sharded_by=mesh if sharded else None)
    for _ in range(KNOWN_AFTER):
        assert step(model, guard) == [0, 0]
    before = everything(model, guard)
    gradient = 1e6 if math.isfinite(loss + norm) else math.nan
    assert step(model, guard, loss, norm, gradient) == [2 if norm == 10.5 else 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(everything(model, guard), before, strict=True))
    assert step(model, guard, loss, norm, gradient)[1] == 2
    assert step(model, guard) == [0, 0]
    assert all(torch.isfinite(tensor).all() for tensor in everything(model, guard))
    assert not torch.equal(everything(model, guard)[0], before[0])


def test_steps_taken_are_the_optimizer_s_own():
    (guarded, guard), (free, _) = make(), make()
    optimizer = adamw(free, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        step(guarded, guard, norm=1.0, gradient=0.3)
        for parameter in free.parameters():
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(guarded.parameters(), free.parameters(), strict=True))


def test_early_norms_and_growing_ones_are_no_spikes():
    model, guard = make()
    for norm in (1.0, 100.0, 0.1, 50.0):
        assert step(model, guard, norm=norm) == [0, 0]
    model, guard = make()
    for index in range(100):
        assert step(model, guard, norm=1.1**index) == [0, 0]


def test_without_a_limit_only_what_is_not_finite_is_refused():
    model, guard = make(spike=0)
    for _ in range(KNOWN_AFTER):
        step(model, guard)
    assert step(model, guard, norm=1e9) == [0, 0]
    assert step(model, guard, norm=math.nan) == [1, 1]


def test_the_mean_is_that_of_the_steps_taken():
    model, guard = make()
    for norm in (1.0, 2.0, 3.0):
        step(model, guard, norm=norm)
    step(model, guard, norm=math.inf)
    assert guard.state.tolist() == pytest.approx([2.0, 3.0, 1.0])
