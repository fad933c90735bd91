"""attention against a dense float64 softmax over the whole pack, and torch's attention a document at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

import lemur_fast as lf
from lemur_fast._compiled import C
from tests.criterion import assert_as_good, compare
from tests.dense import bounds, dense

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def torch_sdpa(q, k, v, cu_q, cu_k, *, causal=True, window=None, scale=None):
    """torch's own attention, a document at a time: the measure of what the dtype allows."""
    outs = [q[int(cu_q[-1]) :] * 0]
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        if b > a and d > c:
            place = torch.arange(b - a)[:, None] + (d - c) - (b - a)
            key = torch.arange(d - c)[None]
            seen = (key <= place) if causal else torch.ones(b - a, d - c, dtype=torch.bool)
            seen &= key > place - (window or 1 << 30)
            blind = ~seen.any(1)  # torch gives such a row the mean of all values
            queries, keys, values = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            out = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=seen | blind[:, None], scale=scale, enable_gqa=True
            )
            outs.insert(-1, out[0].transpose(0, 1).masked_fill(blind[:, None, None], 0.0))
        else:
            outs.insert(-1, q[a:b] * 0)
    return torch.cat(outs)


# delta = rowsum(out * dout) subtracts terms of order one, and takes out as it was rounded
FLOOR = 32 * torch.finfo(torch.float32).eps


def make(cu_q, cu_k=None, *, heads=4, kv_heads=2, dim=16, tail=0, dtype=torch.float32):
    tokens, keys = int(cu_q[-1]) + tail, int((cu_q if cu_k is None else cu_k)[-1]) + tail
    shapes = {"q": (tokens, heads, dim), "k": (keys, kv_heads, dim), "v": (keys, kv_heads, dim)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def check(cu_q, cu_k=None, *, shape=None, floor=FLOOR, **options):
    inputs = make(cu_q, cu_k, **(shape or {}))
    if inputs["q"].shape[1] > inputs["k"].shape[1]:
        # torch's CPU kernel rounds the dk of every query head before a group's are summed
        floor += 0.5 * torch.finfo(inputs["q"].dtype).eps
    both = {"cu_q": cu_q, "cu_k": cu_q if cu_k is None else cu_k} | options
    exact = lambda **t: dense(**t, **both)[0]  # noqa: E731
    compare(
        lambda **t: lf.ops.attention(**t, cu_seqlens=cu_q, cu_seqlens_k=cu_k, **options),
        exact if "softcap" in options else lambda **t: torch_sdpa(**t, **both),
        inputs,
        ["q", "k", "v"],
        exact=exact,
        floor=floor,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lengths",
    [(1,), (16,), (5, 0, 37, 16, 50), (64, 65, 1, 1, 130), (95, 96, 97, 193), (0, 0), ()],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
def test_packed_documents_match_float64(backend, dtype, causal, lengths):
    if sum(lengths):
        check(bounds(*lengths), shape={"dtype": dtype}, causal=causal)
    else:
        q = torch.randn(3, 4, 16, dtype=dtype, requires_grad=True)
        out = lf.ops.attention(q, q, q, bounds(*lengths), causal=causal)
        out.sum().backward()
        assert torch.equal(out, torch.zeros_like(q))
        assert torch.equal(q.grad, torch.zeros_like(q))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(1, 1, 16), (4, 4, 80), (6, 2, 64), (4, 1, 128), (3, 3, 5), (2, 1, 256)]
)
def test_head_layouts(backend, heads, kv_heads, dim):
    for dtype in (torch.float32, torch.bfloat16):
        check(bounds(7, 30, 1), shape={"heads": heads, "kv_heads": kv_heads, "dim": dim, "dtype": dtype})


