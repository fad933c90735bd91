"""Past 2^31 elements: offsets that do not fit 32 bits.

On both devices rows lie so far apart that the last ones begin past element 2^31, in memory that a CPU only reserves. On
a GPU there are tensors, too, that are as large as that, in and out.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lemur_fast as lf
from tests.dense import bounds
from tests.gpu.conftest import EVERY, on_gpu

STRIDE = 2**24 + 8
ROWS = 132  # the last three begin past element 2^31


def far_apart(values: Tensor) -> Tensor:
    """The same values, rows far apart."""
    torch.use_deterministic_algorithms(False)  # which would fill the memory in between
    memory = torch.empty((len(values) - 1) * STRIDE + values[0].numel(), dtype=values.dtype, device=values.device)
    torch.use_deterministic_algorithms(True)
    view = memory.as_strided(values.shape, (STRIDE, *torch.empty(values.shape[1:]).stride()))
    view.copy_(values)
    assert view[-1].storage_offset() > 2**31
    return view


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape).bfloat16().to(device)


def compare(device: torch.device, function, *inputs: Tensor) -> None:
    """The same bits for rows side by side and far apart, forward and backward."""

    def run(given: list[Tensor]) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in given]
        outputs = function(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])]

    near = run([x.clone() for x in inputs])
    for index in range(len(inputs)):  # one at a time: each takes four gigabytes of a GPU
        given = [far_apart(x) if i == index else x.clone() for i, x in enumerate(inputs)]
        for a, b in zip(near, run(given), strict=True):
            assert torch.equal(a, b), f"input {index} far apart"


def test_rms_norm(backend, place):
    weight = random(64, device=place)
    x, residual = (random(ROWS, 64, device=place) for _ in range(2))
    compare(place, lambda x, residual: lf.ops.rms_norm(x, weight, residual=residual), x, residual)


def test_swiglu(backend, place):
    compare(place, lf.ops.swiglu, *(random(ROWS, 64, device=place) for _ in range(2)))


def test_rotary(backend, place):
    angles = torch.rand(ROWS, 32, device=place).repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    q, k = (random(ROWS, heads, 64, device=place) for heads in (3, 1))
    compare(place, lambda q, k: lf.ops.rotary(q, k, cos, sin), q, k)


def test_cross_entropy(backend, place):
    labels = torch.randint(0, 64, (ROWS,), device=place)
    compare(place, lambda logits: lf.ops.cross_entropy(logits, labels), random(ROWS, 64, device=place))


def test_linear_cross_entropy(backend, place):
    labels = torch.randint(0, 40, (ROWS,), device=place)
    weight = random(40, 64, device=place)
    compare(place, lambda hidden: lf.ops.linear_cross_entropy(hidden, weight, labels), random(ROWS, 64, device=place))


@pytest.mark.parametrize(
    "served", [EVERY[0], *(on_gpu(("cuda", name)) for name in ("triton", "reference"))], ids="-".join
)
def test_attention(served, backend, place):
    cu = bounds(70, 30, 32).to(place)
    q, k, v = (random(ROWS, heads, 64, device=place) for heads in (2, 1, 1))
    compare(place, lambda q, k, v: lf.ops.attention(q, k, v, cu), q, k, v)


# ---- as large as that ------------------------------------------------------------------------------------------------

REPEATED = 8192
"""Rows that are repeated until there are enough: every repetition must have the results of the first."""


def blocks_agree(large: Tensor, block: Tensor) -> None:
    """Each repetition of the rows has the bits of the block; a repetition at a time, to spare memory."""
    assert large.numel() > 2**31
    assert large.shape[0] % len(block) == 0
    for start in range(0, large.shape[0], len(block)):
        assert torch.equal(large[start : start + len(block)], block), f"rows from {start}"


def repeated(block: Tensor, width: int) -> Tensor:
    return block.repeat(2**31 // (len(block) * width) + 1, *[1] * (block.dim() - 1)).requires_grad_()


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rotary", "cross_entropy", "attention"])
def test_tensors_of_more_than_2_31_elements(gpu, name):
    """13 to 45 GB of a GPU's memory; every row is looked at."""
    needed = 48 << 30
    if torch.cuda.mem_get_info(gpu)[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory on the GPU")
    torch.use_deterministic_algorithms(False)  # filling what is allocated takes as long as the rest
    weight = random(4096, device=gpu)
    angles = torch.rand(REPEATED, 64, device=gpu).repeat(1, 2)
    labels = torch.randint(0, 32768, (REPEATED,), device=gpu)

    def run(times: int, *inputs: Tensor) -> list[Tensor]:
        if name == "rms_norm":
            out = lf.ops.rms_norm(inputs[0], weight)
        elif name == "swiglu":
            out = lf.ops.swiglu(inputs[0], inputs[0].detach())
        elif name == "rotary":
            tables = [x.repeat(times, 1) for x in (angles.cos().bfloat16(), angles.sin().bfloat16())]
            out, _ = lf.ops.rotary(inputs[0], inputs[0].detach()[:, :1], *tables)
        elif name == "attention":
            cu = torch.arange(0, inputs[0].shape[0] + 1, 512, device=gpu, dtype=torch.int32)
            out = lf.ops.attention(inputs[0], inputs[0].detach()[:, :1], inputs[0].detach()[:, :1], cu)
        else:
            out = lf.ops.cross_entropy(inputs[0], labels.repeat(times), reduction="none")
        return [out.detach(), torch.autograd.grad(out, inputs, torch.ones_like(out))[0]]

    shape = {"rotary": (REPEATED, 32, 128), "attention": (REPEATED, 32, 128), "cross_entropy": (REPEATED, 32768)}
    block = random(*shape.get(name, (REPEATED, 4096)), device=gpu)
    width = block[0].numel()
    out, gradient = run(1, block.clone().requires_grad_())
    large = repeated(block, width)
    large_out, large_gradient = run(large.shape[0] // REPEATED, large)
    if large_out.dim() > 1:
        blocks_agree(large_out, out)
    else:
        assert torch.equal(large_out, out.repeat(len(large_out) // REPEATED))
    blocks_agree(large_gradient, gradient)
