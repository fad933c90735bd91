import pytest
import torch
from torch import nn
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

import lemur_fast as lf
from lemur_fast.training.distributed import shard
from lemur_fast.training.optimizer import adamw, decay_groups


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_matrices_decay_and_nothing_else(make_model, mesh, sharded, tied):
    model = make_model(attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    lf.accelerate(model)
    if sharded:
        shard(model, list(model.model.layers), mesh, torch.float32)
    decayed, spared = decay_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in spared["params"])
    assert len(decayed["params"]) == 2 * 7 + (1 if tied else 2)
    assert len(spared["params"]) == 2 * 2 + 1 + 2 * 7
    assert len({id(p) for p in decayed["params"] + spared["params"]}) == len(list(model.parameters()))


def test_the_module_s_type_decides_whatever_the_names_and_shapes():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layernorm_like = nn.Linear(3, 1, bias=False)
            self.weight = nn.Parameter(torch.ones(4, 4))
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

    odd = Odd()
    decayed, spared = decay_groups(odd, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(odd.layernorm_like.weight)]
    assert [id(p) for p in spared["params"]] == [id(odd.weight)]


def test_norms_do_not_move_without_gradients(make_model):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = adamw(model, lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name] * (1.0 if "norm" in name else 0.95), msg=name)


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (20, 0), (5, 1)])
def test_the_schedule_of_the_recipes(steps, warmup):
    """The library's schedule is what the recipes rely on it to be: no step at 0, the peak, a tenth at the end."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer, num_warmup_steps=warmup, num_training_steps=steps, min_lr_rate=0.1
    )
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:warmup] == pytest.approx([2.0 * (i + 1) / warmup for i in range(warmup)])
    assert max(rates) == pytest.approx(2.0, rel=0.03)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
