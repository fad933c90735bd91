"""rms_norm against Hugging Face's LLaMA norm in the same dtype and the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lemur_fast as lf
from tests.criterion import compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 5), (3, 7), (5, 64), (2, 3, 129), (17, 1000), (300, 96)]


def stock(x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-5):
    """transformers' LlamaRMSNorm, with float64 kept as float64."""
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)
    return y if residual is None else (y, h)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend, dtype, shape):
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    compare(lf.ops.rms_norm, stock, {"x": x, "weight": weight}, ["x", "weight"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_with_residual_matches_float64(backend, dtype, shape):
    inputs = {"x": torch.randn(shape, dtype=dtype), "weight": torch.randn(shape[-1], dtype=dtype)}
    # A grid of 1/64 adds without rounding: so the exact run sees the same h, and the norm alone is judged.
    inputs["x"] = (inputs["x"] * 8).round() / 64
    inputs["residual"] = (torch.randn(shape) * 8).round().to(dtype) / 64
    compare(lf.ops.rms_norm, stock, inputs, ["x", "weight", "residual"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_where_hugging_face_rounds(backend, dtype):
    """The normalised row before the weight: without that rounding about a quarter of the elements differ by one bit."""
    x, weight = torch.randn(64, 512, dtype=dtype), torch.randn(512, dtype=dtype)
    same = lf.ops.rms_norm(x, weight) == stock(x, weight)
    assert same.double().mean() > 0.999  # a sum in another order may move rstd by a bit, and a tie with it


def test_one_column(backend):
    """A row of one column is normalised to its sign, whatever its size: the gradient vanishes."""
    x, weight = torch.tensor([[2.0], [-3.0]], requires_grad=True), torch.tensor([0.5])
    y = lf.ops.rms_norm(x, weight, eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[0.5], [-0.5]]))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros(2, 1), rtol=0, atol=1e-6)


def test_residual_sum_is_rounded_as_torch_rounds(backend):
    x, residual, weight = torch.randn(9, 40).bfloat16(), torch.randn(9, 40).bfloat16(), torch.ones(40).bfloat16()
    y, h = lf.ops.rms_norm(x, weight, residual=residual)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, lf.ops.rms_norm(h, weight))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_mixed_dtypes_promote_as_torch(backend, x_dtype, weight_dtype):
    x, weight = torch.randn(6, 33, dtype=x_dtype), torch.randn(33, dtype=weight_dtype)
    assert lf.ops.rms_norm(x, weight).dtype == stock(x, weight).dtype
    compare(lf.ops.rms_norm, stock, {"x": x, "weight": weight}, ["x", "weight"])


def test_residual_of_another_dtype_promotes():
    x, residual, weight = torch.randn(4, 8).bfloat16(), torch.randn(4, 8), torch.randn(8)
    y, h = lf.ops.rms_norm(x, weight, residual=residual)
    torch.testing.assert_close(h, x + residual, rtol=0, atol=0)
    assert y.dtype == torch.float32


def test_float64_goes_to_the_reference():
    x, weight = torch.randn(4, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    compare(lf.ops.rms_norm, stock, {"x": x, "weight": weight}, ["x", "weight"])
    with lf.use_backend("cpu"), pytest.raises(lf.dispatch.BackendError, match="float64"):
        lf.ops.rms_norm(x, weight)


def test_gradcheck_in_float64():
    x, r = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: lf.ops.rms_norm(x, w), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w, r: lf.ops.rms_norm(x, w, residual=r), (x, weight, r))


def test_strided_and_expanded_inputs(backend):
    wide, weight = torch.randn(6, 5, 48), torch.randn(40)
    views = {
        "sliced rows": wide[:, 1, :40],
        "sliced columns": wide[..., 3:43],
        "strided columns": torch.randn(6, 80)[:, ::2],
        "transposed": torch.randn(40, 6).T,
        "expanded": torch.randn(1, 40).expand(6, 40),
    }
    for name, x in views.items():
        dy = torch.randn(()).expand(x.shape)  # an expanded incoming gradient, as sum() sends
        own, plain = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
        y = lf.ops.rms_norm(x, weight)
        torch.testing.assert_close(y, stock(x, weight), msg=name)
        lf.ops.rms_norm(own, weight).backward(dy)
        stock(plain, weight).backward(dy)
        torch.testing.assert_close(own.grad, plain.grad, msg=name)


def test_zero_rows(backend):
    x, weight = torch.randn(0, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    y, h = lf.ops.rms_norm(x, weight, residual=x)
    (y.sum() + h.sum()).backward()
    assert y.shape == h.shape == x.grad.shape == (0, 16)
    assert torch.equal(weight.grad, torch.zeros(16))


def test_only_one_output_used(backend):
    for pick in (0, 1):
        tensors = [torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True), torch.randn(4, 8)]
        plain = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
        lf.ops.rms_norm(tensors[0], tensors[1], residual=tensors[2])[pick].square().sum().backward()
        stock(plain[0], plain[1], plain[2])[pick].square().sum().backward()
        torch.testing.assert_close(tensors[0].grad, plain[0].grad)
        if pick == 0:
            torch.testing.assert_close(tensors[1].grad, plain[1].grad)


def test_same_tensor_twice_second_backward_and_no_gradient(backend):
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    y, h = lf.ops.rms_norm(x, weight, residual=x)
    loss = (y * h).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    loss.backward()
    assert torch.equal(x.grad, first)
    plain = x.detach().clone().requires_grad_()
    y, h = stock(plain, weight, plain)
    (y * h).sum().backward()
    torch.testing.assert_close(first, plain.grad)
    assert weight.grad is None


def test_double_backward_raises(backend):
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    (grad,) = torch.autograd.grad(lf.ops.rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_deterministic(backend):
    x, weight = torch.randn(1000, 65).bfloat16().requires_grad_(), torch.randn(65).bfloat16().requires_grad_()
    runs = [torch.autograd.grad(lf.ops.rms_norm(x, weight).float().square().sum(), (x, weight)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.randn(4, 8).int()}, TypeError, "x: got dtype torch.int32"),
        ({"x": [1.0]}, TypeError, "x: got list"),
        ({"x": torch.randn(4, 0)}, ValueError, r"x: got shape \[4, 0\]"),
        ({"weight": torch.randn(7)}, ValueError, r"weight: got shape \[7\]; takes \[8\]"),
        ({"weight": torch.randn(8, device="meta")}, ValueError, "weight: got device meta"),
        ({"residual": torch.randn(4, 7)}, ValueError, r"residual: got shape \[4, 7\]"),
        ({"eps": -1.0}, ValueError, "eps: got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps: got nan"),
        ({"eps": "a"}, TypeError, "eps: got str"),
        ({"x": torch.eye(8).to_sparse()}, ValueError, "x: got layout torch.sparse_coo"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"x": torch.randn(4, 8), "weight": torch.randn(8)} | change
    with pytest.raises(error, match=words):
        lf.ops.rms_norm(**arguments)
