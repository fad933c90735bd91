"""The rotary kernels of every instruction set this CPU has, on raw memory."""

import itertools

import pytest
import torch
from torch import Tensor

from lemur_fast import _compiled
from lemur_fast._compiled import dtype_code
from tests.criterion import assert_as_good
from tests.csrc.raw import DTYPES, Output, strided

C = _compiled.C
HEAD_DIMS = (2, 6, 10, 16, 30, 34, 64, 66, 126, 128)


def rotate(
    xs: list[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, backward: bool, dtype: torch.dtype
) -> list[Tensor]:
    ys = [Output(x.shape, dtype) for x in xs]
    C.cpu.rotary(
        items=[(x.data_ptr(), x.stride(0), x.stride(1), y.data_ptr(), x.shape[1]) for x, y in zip(xs, ys, strict=True)],
        cos=cos.data_ptr(),
        cos_stride=cos.stride(0),
        sin=sin.data_ptr(),
        sin_stride=sin.stride(0),
        columns=cos.shape[1],
        tokens=xs[0].shape[0],
        head_dim=xs[0].shape[2],
        interleaved=interleaved,
        backward=backward,
        x_dtype=dtype_code(xs[0].dtype),
        y_dtype=dtype_code(dtype),
        table_dtype=dtype_code(cos.dtype),
    )
    return [y.written() for y in ys]


def matrices(cos: Tensor, sin: Tensor, head_dim: int, interleaved: bool) -> Tensor:
    """The rotation of every token as a matrix [T, D, D], from the definition: two entries of each pair's two rows."""
    tokens, columns = cos.shape
    result = torch.zeros(tokens, head_dim, head_dim, dtype=cos.dtype)
    for pair in range(head_dim // 2):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + head_dim // 2)
        at_a, at_b = (a, b) if columns == head_dim else (pair, pair)
        result[:, a, a], result[:, a, b] = cos[:, at_a], -sin[:, at_a]
        result[:, b, b], result[:, b, a] = cos[:, at_b], sin[:, at_b]
    return result


def apply(xs: list[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, backward: bool) -> list[Tensor]:
    matrix = matrices(cos, sin, xs[0].shape[2], interleaved)
    return [torch.einsum("thj,tij->thi" if not backward else "thi,tij->thj", x, matrix) for x in xs]


def case(head_dim: int, x_dtype: torch.dtype, table_dtype: torch.dtype, columns: int, tokens: int = 3):
    """Queries of 3 heads and keys of 1, strided and at odd addresses, and tables whose halves differ."""
    generator = torch.Generator().manual_seed(0)
    wide = strided(tokens, 3 * (head_dim + 1), x_dtype, generator)
    q = wide.as_strided((tokens, 3, head_dim), (wide.stride(0), head_dim + 1, 1), wide.storage_offset())
    k = strided(tokens, head_dim, x_dtype, generator).view(tokens, 1, head_dim)
    cos, sin = (strided(tokens, columns, table_dtype, generator) for _ in range(2))
    return [q, k], cos, sin


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("x_dtype", "table_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_against_float64(isa, interleaved, backward, x_dtype, table_dtype):
    dtype = torch.promote_types(x_dtype, table_dtype)
    for head_dim in HEAD_DIMS:
        for columns in (head_dim, head_dim // 2):
            xs, cos, sin = case(head_dim, x_dtype, table_dtype, columns)
            ours = rotate(xs, cos, sin, interleaved, backward, dtype)
            exact = apply([x.double() for x in xs], cos.double(), sin.double(), interleaved, backward)
            stock = apply([x.float() for x in xs], cos.float(), sin.float(), interleaved, backward)
            for got, peer, want in zip(ours, stock, exact, strict=True):
                assert_as_good(f"head_dim {head_dim}, {columns} columns", got, peer.to(dtype), want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_no_tokens_no_heads_and_expanded_inputs(isa, interleaved):
    tables = torch.randn(0, 8)
    assert rotate([torch.empty(0, 2, 8)], tables, tables, interleaved, False, torch.float32)[0].numel() == 0
    cos, sin = torch.randn(3, 8), torch.randn(3, 8)
    none, q = rotate([torch.empty(3, 0, 8), torch.randn(3, 1, 8)], cos, sin, interleaved, False, torch.float32)
    assert none.numel() == 0
    assert q.isfinite().all()
    x = torch.randn(1, 1, 8).expand(3, 4, 8)
    (got,) = rotate([x], cos, sin, interleaved, False, torch.float32)
    assert torch.equal(got, rotate([x.contiguous()], cos, sin, interleaved, False, torch.float32)[0])


def test_streamed_stores_write_the_same_bits(isa):
    """Outputs past 16 MiB go around the caches; here at addresses that allow it, and at others."""
    tokens, heads, head_dim = 1024, 33, 128
    x = torch.randn(tokens, heads, head_dim)
    cos, sin = torch.randn(tokens, head_dim), torch.randn(tokens, head_dim)
    at_odd_addresses = rotate([x], cos, sin, False, False, torch.float32)[0]
    aligned = torch.full((x.numel() + 16,), float("nan"))
    aligned = aligned[(-aligned.data_ptr() % 64) // 4 :][: x.numel()].view_as(x)
    C.cpu.rotary(
        items=[(x.data_ptr(), x.stride(0), x.stride(1), aligned.data_ptr(), heads)],
        cos=cos.data_ptr(),
        cos_stride=head_dim,
        sin=sin.data_ptr(),
        sin_stride=head_dim,
        columns=head_dim,
        tokens=tokens,
        head_dim=head_dim,
        interleaved=False,
        backward=False,
        x_dtype=0,
        y_dtype=0,
        table_dtype=0,
    )
    assert aligned.data_ptr() % 64 == 0
    assert torch.equal(aligned, at_odd_addresses)


def test_the_same_bits_for_any_number_of_threads(isa, threads):
    xs, cos, sin = case(64, torch.bfloat16, torch.float32, 64, tokens=1000)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(rotate(xs, cos, sin, False, False, torch.bfloat16))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 7}, "head_dim: got 7; must be even"),
        ({"head_dim": 0}, "head_dim: got 0; must be at least 2"),
        ({"columns": 3}, "columns: got 3; takes head_dim or half of it"),
        ({"tokens": -1}, "tokens: got -1"),
        ({"cos": 0}, "cos: got a null pointer"),
        ({"items": [(0, 8, 8, 8, 1)]}, "x: got a null pointer"),
        ({"items": [(8, 8, 8, 0, 1)]}, "y: got a null pointer"),
        ({"items": [(8, 8, 8, 8, -1)]}, "heads: got -1"),
        ({"table_dtype": 9}, "table_dtype: got 9"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    x = torch.ones(1, 8)
    arguments = {"items": [], "cos": x.data_ptr(), "cos_stride": 8, "sin": x.data_ptr(), "sin_stride": 8, "columns": 8}
    arguments |= {"tokens": 1, "head_dim": 8, "interleaved": False, "backward": False}
    arguments |= {"x_dtype": 0, "y_dtype": 0, "table_dtype": 0}
    C.cpu.rotary(**arguments)
    with pytest.raises(ValueError, match=message):
        C.cpu.rotary(**arguments | change)
