"""The attention kernels of every instruction set this CPU has, on raw memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lemur_fast import _compiled
from lemur_fast._compiled import dtype_code
from tests.criterion import assert_as_good
from tests.csrc.raw import DTYPES, Output, strided
from tests.dense import bounds, dense

C = _compiled.C
NAN = float("nan")


def item(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def shape(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, **options) -> dict:
    return {
        "cu_seqlens": cu_q.data_ptr(),
        "cu_seqlens_k": cu_k.data_ptr(),
        "num_documents": len(cu_q) - 1,
        "query_tokens": q.shape[0],
        "key_tokens": k.shape[0],
        "q_heads": q.shape[1],
        "kv_heads": k.shape[1],
        "head_dim": q.shape[2],
        "causal": True,
        "window": 0,
        "softcap": 0.0,
        "scale": q.shape[2] ** -0.5,
        "dtype": dtype_code(q.dtype),
    } | options


def forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, **options) -> tuple[Tensor, Tensor]:
    out, lse = Output(q.shape, q.dtype), Output((q.shape[1], q.shape[0]), torch.float32)
    C.cpu.attention_fwd(
        q=item(q), k=item(k), v=item(v), out=out.data_ptr(), lse=lse.data_ptr(), **shape(q, k, cu_q, cu_k, **options)
    )
    return out.written(), lse.written()


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q, cu_k, **options):
    dq, dk, dv = (Output(x.shape, x.dtype) for x in (q, k, v))
    C.cpu.attention_bwd(
        dout=item(dout),
        dlse=0,
        q=item(q),
        k=item(k),
        v=item(v),
        out=item(out),
        lse=lse.data_ptr(),
        dq=dq.data_ptr(),
        dk=dk.data_ptr(),
        dv=dv.data_ptr(),
        **shape(q, k, cu_q, cu_k, **options),
    )
    return dq.written(), dk.written(), dv.written()


def formula(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, cu_q: Tensor, cu_k: Tensor, **options):
    """out, lse, dq, dk and dv, in the dtype of the inputs.

    The backward takes rowsum(dout * out) from `out` as the forward rounded it. What that differs by from the exact sum
    comes down here as a gradient of lse, which is where it enters.
    """
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    exact, lse = dense(*leaves, cu_q, cu_k, **options)
    off = ((out.to(exact.dtype) - exact.detach()) * dout).sum(-1).T
    return [exact.detach(), lse.detach(), *torch.autograd.grad((exact, lse), leaves, (dout, -off.to(lse.dtype)))]


def case(head_dim: int, dtype: torch.dtype, queries: int, keys: int, heads: int = 2, kv_heads: int = 1):
    """q, k, v and dout as slices of wider memory, at odd addresses, their rows and heads further apart than long."""
    generator = torch.Generator().manual_seed(0)

    def tensor(tokens: int, heads: int) -> Tensor:
        rows = strided(tokens, heads * (head_dim + 1), dtype, generator)
        return rows.as_strided((tokens, heads, head_dim), (rows.stride(0), head_dim + 1, 1), rows.storage_offset())

    return tensor(queries, heads), tensor(keys, kv_heads), tensor(keys, kv_heads), tensor(queries, heads)


def assert_right(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, cu_q: Tensor, cu_k: Tensor, isa: str, terms: int, **options
) -> None:
    """Results and gradients, sums of so many terms, against float64.

    In gradients dP - delta cancels; and where bfloat16 is multiplied as such, P and dS, of order 1, are rounded to it
    before, independently, so that what a sum is off by grows as the root of the number of its terms.
    """
    rounded = isa in ("amx", "avx512_bf16") and q.dtype == torch.bfloat16
    floor = 2**-10 * (terms / 70) ** 0.5 if rounded else 2**-18
    out, lse = forward(q, k, v, cu_q, cu_k, **options)
    grads = backward(dout, q, k, v, out, lse, cu_q, cu_k, **options)
    stock = formula(q, k, v, dout, out, cu_q, cu_k, **options)
    exact = formula(*(x.double() for x in (q, k, v, dout, out)), cu_q, cu_k, **options)
    for name, got, peer, want in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), stock, exact, strict=True):
        assert_as_good(name, got, peer, want, floor=floor if name.startswith("d") else 2**-20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 7}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("head_dim", [1, 2, 15, 16, 17, 31, 33, 48, 64, 65, 80, 127, 128, 200, 256])
def test_against_float64(isa, dtype, options, head_dim):
    # documents of less than a block, none at all, more keys than queries, and fewer
    cu_q, cu_k = bounds(1, 63, 0, 65, 5, 20), bounds(1, 63, 3, 65, 70, 9)
    inputs = case(head_dim, dtype, int(cu_q[-1]) + 3, int(cu_k[-1]) + 2)
    assert_right(*inputs, cu_q, cu_k, isa, terms=70, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 7}, {"window": 101}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_several_blocks_against_float64(isa, dtype, options, head_dim):
    """Of 96 tokens: one more than one, one less than two and more than two, with keys that begin at any lane."""
    cu_q, cu_k = bounds(97, 191, 205, 100), bounds(97, 200, 206, 131)
    inputs = case(head_dim, dtype, int(cu_q[-1]), int(cu_k[-1]), heads=4, kv_heads=2)
    assert_right(*inputs, cu_q, cu_k, isa, terms=206, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [7, 101])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_blocks_of_keys_that_no_query_sees(isa, dtype, window, head_dim):
    """After a document that leaves its sums in their scratch memory."""
    cu_q, cu_k = bounds(291, 5), bounds(291, 290)
    q, k, v, dout = case(head_dim, dtype, 296, 581)
    out, lse = forward(q, k, v, cu_q, cu_k, window=window)
    _, dk, dv = backward(dout, q, k, v, out, lse, cu_q, cu_k, window=window)
    first_seen = 291 + 290 - 5 - window + 1
    assert not dk[291:first_seen].any()
    assert not dv[291:first_seen].any()
    assert dv[first_seen:].any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64])
def test_a_bad_document_spoils_no_other(isa, dtype, head_dim):
    """Blocks are padded with zeros, never with the neighbour's rows: 0 * NaN would be NaN.

    The bad document is the longest, so that it comes first, and leaves its NaNs in the scratch memory of the others.
    """
    cu = bounds(70, 75, 30)
    q, k, v, dout = case(head_dim, dtype, 180, 180)
    good = forward(q, k, v, cu, cu)
    good_grads = backward(dout, q, k, v, *good, cu, cu)
    for x in (q, k, v, dout):
        x[70:145] = NAN
        x[175:] = NAN  # the tail, of no document
    out, lse = forward(q, k, v, cu, cu)
    assert out[70:145].isnan().all()
    others = [*range(70), *range(145, 175)]
    assert torch.equal(out[others], good[0][others])
    assert torch.equal(lse[:, others], good[1][:, others])
    assert not out[175:].any()
    assert (lse[:, 175:] == -torch.inf).all()
    for got, want in zip(backward(dout, q, k, v, out, lse, cu, cu), good_grads, strict=True):
        assert torch.equal(got[others], want[others])
        assert got[70:145].isnan().any()
        assert not got[175:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_any_size(isa, dtype):
    """Softmax of scores in the thousands: one key takes all, and nothing overflows."""
    cu = bounds(100)
    q, k, v, dout = case(32, dtype, 100, 100)
    q, k = q * 100, k * 100
    out, lse = forward(q, k, v, cu, cu)
    want, want_lse = dense(q.double(), k.double(), v.double(), cu, cu)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2**-20, atol=0)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=0.02)
    assert all(g.isfinite().all() for g in backward(dout, q, k, v, out, lse, cu, cu))


def test_expanded_inputs(isa):
    cu = bounds(80)
    q, k, v, dout = (torch.randn(1, 1, 24).expand(80, heads, 24) for heads in (4, 2, 2, 4))
    out, lse = forward(q, k, v, cu, cu)
    same = [x.contiguous() for x in (q, k, v, dout)]
    want, want_lse = forward(*same[:3], cu, cu)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    got = backward(dout, q, k, v, out, lse, cu, cu)
    assert all(map(torch.equal, got, backward(same[3], *same[:3], want, want_lse, cu, cu)))


def test_nothing_to_do(isa):
    empty, cu = torch.empty(0, 2, 8), bounds()
    out, lse = forward(empty, empty, empty, cu, cu)
    assert (out.numel(), lse.numel()) == (0, 0)
    assert [g.numel() for g in backward(empty, empty, empty, empty, out, lse, cu, cu)] == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_any_number_of_threads(isa, threads, dtype):
    """Of few documents, and of so many that a thread takes heads together and, of short documents, early."""
    for cu in (bounds(*range(1, 60, 3)), bounds(*range(1, 60, 3), 97, *[5] * 180)):
        q, k, v, dout = case(64, dtype, int(cu[-1]), int(cu[-1]), heads=4, kv_heads=2)
        results = []
        for count in (1, 2, 3, 3):
            threads(count)
            out, lse = forward(q, k, v, cu, cu)
            results.append((out, lse, *backward(dout, q, k, v, out, lse, cu, cu)))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_torchs_own_products_are_not_disturbed(isa):
    """The tile registers' configuration belongs to a thread, and torch's bfloat16 products have theirs."""
    a, b = torch.randn(256, 256).bfloat16(), torch.randn(256, 256).bfloat16()
    before = a @ b
    cu = bounds(70, 33)
    for head_dim in (16, 33, 64, 128):
        q, k, v, dout = case(head_dim, torch.bfloat16, 103, 103, heads=4, kv_heads=4)
        out, lse = forward(q, k, v, cu, cu)
        assert torch.equal(a @ b, before)
        grads = backward(dout, q, k, v, out, lse, cu, cu)
        assert torch.equal(a @ b, before)
        assert torch.equal(forward(q, k, v, cu, cu)[0], out)
        assert all(map(torch.equal, backward(dout, q, k, v, out, lse, cu, cu), grads))


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_too_little_memory_is_an_error():
    """The scratch memory of a document is asked for by threads, from which no exception may escape."""
    code = """
