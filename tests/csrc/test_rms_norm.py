"""The RMSNorm kernels of every instruction set this CPU has, on raw memory: against float64, and bit by bit."""

import itertools

import pytest
import torch
from torch import Tensor

from lemur_fast import _compiled
from lemur_fast._compiled import dtype_code
from tests.criterion import assert_as_good
from tests.csrc.raw import DTYPES, WIDTHS, Output, strided

C = _compiled.C
DTYPE_PAIRS = list(itertools.product(DTYPES, DTYPES))


def forward(x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, ...]:
    rows, cols = x.shape
    y = Output((rows, cols), torch.promote_types(x.dtype, weight.dtype))
    h = Output((rows, cols), x.dtype)
    rstd = Output((rows,), torch.float32)
    C.cpu.rms_norm_fwd(
        x=x.data_ptr(),
        x_stride=x.stride(0),
        residual=0 if residual is None else residual.data_ptr(),
        residual_stride=0 if residual is None else residual.stride(0),
        weight=weight.data_ptr(),
        y=y.data_ptr(),
        h=0 if residual is None else h.data_ptr(),
        rstd=rstd.data_ptr(),
        rows=rows,
        cols=cols,
        eps=eps,
        x_dtype=dtype_code(x.dtype),
        w_dtype=dtype_code(weight.dtype),
    )
    return y.written(), x if residual is None else h.written(), rstd.written()


def backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, want_dw: bool = True):
    rows, cols = h.shape
    dx = Output((rows, cols), h.dtype)
    dw = Output((cols,), torch.float32)
    C.cpu.rms_norm_bwd(
        dy=dy.data_ptr(),
        dy_stride=dy.stride(0),
        dh=0 if dh is None else dh.data_ptr(),
        dh_stride=0 if dh is None else dh.stride(0),
        h=h.data_ptr(),
        h_stride=h.stride(0),
        weight=weight.data_ptr(),
        rstd=rstd.data_ptr(),
        dx=dx.data_ptr(),
        dw=dw.data_ptr() if want_dw else 0,
        rows=rows,
        cols=cols,
        x_dtype=dtype_code(h.dtype),
        w_dtype=dtype_code(weight.dtype),
    )
    return dx.written(), dw.written() if want_dw else None