@pytest.mark.parametrize("backend", [f"cpu-{isa}" for isa in C.cpu.isas()], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(8, 64), (7, 80), (5, 112)])
def test_large_results_have_the_bits_of_small_ones(backend, dtype, heads, dim):
    """From a mebibyte on they are written around the caches, where a row is whole lines of 64 bytes."""
    lengths, tail = (300, 400, 7, 400), 30

    def run(q, k, v, dout, *lengths):
        out = lf.ops.attention(q, k, v, bounds(*lengths))
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    q, k, v, dout = (torch.randn(sum(lengths) + tail, heads, dim).to(dtype).requires_grad_() for _ in range(4))
    assert q.nbytes >= 1 << 20
    documents = zip(*(x.split([*lengths, tail])[:-1] for x in (q, k, v, dout)), strict=True)
    alone = [run(*document, document[0].shape[0]) for document in documents]
    assert max(part[0].nbytes for part in alone) < 1 << 20
    for whole, *pieces in zip(run(q, k, v, dout, *lengths), *alone, strict=True):
        pieces.append(torch.zeros_like(whole[-tail:]))
        assert torch.equal(whole, torch.cat(pieces))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_other_numbers_of_keys_than_queries(backend, dtype, causal):
    """Bottom-right alignment; the third document has more queries than keys, the next no keys, the last no queries."""
    check(bounds(9, 20, 30, 4, 0), bounds(30, 20, 11, 0, 6), shape={"dtype": dtype}, causal=causal)


@pytest.mark.parametrize("window", [1, 3, 40, 169, 170, 1000])
def test_window(backend, window):
    for dtype in (torch.float32, torch.bfloat16):
        check(bounds(50, 1, 170, 3), shape={"dtype": dtype}, window=window)
    check(bounds(9, 20, 30), bounds(30, 20, 11), window=window)
    check(bounds(70, 5), bounds(300, 200), window=window)  # many keys that no query sees


@pytest.mark.parametrize("causal", [True, False])
def test_softcap_and_scale(backend, causal):
    check(bounds(50, 140), causal=causal, softcap=0.7, scale=0.4)
    # torch has no softcap to measure against: what rounding the output may cost delta is allowed outright
    floor = torch.finfo(torch.bfloat16).eps
    check(bounds(50, 140), shape={"dtype": torch.bfloat16}, floor=floor, causal=causal, softcap=0.7, scale=0.4)
    check(bounds(50, 140), causal=causal, scale=0.1)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive(backend, scale):
    check(bounds(50, 17), scale=scale)
    check(bounds(50, 17), scale=scale, causal=False)


def test_merging_two_rows_that_see_nothing(backend):
    """logaddexp of -inf and -inf sends NaN back; a query that sees nothing must not spread it to its neighbours."""
    inputs = [x.requires_grad_() for x in make(bounds(4), bounds(2)).values()]
    _, lse = lf.ops.attention(*inputs, bounds(4), bounds(2), return_lse=True)
    torch.logaddexp(lse, lse)[:, 2:].sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)


def test_many_short_documents(backend):
    check(bounds(*torch.randint(1, 40, (120,)).tolist()), shape={"dtype": torch.bfloat16})


def test_tail_is_zero_and_nothing_attends_to_it(backend):
    """Whatever the tail holds, here NaN: out 0, lse -inf, gradients 0, and the documents never see it."""
    cu = bounds(5, 12)
    cu = torch.cat((cu, cu[-1:].repeat(3)))  # padded with repeats of the last value
    inputs = make(cu, tail=4)
    clean = {name: x[:17].clone().requires_grad_() for name, x in inputs.items()}
    for x in inputs.values():
        x[17:] = torch.nan
        x.requires_grad_()
    out, lse = lf.ops.attention(**inputs, cu_seqlens=cu, return_lse=True)
    want, want_lse = lf.ops.attention(**clean, cu_seqlens=cu, return_lse=True)
    torch.testing.assert_close(out[:17], want)
    torch.testing.assert_close(lse[:, :17], want_lse)
    assert torch.equal(out[17:], torch.zeros(4, 4, 16))
    assert torch.equal(lse[:, 17:], torch.full((4, 4), -torch.inf))
    out[:17].square().sum().backward()
    want.square().sum().backward()
    for name, x in inputs.items():
        torch.testing.assert_close(x.grad[:17], clean[name].grad)
        assert torch.equal(x.grad[17:], torch.zeros_like(x.grad[17:]))


