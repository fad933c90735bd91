"""The kernels that walk rows, where the tests of the ops do not go: very wide rows, labels from nowhere, odd heads."""

from __future__ import annotations

import pytest
import torch

from lemur_fast.kernels import common, cross_entropy, rms_norm, rotary
from tests.criterion import assert_as_good

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def norm_gradients(dy, dh, h, weight, eps=1e-5):
    """dx and dw by autograd through the definition, in the widest dtype of the inputs."""
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    y = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(h.dtype) * weight
    dx, dw = torch.autograd.grad(y, (h, weight), dy.to(y.dtype))
    return dx + dh, dw


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [8193, 16384, 20_000])
def test_rows_wider_than_the_registers(dtype, cols):
    x, residual, dy, dh = (torch.randn(9, cols + 8).to(dtype)[:, :cols] for _ in range(4))
    weight = torch.randn(cols).to(dtype)
    y, h, rstd = rms_norm.forward(x, residual, weight, 1e-5)
    assert torch.equal(h, x + residual)
    exact = (h.double().square().mean(-1) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(y, (h.float() * rstd[:, None]).to(dtype) * weight)
    dx, dw = rms_norm.backward(dy, dh, h, weight, rstd, True)
    stock = norm_gradients(dy, dh, h, weight.float())
    want = norm_gradients(dy.double(), dh.double(), h.double(), weight.double())
    assert_as_good("dx", dx, stock[0], want[0], floor=2**-20)
    assert_as_good("dw", dw, stock[1], want[1], floor=2**-16)


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_dw_is_summed_over_any_number_of_programs(programs):
    h, dy = torch.randn(50, 40), torch.randn(50, 40)
    rstd = (h.square().mean(-1) + 1e-5).rsqrt()
    with common.pretending("sm_80", programs):
        _, dw = rms_norm.backward(dy, None, h, torch.ones(40), rstd, True)
    torch.testing.assert_close(dw, (dy * h * rstd[:, None]).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", [-1, 101, 2**40, -(2**40)])
def test_a_label_from_nowhere_makes_its_row_nan_and_no_other(label):
    logits = torch.randn(3, 101)
    labels = torch.tensor([5, label, 7])
    options = {"ignore_index": -100, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 0.0}
    dlogits = torch.full_like(logits, 7.0)
    loss, *_ = cross_entropy.forward(logits, labels, True, None, dlogits, **options)
    good = torch.nn.functional.cross_entropy(logits, torch.tensor([5, 0, 7]), label_smoothing=0.1, reduction="none")
    good = good + 1e-3 * logits.logsumexp(-1).square()
    torch.testing.assert_close(loss[[0, 2]], good[[0, 2]])
    assert loss[1].isnan()
    assert dlogits[1].isnan().all()
    assert dlogits[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_may_overwrite_the_logits(dtype):
    logits, labels = torch.randn(4, 9000).to(dtype), torch.tensor([5, -100, 0, 8999])
    options = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
    apart = torch.empty_like(logits)
    dloss = torch.randn(4)
    before = cross_entropy.forward(logits, labels, True, dloss, apart, **options)
    after = cross_entropy.forward(logits, labels, True, dloss, logits, **options)
    assert torch.equal(logits, apart)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("head_dim", [2, 80, 128, 256])
@pytest.mark.parametrize("heads", [(1, 1), (40, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_number_of_heads(head_dim, heads, interleaved):
    q, k = (torch.randn(5, count, head_dim + 2)[..., :head_dim] for count in heads)
    cos, sin = torch.randn(5, head_dim), torch.randn(5, head_dim)
    i = torch.arange(head_dim // 2)
    a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + head_dim // 2)
    for transposed in (False, True):
        got = rotary.rotate(q, k, cos, sin, interleaved, torch.float32, transposed)
        for x, y in zip((q, k), got, strict=True):
            c, s = cos[:, None].double(), sin[:, None].double()
            x = x.double()
            want = torch.empty_like(x)
            if transposed:
                want[..., a] = x[..., a] * c[..., a] + x[..., b] * s[..., b]
                want[..., b] = x[..., b] * c[..., b] - x[..., a] * s[..., a]
            else:
                want[..., a] = x[..., a] * c[..., a] - x[..., b] * s[..., a]
                want[..., b] = x[..., b] * c[..., b] + x[..., a] * s[..., b]
            torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
