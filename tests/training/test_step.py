"""Accumulation: however the tokens are spread over micro-batches, the loss and the gradients are the same."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import lemur_fast as lf
from lemur_fast.data.loader import HeldOut
from lemur_fast.packing import PackedBatch
from lemur_fast.training.distributed import full_state_dict, shard
from lemur_fast.training.step import accumulate, held_out_losses, mean_loss

SPREADS = {
    "8x1": [[i] for i in range(8)],
    "1x8": [list(range(8))],
    "3 uneven": [[2], [0, 1, 3, 4, 5], [6, 7]],
}


def batches_of(documents, spread):
    return [PackedBatch.from_documents([documents[i] for i in group]) for group in spread]


def by_hand(model, documents):
    """The mean over all targets of the documents, one by one through the stock model, and its gradients."""
    total = sum(len(document) - 1 for document in documents)
    loss = 0.0
    for document in documents:
        ids = torch.from_numpy(document)[None]
        part = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum") / total
        part.backward()
        loss += part.item()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS.keys())
@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "sharded"])
def test_loss_and_gradients_are_those_of_all_tokens_at_once(make_model, documents, mesh, spread, sharded):
    expected, gradients = by_hand(make_model(), documents)
    model = make_model()
    lf.accelerate(model)
    if sharded:
        shard(model, list(model.model.layers), mesh, torch.float32)
    loss = accumulate(model, batches_of(documents, spread))
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor() if sharded else parameter.grad
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_bf16_compute_accumulates_in_fp32(make_model, documents, mesh):
    """Many equal micro-batches: summed in bf16, their gradients would stop growing."""
    gradients = {}
    for count in (1, 300):
        model = make_model(num_hidden_layers=1)
        lf.accelerate(model)
        shard(model, list(model.model.layers), mesh, torch.bfloat16)
        accumulate(model, batches_of(documents, [[2]]) * count)
        gradients[count] = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    for name, one in gradients[1].items():
        assert one.dtype == torch.float32
        difference = (gradients[300][name] - one).norm() / one.norm()
        assert difference < 2e-2, name  # each part rounds on its own; a bf16 sum stops at 256 of the 300


def test_held_out_loss_is_the_mean_over_all_tokens(make_model, documents, mesh):
    stock = make_model()
    expected, _ = by_hand(stock, documents)
    model = make_model()
    lf.accelerate(model)
    shard(model, list(model.model.layers), mesh, torch.float32)
    batches = batches_of(documents, SPREADS["3 uneven"])
    assert mean_loss(model, batches).item() == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    targets = sum(len(document) - 1 for document in documents)
    values = held_out_losses(model, [HeldOut("code", batches, targets, bytes=250)])
    assert values["held_out/code/loss"] == pytest.approx(expected, rel=1e-5)
    assert values["held_out/code/bits_per_byte"] == pytest.approx(expected * targets / np.log(2) / 250, rel=1e-5)


def test_held_out_loss_sees_weights_changed_since_the_last_one(make_model, documents, mesh):
    """Weights gathered for a forward pass must not outlive it: no backward pass comes to drop them."""
    model = make_model()
    lf.accelerate(model)
    shard(model, list(model.model.layers), mesh, torch.float32)
    masters = list(model.parameters())
    batches = batches_of(documents, SPREADS["1x8"])
    before = mean_loss(model, batches).item()
    with torch.no_grad():
        for master in masters:
            master.mul_(0.5)
    assert abs(mean_loss(model, batches).item() - before) > 0.1
    for name, value in full_state_dict(model).items():
        torch.testing.assert_close(value, make_model().state_dict()[name] * 0.5, rtol=0, atol=0)


def test_a_step_on_one_process_is_a_step_without_sharding(make_model, documents, mesh):
    states = []
    for sharded in (False, True):
        model = make_model()
        lf.accelerate(model)
        if sharded:
            shard(model, list(model.model.layers), mesh, torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        for spread in SPREADS.values():
            accumulate(model, batches_of(documents, spread))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        states.append(full_state_dict(model) if sharded else model.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)