def test_packed_equals_one_document_at_a_time(backend):
    """torch's own attention on each document alone."""
    cu = bounds(33, 64, 5)
    inputs = {name: x.requires_grad_() for name, x in make(cu, kv_heads=4).items()}
    packed = torch.autograd.grad(lf.ops.attention(**inputs, cu_seqlens=cu).square().sum(), list(inputs.values()))
    apart = []
    for a, b in pairwise(cu.tolist()):
        q, k, v = (x[a:b].transpose(0, 1)[None] for x in inputs.values())
        apart.append(functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1))
    separate = torch.autograd.grad(torch.cat(apart).square().sum(), list(inputs.values()))
    for a, b in zip(packed, separate, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 7}, {"softcap": 1.5}], ids=str)
def test_lse_and_its_gradient(backend, options):
    """Only the lse, only the output, both: every gradient against the dense formula in float64."""
    cu_q = cu_k = bounds(5, 30, 1)
    if not options:
        cu_k = bounds(9, 21, 1)  # the first queries of the second document see nothing
    inputs = make(cu_q, cu_k)

    def pick(which, function):
        def run(**tensors):
            out, lse = function(**tensors)
            lse = torch.where(lse == -torch.inf, 0.0, lse)
            return (out, lse)[which] if which < 2 else (out, lse)

        return run

    for which in range(3):
        compare(
            pick(
                which, lambda **t: lf.ops.attention(**t, cu_seqlens=cu_q, cu_seqlens_k=cu_k, return_lse=True, **options)
            ),
            pick(which, lambda **t: dense(**t, cu_q=cu_q, cu_k=cu_k, **options)),
            inputs,
            ["q", "k"] if which == 1 else ["q", "k", "v"],
            floor=FLOOR,
        )


def test_lse_of_a_query_that_sees_nothing(backend):
    inputs = make(bounds(4), bounds(2))
    out, lse = lf.ops.attention(**inputs, cu_seqlens=bounds(4), cu_seqlens_k=bounds(2), return_lse=True)
    assert lse.shape == (4, 4)
    assert lse.dtype == torch.float32
    assert torch.equal(lse[:, :2], torch.full((4, 2), -torch.inf))
    assert torch.equal(out[:2], torch.zeros(2, 4, 16))
    assert torch.isfinite(lse[:, 2:]).all()


def test_gradcheck_in_float64():
    cu = bounds(3, 0, 5)
    inputs = [x.double().requires_grad_() for x in make(cu, dim=4).values()]
    for options in ({}, {"causal": False}, {"window": 2, "softcap": 1.0}):
        assert torch.autograd.gradcheck(
            lambda q, k, v, o=options: lf.ops.attention(q, k, v, cu, return_lse=True, **o), inputs
        )


def test_strided_inputs(backend):
    """Views of a fused qkv product, head-major storage, expanded keys, and a last dimension that is not contiguous."""
    cu = bounds(20, 11)
    qkv = torch.randn(31, 8, 16)
    cases = [
        (qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]),
        (torch.randn(4, 31, 16).transpose(0, 1), torch.randn(2, 31, 16).transpose(0, 1), torch.randn(31, 2, 16)),
        (torch.randn(31, 4, 16), torch.randn(31, 1, 16).expand(31, 4, 16), torch.randn(1, 1, 16).expand(31, 4, 16)),
        (torch.randn(31, 16, 4).mT, torch.randn(31, 16, 2).mT, torch.randn(31, 2, 32)[..., ::2]),
    ]
    for q, k, v in cases:
        compare(
            lambda **t: lf.ops.attention(**t, cu_seqlens=cu),
            lambda **t: dense(**t, cu_q=cu, cu_k=cu)[0],
            {"q": q, "k": k, "v": v},
            ["q", "k", "v"],
            floor=FLOOR,
        )
        torch.testing.assert_close(lf.ops.attention(q, k, v, cu), dense(q, k, v, cu, cu)[0])


