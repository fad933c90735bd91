"""swiglu against silu(gate) * up of torch in the same dtype and in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import lemur_fast as lf
from lemur_fast.ops.swiglu import swiglu_linear
from tests.criterion import compare, kept_by

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


# ---- with the linear layer behind it ---------------------------------------------------------------------------------


def stock_linear(gate, up, weight, bias=None):
    return functional.linear(functional.silu(gate) * up, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (3, 8), (2, 50, 129)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_matches_float64(backend, dtype, shape, has_bias):
    inputs = {"gate": 3 * torch.randn(shape), "up": torch.randn(shape), "weight": torch.randn(5, shape[-1])}
    if has_bias:
        inputs["bias"] = torch.randn(5)
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    compare(swiglu_linear, stock_linear, inputs, list(inputs))


@pytest.mark.parametrize("wanted", ["gate", "up", "weight", "bias", "gate up", "weight bias", "up weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_gives_the_gradients_that_are_wanted(wanted, dtype):
    shapes = {"gate": (80, 16), "up": (80, 16), "weight": (5, 16), "bias": (5,)}
    inputs = [
        (torch.randn(shape, dtype=dtype) / 4).requires_grad_(name in wanted.split()) for name, shape in shapes.items()
    ]
    plain = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    swiglu_linear(*inputs).square().sum().backward()
    stock_linear(*plain).square().sum().backward()
    for x, y in zip(inputs, plain, strict=True):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            assert x.grad.dtype == y.grad.dtype
            torch.testing.assert_close(x.grad, y.grad, rtol=0.05 if dtype == torch.bfloat16 else 1e-4, atol=0.05)


def test_linear_gradcheck_in_float64():
    shapes = [(3, 5), (3, 5), (4, 5), (4,)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(swiglu_linear, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_keeps_nothing_but_its_inputs(dtype):
    gate, up = (torch.randn(2, 64, 96, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.randn(32, 96, dtype=dtype, requires_grad=True)
    assert kept_by(swiglu_linear, gate, up, weight)[1] == 0
    assert kept_by(stock_linear, gate, up, weight)[1] >= gate.nbytes  # the count would see it


def test_linear_under_autocast_equals_stock():
    inputs = [torch.randn(70, 16), torch.randn(70, 16), torch.randn(8, 16)]
    grads = []
    for function in (swiglu_linear, stock_linear):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            # The products in front of it give it bfloat16.
            y = function(leaves[0].bfloat16(), leaves[1].bfloat16(), leaves[2])
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        grads.append([x.grad for x in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_backward_inside_autocast(backend, dtype):
    """The forward ran outside: its dtypes stand."""
    inputs = [torch.randn(70, 16), torch.randn(70, 16), torch.randn(8, 16)]
    grads = []
    for function in (swiglu_linear, stock_linear):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        loss = function(*leaves).square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
        grads.append([x.grad for x in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02 * float(theirs.abs().max()))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_linear_of_no_rows(backend, shape):
    gate, weight = torch.randn(shape, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    swiglu_linear(gate, gate, weight).sum().backward()
    assert gate.grad.shape == shape
    assert not weight.grad.any()


def test_linear_double_backward_raises():
    gate, up, weight = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(swiglu_linear(gate, up, weight).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_linear_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"up: got shape \[4, 7\]"):
        swiglu_linear(torch.zeros(4, 8), torch.zeros(4, 7), torch.zeros(2, 8, requires_grad=True))
    gate = torch.zeros(4, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        swiglu_linear(gate, gate, torch.zeros(2, 7, requires_grad=True))
