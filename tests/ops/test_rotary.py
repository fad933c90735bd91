"""rotary against Hugging Face's apply_rotary_pos_emb in the same dtype and in float64."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import lemur_fast as lf
from tests.criterion import compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 2), (7, 4, 2, 16), (33, 3, 1, 80), (130, 2, 2, 6)]


def stock(q, k, cos, sin):
    """transformers wants [batch, heads, tokens, D]."""
    q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


def stock_interleaved(q, k, cos, sin):
    """Complex multiplication by cos + i sin, as Meta's LLaMA code has it; cos and sin are [T, D/2]."""

    def rotate(x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        turn = torch.complex(cos.to(wide.dtype), sin.to(wide.dtype))[:, None]
        y = torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous()) * turn)
        return y.flatten(-2).to(torch.promote_types(x.dtype, cos.dtype))

    return rotate(q), rotate(k)


def make(shape, dtype, *, half=False):
    tokens, heads, kv_heads, dim = shape
    angle = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angle = angle if half else torch.cat((angle, angle), -1)
    q, k = torch.randn(tokens, heads, dim), torch.randn(tokens, kv_heads, dim)
    return {"q": q.to(dtype), "k": k.to(dtype), "cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(backend, dtype, shape):
    compare(lf.ops.rotary, stock, make(shape, dtype), ["q", "k"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_interleaved_matches_complex_multiplication(backend, dtype, shape):
    inputs = make(shape, dtype, half=True)

    def ours(**tensors):
        return lf.ops.rotary(**tensors, interleaved=True)

    compare(ours, stock_interleaved, inputs, ["q", "k"])
    full = {name: inputs[name].repeat_interleave(2, -1) for name in ("cos", "sin")}
    for a, b in zip(ours(**inputs), ours(**(inputs | full)), strict=True):
        assert torch.equal(a, b)


def test_half_tables_equal_full_tables(backend):
    full = make((9, 4, 2, 16), torch.bfloat16)
    half = full | {name: full[name][:, :8] for name in ("cos", "sin")}
    for a, b in zip(lf.ops.rotary(**full), lf.ops.rotary(**half), strict=True):
        assert torch.equal(a, b)


def test_tables_whose_halves_differ(backend):
    inputs = make((9, 4, 2, 16), torch.float32) | {"cos": torch.randn(9, 16), "sin": torch.randn(9, 16)}
    compare(lf.ops.rotary, stock, inputs, ["q", "k"])


def test_wider_tables_promote_as_torch(backend):
    inputs = make((9, 4, 2, 16), torch.bfloat16)
    inputs |= {name: make((9, 4, 2, 16), torch.float32)[name] for name in ("cos", "sin")}
    assert lf.ops.rotary(**inputs)[0].dtype == stock(**inputs)[0].dtype == torch.float32
    compare(lf.ops.rotary, stock, inputs, ["q", "k"])


def test_fused_qkv_view_is_read_in_place(backend):
    qkv = torch.randn(11, 8, 16)
    inputs = make((11, 4, 2, 16), torch.float32) | {"q": qkv[:, :4], "k": qkv[:, 4:6]}
    for a, b in zip(lf.ops.rotary(**inputs), stock(**inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck_in_float64():
    inputs = make((5, 2, 1, 6), torch.float64)
    q, k = inputs["q"].requires_grad_(), inputs["k"].requires_grad_()
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(
            lambda q, k, i=interleaved: lf.ops.rotary(q, k, inputs["cos"], inputs["sin"], i), (q, k)
        )


def test_zero_tokens_and_no_gradient_for_k(backend):
    q, k = lf.ops.rotary(**make((0, 4, 2, 16), torch.float32))
    assert q.shape == (0, 4, 16)
    assert k.shape == (0, 2, 16)
    inputs = make((3, 4, 2, 16), torch.float32)
    inputs["q"].requires_grad_()
    lf.ops.rotary(**inputs)[0].sum().backward()
    assert inputs["q"].grad is not None


def test_double_backward_raises(backend):
    inputs = make((3, 4, 2, 16), torch.float32)
    inputs["q"].requires_grad_()
    scale = torch.ones(
        (), requires_grad=True
    )  # the rotation is linear: only its incoming gradient can be differentiated
    (grad,) = torch.autograd.grad((lf.ops.rotary(**inputs)[0] * scale).sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(3, 4, 15)}, ValueError, "q: got head dimension 15; must be even"),
        ({"q": torch.zeros(3, 64)}, ValueError, r"q: got shape \[3, 64\]; takes \[T, Hq, D\]"),
        ({"k": torch.zeros(4, 2, 16)}, ValueError, r"k: got shape \[4, 2, 16\]"),
        ({"k": torch.zeros(3, 2, 16).half()}, ValueError, "k: got dtype torch.float16"),
        ({"cos": torch.zeros(3, 12)}, ValueError, r"cos: got shape \[3, 12\]; takes \[3, 16\] or \[3, 8\]"),
        ({"sin": torch.zeros(3, 8)}, ValueError, r"sin: got shape \[3, 8\]"),
        ({"sin": torch.zeros(3, 16).double()}, ValueError, "sin: got dtype torch.float64"),
        ({"cos": torch.zeros(3, 16, requires_grad=True)}, ValueError, "cos: got a tensor that requires a gradient"),
        ({"interleaved": "yes"}, TypeError, "interleaved: got 'yes'; takes True or False"),
        ({"q": torch.zeros(3, 4, 16).long()}, TypeError, "q: got dtype torch.int64"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        lf.ops.rotary(**(make((3, 4, 2, 16), torch.float32) | change))
