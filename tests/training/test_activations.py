"""Checkpointed layers give the same gradients; the selective mode keeps what it says."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lemur_fast as lf
from lemur_fast.ops import _products
from lemur_fast.packing import PackedBatch
from lemur_fast.training.activations import checkpoint_activations
from lemur_fast.training.distributed import shard


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def gradients(make_model, documents, mode, mesh=None):
    model = make_model()
    lf.accelerate(model)
    checkpoint_activations(model, mode)
    if mesh is not None:
        shard(model, list(model.model.layers), mesh, torch.float32)
    batch = PackedBatch.from_documents(documents)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = model(**batch.model_inputs()).loss
    with Count() as count:
        loss.backward()
    found = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in model.named_parameters()}
    return loss.detach(), found, count.calls, sum(kept)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_loss_and_gradients_are_the_same(make_model, documents, mesh, mode, sharded):
    loss, expected, _, _ = gradients(make_model, documents, "none")
    other, found, _, _ = gradients(make_model, documents, mode, mesh if sharded else None)
    torch.testing.assert_close(other, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_what_is_computed_again_in_the_backward_pass(make_model, documents):
    calls = {mode: gradients(make_model, documents, mode)[2] for mode in ("none", "full", "selective")}
    attention, product = "lemur_fast.attention.default", "aten.mm.default"
    assert [calls[mode][attention] for mode in calls] == [0, 2, 0]
    # Once a layer for the weight behind it, which keeps no input, and once more where the layer runs again.
    assert [calls[mode]["lemur_fast.swiglu.default"] for mode in calls] == [2, 4, 4]
    again = {mode: calls[mode][product] - calls["none"][product] for mode in calls}
    assert again["full"] >= 2 * 6  # all seven of a layer but the last, whose result no gradient needs
    assert 0 < again["selective"] <= again["full"] // 2 + 2


def test_products_taken_in_float32_are_kept_alike(make_model, documents, monkeypatch):
    monkeypatch.setattr(_products, "float32_is_faster", lambda: True)
    make = lambda: make_model().bfloat16()  # noqa: E731
    calls = {mode: gradients(make, documents, mode)[2] for mode in ("none", "full", "selective")}
    product = "lemur_fast.linear.default"
    assert calls["none"][product] == 0
    assert calls["full"][product] >= 2 * 6
    assert 0 < calls["selective"][product] <= calls["full"][product] // 2 + 2


def test_less_is_kept(make_model, documents):
    kept = {mode: gradients(make_model, documents, mode)[3] for mode in ("none", "full")}
    assert kept["full"] < kept["none"] / 2
