"""The SwiGLU kernels of every instruction set this CPU has, on raw memory."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from lemur_fast import _compiled
from lemur_fast._compiled import dtype_code
from tests.criterion import assert_as_good
from tests.csrc.raw import DTYPES, WIDTHS, Output, strided

C = _compiled.C


def forward(gate: Tensor, up: Tensor) -> Tensor:
    y = Output(gate.shape, gate.dtype)
    C.cpu.swiglu_fwd(
        gate=gate.data_ptr(),
        gate_stride=gate.stride(0),
        up=up.data_ptr(),
        up_stride=up.stride(0),
        y=y.data_ptr(),
        rows=gate.shape[0],
        cols=gate.shape[1],
        dtype=dtype_code(gate.dtype),
    )
    return y.written()


def backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = Output(gate.shape, gate.dtype), Output(gate.shape, gate.dtype)
    C.cpu.swiglu_bwd(
        dy=dy.data_ptr(),
        dy_stride=dy.stride(0),
        gate=gate.data_ptr(),
        gate_stride=gate.stride(0),
        up=up.data_ptr(),
        up_stride=up.stride(0),
        dgate=dgate.data_ptr(),
        dup=dup.data_ptr(),
        rows=gate.shape[0],
        cols=gate.shape[1],
        dtype=dtype_code(gate.dtype),
    )
    return dgate.written(), dup.written()


def formula(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dgate and dup by autograd."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = silu(gate) * up
    return y.detach(), *torch.autograd.grad(y, (gate, up), dy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_block", [False, True])
def test_against_float64(isa, dtype, one_block):
    generator = torch.Generator().manual_seed(0)
    for cols in WIDTHS:
        gate, up, dy = (strided(5, cols, dtype, generator) for _ in range(3))
        if one_block:  # as few as 5 elements in all, and rows that begin anywhere in a vector
            gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
        ours = forward(gate, up), *backward(dy, gate, up)
        stock = formula(gate, up, dy)
        exact = formula(gate.double(), up.double(), dy.double())
        for name, triple in zip(("y", "dgate", "dup"), zip(ours, stock, exact, strict=True), strict=True):
            assert_as_good(f"{name} of {cols}", *triple)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_every_size(isa, dtype):
    """Where exp underflows or overflows, sigmoid still has a value, to within a few roundings of the result."""
    if dtype == torch.float32:
        gate = torch.cat([torch.linspace(-120, 120, 240_001), torch.tensor([-3e38, -1e30, 1e30, 3e38])])
    else:
        gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        gate = gate[gate.isfinite()]
    gate = gate[None]
    ones = torch.ones_like(gate)
    y, (dgate, dup) = forward(gate, ones), backward(ones, gate, ones)
    exact = formula(gate.double(), ones.double(), ones.double())
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # dgate has the product gate * (1 - s), in which the rounding of s stays, times gate (s is 1 beyond 17).
    left = 2**-23 * (1 + gate.double().abs().clamp(max=17))
    for name, got, want, floor in zip(
        ("y", "dgate", "dup"), (y, dgate, dup), exact, (2**-24, left, 2**-24), strict=True
    ):
        assert got.isfinite().all(), name
        error = (got.double() - want).abs()
        assert (error <= (4 if dtype == torch.float32 else 1) * eps * want.abs() + floor + tiny).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_go_where_they_go_in_torch(isa, dtype):
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([[inf, -inf, nan, 1.0, 1.0, 1.0, 0.0, 2.0]]).to(dtype)
    up = torch.tensor([[1.0, 1.0, 1.0, inf, nan, -inf, inf, 3.0]]).to(dtype)
    y, stock = forward(gate, up), silu(gate) * up
    assert torch.equal(y.isnan(), stock.isnan())
    assert torch.equal(y.isinf(), stock.isinf())
    assert torch.equal(y[:, -1], stock[:, -1])


def test_no_rows_and_expanded_rows(isa):
    empty = torch.empty(0, 7)
    assert forward(empty, empty).shape == (0, 7)
    assert [g.shape for g in backward(empty, empty, empty)] == [(0, 7)] * 2
    gate, up = torch.randn(1, 50).expand(4, 50), torch.randn(4, 50)
    assert gate.stride(0) == 0
    assert torch.equal(forward(gate, up), forward(gate.contiguous(), up))


def test_the_same_bits_for_any_number_of_threads(isa, threads):
    gate, up, dy = (torch.randn(1000, 257).bfloat16() for _ in range(3))
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append((forward(gate, up), *backward(dy, gate, up)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("name", ["gate", "up", "y"])
def test_bad_arguments_are_refused_by_name(name):
    x = torch.ones(1, 4)
    pointers = dict.fromkeys(("gate", "up", "y"), x.data_ptr())
    rest = {"gate_stride": 4, "up_stride": 4, "rows": 1, "cols": 4, "dtype": 0}
    with pytest.raises(ValueError, match=f"^{name}: got a null pointer"):
        C.cpu.swiglu_fwd(**pointers | {name: 0}, **rest)
    with pytest.raises(ValueError, match="rows: got -1; must be at least 0"):
        C.cpu.swiglu_fwd(**pointers, **rest | {"rows": -1})
    with pytest.raises(ValueError, match="dtype: got 3; takes a code"):
        C.cpu.swiglu_fwd(**pointers, **rest | {"dtype": 3})
