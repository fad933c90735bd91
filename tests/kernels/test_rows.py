"""The kernels that walk rows, Triton's and CUDA C++'s: LLaMA-like rows, odd and very wide ones, labels from nowhere."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import slow_compiled
from tests.criterion import assert_as_good

DTYPES = [
    torch.bfloat16,
    pytest.param(torch.float32, marks=slow_compiled),
    pytest.param(torch.float16, marks=slow_compiled),
]


def rows_of(rows: int, cols: int, dtype: torch.dtype, count: int, apart: int = 0) -> tuple[torch.Tensor, ...]:
    """Random matrices whose rows lie `apart` further elements apart."""
    return tuple(torch.randn(rows, cols + apart).to(dtype)[:, :cols] for _ in range(count))


# ---- rms_norm --------------------------------------------------------------------------------------------------------


def norm_gradients(dy, dh, h, weight, eps=1e-5):
    """dx and dw by autograd through the definition, in the widest dtype of the inputs."""
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    y = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(h.dtype) * weight
    dx, dw = torch.autograd.grad(y, (h, weight), dy.to(y.dtype))
    return (dx if dh is None else dx + dh), dw


def check_norm(kernels, rows, cols, dtype, apart, with_residual):
    x, residual, dy, dh = rows_of(rows, cols, dtype, 4, apart)
    if not with_residual:
        residual = dh = None
    weight = torch.randn(cols).to(dtype)
    y, h, rstd = kernels.rms_norm.forward(x, residual, weight, 1e-5)
    want_h = x + residual if with_residual else x
    if with_residual:
        assert torch.equal(h, want_h)
    exact = (want_h.double().square().mean(-1) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-6, atol=0)
    # As Hugging Face rounds: the row first, then the product.
    assert torch.equal(y, (want_h.float() * rstd[:, None]).to(dtype) * weight)
    with kernels.processors(2):  # two programs, which turn more than once
        dx, dw = kernels.rms_norm.backward(dy, dh, want_h, weight, rstd, True)
    stock_dx, _ = norm_gradients(dy, dh, want_h, weight.float())
    exact_dx, _ = norm_gradients(dy.double(), dh.double() if with_residual else None, want_h.double(), weight.double())
    assert_as_good("dx", dx, stock_dx, exact_dx, floor=2**-20)
    # Which way an element of the normalised row is rounded hangs on the last bit of rstd, which was judged above.
    x_hat = (want_h.float() * rstd[:, None]).to(dtype)
    stock_dw, exact_dw = ((dy.to(wide) * x_hat.to(wide)).sum(0) for wide in (torch.float32, torch.float64))
    assert_as_good("dw", dw, stock_dw, exact_dw, floor=2**-16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("cols", [4096, 100])
def test_norm(kernels, dtype, cols, with_residual):
    check_norm(kernels, 9 if cols > 1000 else 200, cols, dtype, 0, with_residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [8193, 16384, pytest.param(20_000, marks=slow_compiled)])
def test_norm_of_rows_wider_than_the_registers(kernels, dtype, cols):
    check_norm(kernels, 9, cols, dtype, 8, True)


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_dw_is_summed_over_any_number_of_programs(kernels, programs):
    h, dy = torch.randn(500, 40), torch.randn(500, 40)  # 64 rows a turn
    rstd = (h.square().mean(-1) + 1e-5).rsqrt()
    with kernels.processors(programs):
        _, dw = kernels.rms_norm.backward(dy, None, h, torch.ones(40), rstd, True)
    torch.testing.assert_close(dw, (dy * h * rstd[:, None]).sum(0), rtol=1e-5, atol=1e-4)


# ---- swiglu ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cols", "apart"), [(4096, 0), (2051, 0), (2056, 8)])
def test_swiglu(kernels, dtype, cols, apart):
    gate, up, dy = rows_of(3, cols, dtype, 3, apart)

    def formula(gate, up, dy):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        y = torch.nn.functional.silu(gate) * up
        return y.detach(), *torch.autograd.grad(y, (gate, up), dy)

    got = (kernels.swiglu.forward(gate, up), *kernels.swiglu.backward(dy, gate, up))
    stock, exact = formula(gate, up, dy), formula(gate.double(), up.double(), dy.double())
    for name, *triple in zip(("y", "dgate", "dup"), got, stock, exact, strict=True):
        assert_as_good(name, *triple)


# ---- cross_entropy ---------------------------------------------------------------------------------------------------

PLAIN = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}


def losses(logits, labels, dloss, *, ignore_index, label_smoothing, z_loss, softcap):
    """Loss, lse and dlogits of rows, by autograd through the definition."""
    logits = logits.detach().requires_grad_()
    x = softcap * torch.tanh(logits / softcap) if softcap else logits
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    lse, trained = x.logsumexp(-1), labels != ignore_index
    of_label = x.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    loss = (1 - label_smoothing) * (lse - of_label) + label_smoothing * (lse - x.mean(-1)) + z_loss * lse.square()
    loss = torch.where(trained, loss, 0.0)
    (dlogits,) = torch.autograd.grad(loss, logits, dloss.to(loss.dtype))
    return loss.detach(), torch.where(trained, lse, 0.0).detach(), dlogits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [32_000, 101])
@pytest.mark.parametrize(
    "options",
    [PLAIN, PLAIN | {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}],
    ids=["plain", "all options"],
)
def test_cross_entropy(kernels, dtype, cols, options):
    logits, labels, dloss = (3 * torch.randn(4, cols)).to(dtype), torch.tensor([5, -100, 0, cols - 1]), torch.randn(4)
    loss, lse, log_prob, entropy, correct = kernels.cross_entropy.forward(logits, labels, True, **options)
    dlogits = kernels.cross_entropy.backward(dloss, logits, labels, lse, **options)
    stock = losses(logits, labels, dloss, **options)
    exact = losses(logits.double(), labels, dloss.double(), **options)
    for name, got, peer, want in zip(("loss", "lse", "dlogits"), (loss, lse, dlogits), stock, exact, strict=True):
        # The softcap's derivative is a difference of numbers near 1: its rounding is one of 1.
        assert_as_good(name, got, peer.to(got.dtype), want, floor=2**-20)
    x = logits.double()
    x = options["softcap"] * torch.tanh(x / options["softcap"]) if options["softcap"] else x
    distribution = torch.distributions.Categorical(logits=x)
    trained = labels != -100
    torch.testing.assert_close(entropy[trained].double(), distribution.entropy()[trained], rtol=1e-4, atol=1e-5)
    want = distribution.log_prob(labels.clamp(min=0))[trained]
    torch.testing.assert_close(log_prob[trained].double(), want, rtol=1e-5, atol=1e-5)
    assert correct[trained].equal((x.gather(-1, labels.clamp(min=0)[:, None])[:, 0] >= x.amax(-1))[trained])
    assert not any(stat[~trained].any() for stat in (log_prob, entropy, correct))


@pytest.mark.parametrize("mask", [-1e4, -1e38, torch.finfo(torch.float32).min, -float("inf")])
def test_stats_of_a_masked_vocabulary(kernels, mask):
    logits, labels = torch.full((2, 9000), mask), torch.tensor([8993, 70])
    logits[0, 8990:] = torch.randn(10)  # what its threads see first is masked, or all of it
    logits[1, 64:72] = torch.randn(8)
    _, lse, log_prob, entropy, _ = kernels.cross_entropy.forward(logits, labels, True, **PLAIN)
    for row, allowed in enumerate((slice(8990, 9000), slice(64, 72))):
        seen = logits[row, allowed].double()
        torch.testing.assert_close(lse[row].double(), seen.logsumexp(0), rtol=1e-6, atol=1e-6)
        p = seen.softmax(0)
        torch.testing.assert_close(entropy[row].double(), -(p * p.log()).sum(), rtol=1e-5, atol=1e-5)
        want = logits[row, labels[row]].double() - seen.logsumexp(0)
        torch.testing.assert_close(log_prob[row].double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("label", [-1, 101, 2**40, -(2**40)])
def test_a_label_from_nowhere_makes_its_row_nan_and_no_other(kernels, label):
    logits = torch.randn(3, 101)
    labels = torch.tensor([5, label, 7])
    options = PLAIN | {"label_smoothing": 0.1, "z_loss": 1e-3}
    dlogits = torch.full_like(logits, 7.0)
    loss, *_ = kernels.cross_entropy.forward(logits, labels, True, None, dlogits, **options)
    good = torch.nn.functional.cross_entropy(logits, torch.tensor([5, 0, 7]), label_smoothing=0.1, reduction="none")
    good = good + 1e-3 * logits.logsumexp(-1).square()
    torch.testing.assert_close(loss[[0, 2]], good[[0, 2]])
    assert loss[1].isnan()
    assert dlogits[1].isnan().all()
    assert dlogits[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_may_overwrite_the_logits(kernels, dtype):
    """What `linear_cross_entropy` does with the logits of a chunk."""
    logits, labels = torch.randn(4, 9000).to(dtype), torch.tensor([5, -100, 0, 8999])
    apart = torch.empty_like(logits)
    dloss = torch.randn(4)
    before = kernels.cross_entropy.forward(logits, labels, True, dloss, apart, **PLAIN)
    exact = losses(logits.double(), labels, dloss.double(), **PLAIN)
    assert_as_good("dlogits", apart, losses(logits, labels, dloss, **PLAIN)[2], exact[2], floor=2**-20)
    after = kernels.cross_entropy.forward(logits, labels, True, dloss, logits, **PLAIN)
    assert torch.equal(logits, apart)
    assert all(map(torch.equal, before, after))


# ---- rotary ----------------------------------------------------------------------------------------------------------


def rotated(x, cos, sin, interleaved, transposed):
    """The rotation of every pair, in the dtype of the tables."""
    half = x.shape[-1] // 2
    i = torch.arange(half)
    a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
    if cos.shape[-1] == half:
        at = torch.empty(2 * half, dtype=torch.int64)
        at[a], at[b] = i, i
        cos, sin = cos[:, at], sin[:, at]
    c, s, x, out = cos[:, None], sin[:, None], x.to(cos.dtype), torch.empty(x.shape, dtype=cos.dtype)
    if transposed:
        out[..., a] = x[..., a] * c[..., a] + x[..., b] * s[..., b]
        out[..., b] = x[..., b] * c[..., b] - x[..., a] * s[..., a]
    else:
        out[..., a] = x[..., a] * c[..., a] - x[..., b] * s[..., a]
        out[..., b] = x[..., b] * c[..., b] + x[..., a] * s[..., b]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_rotary(kernels, dtype, interleaved, transposed):
    """LLaMA's heads, queries and keys views of one projection; half a table, and a whole one."""
    projection = torch.randn(5, 12, 128).to(dtype)
    for width in (64, 128):
        cos, sin = torch.randn(5, width).to(dtype), torch.randn(5, width).to(dtype)
        heads = (projection[:, :8], projection[:, 8:])
        got = kernels.rotary.rotate(*heads, cos, sin, interleaved, dtype, transposed)
        for name, x, y in zip("qk", heads, got, strict=True):
            stock = rotated(x, cos, sin, interleaved, transposed)
            exact = rotated(x, cos.double(), sin.double(), interleaved, transposed)
            assert_as_good(name, y, stock, exact)


@pytest.mark.parametrize("head_dim", [2, pytest.param(80, marks=slow_compiled), pytest.param(256, marks=slow_compiled)])
@pytest.mark.parametrize("heads", [(1, 1), (40, 5), (3, 0), pytest.param((0, 0), marks=slow_compiled)])
@pytest.mark.parametrize("interleaved", [False, pytest.param(True, marks=slow_compiled)])
def test_any_number_of_heads(kernels, head_dim, heads, interleaved):
    q, k = (torch.randn(5, count, head_dim + 2)[..., :head_dim] for count in heads)
    cos, sin = torch.randn(5, head_dim), torch.randn(5, head_dim)
    for transposed in (False, True):
        got = kernels.rotary.rotate(q, k, cos, sin, interleaved, torch.float32, transposed)
        for x, y in zip((q, k), got, strict=True):
            want = rotated(x, cos.double(), sin.double(), interleaved, transposed)
            torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
