"""Offsets past 2^31: rows so far apart that a 32-bit product of row and stride would wrap.

The memory between the rows is reserved and never touched. An address that wrapped would lie outside the tensor, which
the interpreter faults on, or hold zeros.
"""

from __future__ import annotations

import pytest
import torch

from lemur_fast.kernels import attention, cross_entropy, rms_norm, rotary, swiglu
from tests.conftest import INTERPRETING
from tests.dense import bounds, dense

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="needs the interpreter, which takes tensors where they lie")

STRIDE = 2**24 + 8
ROWS = 132  # the last three begin past element 2^31


def far_apart(values: torch.Tensor) -> torch.Tensor:
    """The same values, rows far apart."""
    torch.use_deterministic_algorithms(False)  # which would fill the memory in between
    memory = torch.empty((values.shape[0] - 1) * STRIDE + values[0].numel(), dtype=values.dtype)
    torch.use_deterministic_algorithms(True)
    inner = torch.empty(values.shape[1:]).stride()
    view = memory.as_strided(values.shape, (STRIDE, *inner))
    view.copy_(values)
    assert view[-1].storage_offset() > 2**31
    return view


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def test_rms_norm():
    x, residual, dy, dh, weight = (*(random(ROWS, 64) for _ in range(4)), random(64))
    near = rms_norm.forward(x, residual, weight, 1e-5)
    far = rms_norm.forward(far_apart(x), far_apart(residual), weight, 1e-5)
    assert all(map(torch.equal, near, far))
    _, h, rstd = near
    near = rms_norm.backward(dy, dh, h, weight, rstd, True)
    far = rms_norm.backward(far_apart(dy), far_apart(dh), far_apart(h), weight, rstd, True)
    assert all(map(torch.equal, near, far))


def test_swiglu():
    gate, up, dy = (random(ROWS, 64) for _ in range(3))
    assert torch.equal(swiglu.forward(gate, up), swiglu.forward(far_apart(gate), far_apart(up)))
    near, far = swiglu.backward(dy, gate, up), swiglu.backward(far_apart(dy), far_apart(gate), far_apart(up))
    assert all(map(torch.equal, near, far))


def test_cross_entropy():
    options = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
    logits, labels = random(ROWS, 64), torch.randint(0, 64, (ROWS,))
    apart = far_apart(logits)
    near, far = (cross_entropy.forward(x, labels, False, **options) for x in (logits, apart))
    assert all(map(torch.equal, near, far))
    dloss, lse = torch.randn(ROWS), near[1]
    near, far = (cross_entropy.backward(dloss, x, labels, lse, **options) for x in (logits, apart))
    assert torch.equal(near, far)
    cross_entropy.forward(apart, labels, False, dloss, apart, **options)  # the gradient over the logits
    assert torch.equal(apart, near)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved):
    q, k, cos, sin = random(ROWS, 2, 16), random(ROWS, 1, 16), random(ROWS, 16), random(ROWS, 16)
    near = rotary.rotate(q, k, cos, sin, interleaved, q.dtype, False)
    far = rotary.rotate(*map(far_apart, (q, k, cos, sin)), interleaved, q.dtype, False)
    assert all(map(torch.equal, near, far))


def test_attention():
    cu_seqlens = bounds(40, 40, 52)
    q, k, v, dout = random(ROWS, 2, 16), random(ROWS, 1, 16), random(ROWS, 1, 16), random(ROWS, 2, 16)
    options = attention.Options(causal=True, window=0, softcap=0.0, scale=0.25)
    near = attention.forward(q, k, v, cu_seqlens, cu_seqlens, options)
    far = attention.forward(*map(far_apart, (q, k, v)), cu_seqlens, cu_seqlens, options)
    assert all(map(torch.equal, near, far))
    want, _ = dense(q[-52:], k[-52:], v[-52:], bounds(52), bounds(52), scale=0.25)
    torch.testing.assert_close(near[0][-52:], want, rtol=0.02, atol=0.02)
    out, lse = near
    near = attention.backward(dout, None, q, k, v, out, lse, cu_seqlens, cu_seqlens, options)
    apart = [far_apart(x) for x in (dout, q, k, v, out)]
    far = attention.backward(apart[0], None, *apart[1:], lse, cu_seqlens, cu_seqlens, options)
    assert all(map(torch.equal, near, far))