def exact_gradients(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, ...]:
    """dx and dw in float64, by autograd through the definition."""
    h, weight = h.double().requires_grad_(), weight.double().requires_grad_()
    y = h * (h.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    dx, dw = torch.autograd.grad(y, (h, weight), dy.double())
    return dx if dh is None else dx + dh.double(), dw


def stock_gradients(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, ...]:
    """dx and dw as Hugging Face's module has them; dw summed in float32."""
    h, w = h.clone().requires_grad_(), weight.float().clone().requires_grad_()
    wide = h.float()
    x_hat = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(h.dtype)
    y = (w * x_hat).to(torch.promote_types(h.dtype, weight.dtype))
    dx, dw = torch.autograd.grad(y, (h, w), dy)
    return dx if dh is None else dx + dh, dw


@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_forward_rounds_as_hugging_face_does(isa, x_dtype, w_dtype, with_residual):
    generator = torch.Generator().manual_seed(0)
    for cols in WIDTHS:
        x = strided(5, cols, x_dtype, generator)
        residual = strided(5, cols, x_dtype, generator) if with_residual else None
        weight = strided(1, cols, w_dtype, generator)[0]
        y, h, rstd = forward(x, weight, residual)
        if residual is not None:
            assert torch.equal(h, x + residual)
        exact = (h.double().square().mean(-1) + 1e-5).rsqrt()
        assert ((rstd.double() - exact).abs() <= 4 * 2**-24 * exact).all()
        # From our own rstd on, every bit is determined.
        x_hat = (h.float() * rstd[:, None]).to(x_dtype)
        assert torch.equal(y, weight * x_hat)


@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("with_dh", [False, True])
def test_backward_against_float64(isa, x_dtype, w_dtype, with_dh):
    generator = torch.Generator().manual_seed(0)
    for cols in (1, 3, 17, 64, 127, 1000):
        for rows in (1, 37):
            h = strided(rows, cols, x_dtype, generator)
            weight = strided(1, cols, w_dtype, generator)[0]
            dy = strided(rows, cols, torch.promote_types(x_dtype, w_dtype), generator)
            dh = strided(rows, cols, x_dtype, generator) if with_dh else None
            rstd = (h.double().square().mean(-1) + 1e-5).rsqrt().float()
            ours = backward(dy, dh, h, weight, rstd)
            exact = exact_gradients(dy, dh, h, weight)
            stock = stock_gradients(dy, dh, h, weight)
            for name, got, peer, truth in zip(("dx", "dw"), ours, stock, exact, strict=True):
                # Where terms cancel (the gradient of a row of one element is 0), their rounding is left.
                terms = float((weight.double() * dy.double()).abs().max() * rstd.max()) if name == "dx" else 0.0
                assert_as_good(f"{name} {rows} x {cols}", got, peer, truth, floor=8 * 2**-24 * terms)
            without_dw, none = backward(dy, dh, h, weight, rstd, want_dw=False)
            assert none is None
            assert torch.equal(without_dw, ours[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(isa, dtype):
    empty, weight = torch.empty(0, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    y, h, rstd = forward(empty, weight, empty)
    assert (y.numel(), h.numel(), rstd.numel()) == (0, 0, 0)
    dx, dw = backward(empty, empty, empty, weight, rstd)
    assert dx.numel() == 0
    assert dw.tolist() == [0.0] * 8


def test_expanded_rows(isa):
    x = torch.randn(1, 50).expand(4, 50)
    y, _, _ = forward(x, torch.ones(50))
    assert x.stride(0) == 0
    assert torch.equal(y, y[:1].expand(4, 50))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_converts_and_rounds_as_in_torch(isa, dtype):
    """h = round(x + residual) over all values of x: subnormals, infinities, NaN, ties and overflow among them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    weight = torch.ones(256, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for shuffle in range(4):
        other = every[torch.randperm(2**16, generator=generator)] if shuffle else torch.zeros_like(every)
        # Close in size too, so that sums fall between two values of the dtype.
        other = torch.where(torch.arange(2**16) % 2 == 0, other, every / 3)
        x, residual = every.view(256, 256), other.view(256, 256)
        _, h, _ = forward(x, weight, residual)
        want = x + residual
        assert torch.equal(h.isnan(), want.isnan())
        assert torch.equal(h.nan_to_num(nan=0.0).view(torch.int16), want.nan_to_num(nan=0.0).view(torch.int16))


def test_a_bad_row_spoils_no_other(isa):
    x = torch.randn(3, 40)
    good, _, _ = forward(x, torch.ones(40))
    x[1, 7] = float("nan")
    y, _, _ = forward(x, torch.ones(40))
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], good[[0, 2]])


def test_the_same_bits_for_any_number_of_threads(isa, threads):
    generator = torch.Generator().manual_seed(0)
    h, dy = (torch.randn(1000, 257, generator=generator).bfloat16() for _ in range(2))
    weight = torch.randn(257, generator=generator).bfloat16()
    rstd = h.float().square().mean(-1).rsqrt()
    results = []
    for count in (1, 2, 3, 3):
        threads(count)
        assert C.cpu.threads() == count
        results.append((*forward(h, weight, dy), *backward(dy, h, h, weight, rstd)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_offsets_past_int32(isa):
    """Row strides of 2**30 elements: row 3 starts past 2**31. The memory in between is reserved and never touched."""
    memory = torch.empty(3 * 2**30 + 64, dtype=torch.float16)
    x = memory.as_strided((4, 64), (2**30, 1))
    x.copy_(torch.randn(4, 64))
    y, _, _ = forward(x, torch.ones(64, dtype=torch.float16))
    want, _, _ = forward(x.contiguous(), torch.ones(64, dtype=torch.float16))
    assert torch.equal(y, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": -1}, "rows: got -1; must be at least 0"),
        ({"cols": 0}, "cols: got 0; must be at least 1"),
        ({"x": 0}, "x: got a null pointer"),
        ({"weight": 0}, "weight: got a null pointer"),
        ({"y": 0}, "y: got a null pointer"),
        ({"residual": 8}, "h: got a null pointer"),
        ({"x_dtype": 3}, "x_dtype: got 3; takes a code of _C.DType"),
        ({"w_dtype": -1}, "w_dtype: got -1"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    x, y = torch.ones(1, 4), torch.empty(1, 4)
    arguments = {
        "x": x.data_ptr(),
        "x_stride": 4,
        "residual": 0,
        "residual_stride": 0,
        "weight": x.data_ptr(),
        "y": y.data_ptr(),
        "h": 0,
        "rstd": 0,
        "rows": 1,
        "cols": 4,
        "eps": 1e-5,
        "x_dtype": C.DType.float32,
        "w_dtype": C.DType.float32,
    }
    C.cpu.rms_norm_fwd(**arguments)
    with pytest.raises(ValueError, match=message):
        C.cpu.rms_norm_fwd(**arguments | change)
