"""swiglu against silu(gate) * up of torch in the same dtype and in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import lemur_fast as lf
from tests.criterion import compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stock(gate, up):
    return functional.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 129), (64, 1000)])
def test_matches_float64(backend, dtype, shape):
    inputs = {"gate": 3 * torch.randn(shape), "up": torch.randn(shape)}
    compare(lf.ops.swiglu, stock, {name: x.to(dtype) for name, x in inputs.items()}, ["gate", "up"])


def test_large_gates_do_not_overflow(backend):
    gate = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4])
    compare(lf.ops.swiglu, stock, {"gate": gate, "up": torch.ones(7)}, ["gate", "up"])


def test_gradcheck_in_float64():
    tensors = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lf.ops.swiglu, tensors)


def test_halves_of_a_fused_product_and_expanded_input(backend):
    both = torch.randn(6, 32, requires_grad=True)
    plain = both.detach().clone().requires_grad_()
    lf.ops.swiglu(*both.chunk(2, -1)).sum().backward()
    stock(*plain.chunk(2, -1)).sum().backward()
    torch.testing.assert_close(both.grad, plain.grad)
    gate, up = torch.randn(1, 8).expand(4, 8), torch.randn(8, 4).T
    y = lf.ops.swiglu(gate, up)
    assert y.is_contiguous()
    torch.testing.assert_close(y, stock(gate, up))


def test_same_tensor_twice_and_second_backward(backend):
    x = torch.randn(4, 8, requires_grad=True)
    loss = lf.ops.swiglu(x, x).sum()
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    loss.backward()
    assert torch.equal(first, x.grad)
    plain = x.detach().clone().requires_grad_()
    stock(plain, plain).sum().backward()
    torch.testing.assert_close(first, plain.grad)


def test_zero_elements(backend):
    gate = torch.randn(0, 8, requires_grad=True)
    lf.ops.swiglu(gate, gate).sum().backward()
    assert gate.grad.shape == (0, 8)


def test_double_backward_raises(backend):
    gate, up = (torch.randn(4, requires_grad=True) for _ in range(2))
    (grad,) = torch.autograd.grad(lf.ops.swiglu(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"up": torch.zeros(4, 7)}, ValueError, r"up: got shape \[4, 7\]"),
        ({"up": torch.zeros(4, 8).half()}, ValueError, "up: got dtype torch.float16"),
        ({"gate": torch.zeros(4, 8).long()}, TypeError, "gate: got dtype torch.int64"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        lf.ops.swiglu(**({"gate": torch.zeros(4, 8), "up": torch.zeros(4, 8)} | change))