import resource, torch
from lemur_fast import _C
torch.set_num_threads(2)
x, many = torch.zeros(2, 1, 256), 2**20
out, lse = torch.zeros(2, 1, 256), torch.zeros(2)
def run(keys):
    cu, cu_k = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, keys, 2 * keys], dtype=torch.int32)
    row = (x.data_ptr(), 0, 0)
    _C.cpu.attention_fwd(cu.data_ptr(), cu_k.data_ptr(), 2, row, row, row, out.data_ptr(), lse.data_ptr(), 2, 2 * keys,
                         1, 1, 256, True, 0, 0.0, 1.0, 0)
run(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
try:
    run(many)
except MemoryError:
    run(1)
    print("refused, and goes on")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "refused, and goes on", result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_documents": -1}, "num_documents: got -1"),
        ({"query_tokens": 3}, "cu_seqlens: must rise from 0 to at most 3"),
        ({"key_tokens": 3}, "cu_seqlens_k: must rise from 0 to at most 3"),
        ({"cu_seqlens": 0}, "cu_seqlens: got a null pointer"),
        ({"q_heads": 3}, "q_heads: got 3; must be a multiple of kv_heads, 2"),
        ({"kv_heads": 0}, "kv_heads: got 0"),
        ({"head_dim": 257}, "head_dim: got 257; must be at most 256"),
        ({"window": -1}, "window: got -1"),
        ({"q": (0, 1, 1)}, "q: got a null pointer"),
        ({"v": (0, 1, 1)}, "v: got a null pointer"),
        ({"out": 0}, "out: got a null pointer"),
        ({"lse": 0}, "lse: got a null pointer"),
        ({"dtype": 3}, "dtype: got 3"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    q, k, cu = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8), bounds(2, 3)
    out, lse = torch.zeros(5, 4, 8), torch.zeros(4, 5)
    arguments = shape(q, k, cu, cu) | {"q": item(q), "k": item(k), "v": item(k)}
    arguments |= {"out": out.data_ptr(), "lse": lse.data_ptr()}
    C.cpu.attention_fwd(**arguments)
    with pytest.raises(ValueError, match=message):
        C.cpu.attention_fwd(**arguments | change)
