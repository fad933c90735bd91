"""The mended interpreter: bfloat16 as on a device, and faults for what would be wrong on one."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.conftest import INTERPRETING
from tests.interpreter import Fault

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="tests the interpreter: needs TRITON_INTERPRET=1")


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def dot_kernel(a, b, c, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


@triton.jit
def one_place_kernel(y, ADD: tl.constexpr):
    tl.store(y, tl.program_id(0).to(tl.float32) * ADD)


@triton.jit
def neighbour_kernel(y):
    i = tl.program_id(0)
    tl.store(y + i, tl.load(y + (i + 1) % tl.num_programs(0)))


@triton.jit
def lanes_kernel(y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i // 2, i.to(tl.float32))


@triton.jit
def sum_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(y + i, v + v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs(dtype):
    bits = torch.randint(-(2**31), 2**31, (40_000,), dtype=torch.int64).int()
    bits[:10_000] &= ~0x7FFF  # ties
    x = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, 1e-45, 3.4e38, float("inf"), float("nan")])])
    y = torch.empty(x.shape, dtype=dtype)
    copy_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    want = x.to(dtype)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y[~y.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


@pytest.mark.parametrize(
    ("dtype", "precision", "error"),
    [
        (torch.bfloat16, "ieee", 1e-5),
        (torch.float16, "ieee", 1e-5),
        (torch.float32, "ieee", 1e-5),
        (torch.float32, "tf32", 1e-2),
    ],
)
def test_products_are_of_the_values(dtype, precision, error):
    a, b, c = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype), torch.empty(32, 32)
    dot_kernel[(1,)](a, b, c, N=32, PRECISION=precision)
    off = float((c.double() - a.double() @ b.double()).abs().max())
    assert off < error
    assert (off > 1e-5) == (precision == "tf32"), "tensor cores keep 10 bits of a float32"


def test_accesses_outside_a_tensor_are_faults():
    x, y = torch.zeros(100), torch.zeros(100)
    copy_kernel[(1,)](x, y, 100, BLOCK=128)
    with pytest.raises(Fault, match="load out of bounds: 28 lanes"):
        copy_kernel[(1,)](x, torch.zeros(128), 128, BLOCK=128)
    with pytest.raises(Fault, match="store out of bounds: 28 lanes"):
        copy_kernel[(1,)](torch.zeros(128), y, 128, BLOCK=128)
    # Between two rows of a view lies memory that belongs to the tensor's storage, and past its last row none of it.
    view = torch.zeros(4, 100)[:2, :50]
    with pytest.raises(Fault, match="load out of bounds: 50 lanes"):
        copy_kernel[(1,)](view, torch.zeros(200), 200, BLOCK=256)


def test_races_between_programs_are_faults():
    with pytest.raises(Fault, match="a program stores where another one stores"):
        one_place_kernel[(2,)](torch.zeros(1), ADD=1.0)
    with pytest.raises(Fault, match="race"):
        neighbour_kernel[(3,)](torch.zeros(3))
    with pytest.raises(Fault, match="two lanes of a store"):
        lanes_kernel[(1,)](torch.zeros(8), BLOCK=16)


def test_arithmetic_on_bfloat16_is_refused():
    with pytest.raises(Fault, match="add of bfloat16"):
        sum_kernel[(1,)](torch.zeros(8).bfloat16(), torch.zeros(8).bfloat16(), BLOCK=8)
    sum_kernel[(1,)](torch.zeros(8).half(), torch.zeros(8).half(), BLOCK=8)