def test_second_backward_same_tensor_and_frozen_inputs(backend):
    cu = bounds(20, 11)
    x = torch.randn(31, 4, 16, requires_grad=True)
    loss = lf.ops.attention(x, x, x, cu).square().sum()
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    loss.backward()
    assert torch.equal(first, x.grad)
    stock, exact = (x.detach().clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    for plain in (stock, exact):
        dense(plain, plain, plain, cu, cu)[0].square().sum().backward()
    assert_as_good("gradient", first, stock.grad, exact.grad)
    frozen = x.detach()
    lf.ops.attention(x, frozen, frozen, cu).sum().backward()


def test_double_backward_raises(backend):
    x = torch.randn(6, 2, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(lf.ops.attention(x, x, x, bounds(6)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_deterministic(backend):
    cu = bounds(100, 3, 64, 40)
    inputs = [x.requires_grad_() for x in make(cu, dtype=torch.bfloat16).values()]
    runs = [torch.autograd.grad(lf.ops.attention(*inputs, cu).float().square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_square_of_the_pack_is_allocated():
    """8,000 tokens of 40-token documents: a [T, T] mask alone would take 64 MB; the largest tensor here is q's size."""
    cu = bounds(*[40] * 200)
    inputs = [x.requires_grad_() for x in make(cu, heads=1, kv_heads=1, dim=16).values()]
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        lf.ops.attention(*inputs, cu).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 8 * inputs[0].nbytes


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(6, 64)}, ValueError, r"q: got shape \[6, 64\]; takes \[T, Hq, D\]"),
        ({"q": torch.zeros(6, 4, 264)}, ValueError, "q: got head dimension 264; takes 1 to 256"),
        (
            {"k": torch.zeros(6, 3, 16), "v": torch.zeros(6, 3, 16)},
            ValueError,
            "k: got 3 heads; must divide the 4 heads",
        ),
        ({"k": torch.zeros(6, 2, 8)}, ValueError, r"k: got shape \[6, 2, 8\]"),
        ({"k": torch.zeros(5, 2, 16), "v": torch.zeros(5, 2, 16)}, ValueError, "k: got 5 tokens; takes 6"),
        ({"v": torch.zeros(5, 2, 16)}, ValueError, r"v: got shape \[5, 2, 16\]"),
        ({"v": torch.zeros(6, 2, 16).half()}, ValueError, "v: got dtype torch.float16"),
        ({"q": torch.zeros(6, 4, 16).long()}, TypeError, "q: got dtype torch.int64"),
        ({"q": torch.zeros(6, 4, 16, device="meta")}, ValueError, "k: got device cpu; takes meta"),
        ({"cu_seqlens": torch.tensor([0, 6])}, TypeError, "cu_seqlens: got dtype torch.int64; takes torch.int32"),
        ({"cu_seqlens": bounds(6)[None]}, ValueError, r"cu_seqlens: got shape \[1, 2\]"),
        ({"cu_seqlens": bounds(6)[:0]}, ValueError, r"cu_seqlens: got shape \[0\]"),
        ({"cu_seqlens": bounds(7)}, ValueError, "cu_seqlens: got 7 as its last value; takes at most 6"),
        ({"cu_seqlens": torch.tensor([0, 4, 2]).int()}, ValueError, "cu_seqlens: got 2 after 4 at position 2"),
        ({"cu_seqlens": torch.tensor([1, 4]).int()}, ValueError, "cu_seqlens: got 1 at position 0; must start at 0"),
        ({"cu_seqlens_k": bounds(3, 3)}, ValueError, r"cu_seqlens_k: got shape \[3\]"),
        ({"window": 0}, ValueError, "window: got 0"),
        ({"window": 4, "causal": False}, ValueError, "window: got 4 with causal=False"),
        ({"causal": None}, TypeError, "causal: got None; takes True or False"),
        ({"window": 2.5}, TypeError, "window: got float; takes an int"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        lf.ops.attention(**(make(bounds(6)) | {"cu_seqlens": bounds(6)} | change))
