"""The attention kernels with the tiles that are shipped, with every option, and with boundaries that lie."""

from __future__ import annotations

import pytest
import torch

from lemur_fast.kernels import attention, common
from tests import interpreter
from tests.conftest import INTERPRETING, slow_compiled
from tests.criterion import assert_as_good
from tests.dense import bounds, dense

# Probabilities and their gradients are rounded to the dtype before they are multiplied.
FLOOR = {torch.float32: 2**-18, torch.float16: 2**-11, torch.bfloat16: 2**-9}
PLAIN = attention.Options(causal=True, window=0, softcap=0.0, scale=0.25)


def case(cu_q, cu_k, head_dim, dtype, heads=2, kv_heads=1, tail=3):
    queries, keys = int(cu_q[-1]) + tail, int(cu_k[-1]) + tail
    # Rows and heads further apart than they are long, as in a fused projection.
    q = torch.randn(queries, heads, head_dim + 8).to(dtype)[..., :head_dim]
    k, v = (torch.randn(keys, kv_heads, head_dim + 8).to(dtype)[..., :head_dim] for _ in range(2))
    return q, k, v, torch.randn(queries, heads, head_dim).to(dtype)


def check(cu_q, cu_k, options, tensors, floor):
    q, k, v, dout = tensors
    out, lse = attention.forward(q, k, v, cu_q, cu_k, options)
    got = (out, lse, *attention.backward(dout, None, q, k, v, out, lse, cu_q, cu_k, options))
    asked = {"causal": options.causal, "scale": options.scale}
    asked |= {"window": options.window or None, "softcap": options.softcap or None}

    def formula(*inputs):
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        exact, exact_lse = dense(*leaves, cu_q, cu_k, **asked)
        # The backward takes rowsum(dout * out) from the out that was rounded; see tests/csrc/test_attention.py.
        off = ((inputs[4].to(exact.dtype) - exact.detach()) * inputs[3]).sum(-1).T
        grads = torch.autograd.grad((exact, exact_lse), leaves, (inputs[3], -off.to(exact_lse.dtype)))
        return exact.detach(), exact_lse.detach(), *grads

    stock = formula(q, k, v, dout, out)
    exact = formula(*(x.double() for x in (q, k, v, dout, out)))
    for name, ours, peer, want in zip(("out", "lse", "dq", "dk", "dv"), got, stock, exact, strict=True):
        assert_as_good(name, ours, peer, want, floor=floor)


@pytest.mark.parametrize("head_dim", [pytest.param(d, marks=slow_compiled) for d in (16, 80, 96, 256)] + [64, 128])
def test_shipped_tiles(architecture, head_dim):
    """Documents shorter than a tile, longer than several, none; more keys than queries and fewer."""
    cu_q, cu_k = bounds(5, 0, 300, 30, 20), bounds(5, 7, 300, 150, 9)
    check(cu_q, cu_k, PLAIN, case(cu_q, cu_k, head_dim, torch.bfloat16), floor=FLOOR[torch.bfloat16])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        pytest.param(torch.float32, marks=slow_compiled),
        pytest.param(torch.float16, marks=slow_compiled),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(PLAIN, marks=slow_compiled),
        pytest.param(PLAIN._replace(causal=False), marks=slow_compiled),
        pytest.param(PLAIN._replace(window=1), marks=slow_compiled),
        pytest.param(PLAIN._replace(window=70), marks=slow_compiled),
        pytest.param(PLAIN._replace(window=2**31 - 1), marks=slow_compiled),
        pytest.param(PLAIN._replace(softcap=1e6), marks=slow_compiled),
        PLAIN._replace(window=200, softcap=3.0),
        pytest.param(PLAIN._replace(causal=False, softcap=3.0, scale=0.7), marks=slow_compiled),
    ],
    ids=str,
)
def test_options(machine, dtype, options):
    cu_q, cu_k = bounds(1, 200, 30, 40), bounds(1, 200, 100, 9)
    check(cu_q, cu_k, options, case(cu_q, cu_k, 32, dtype), floor=FLOOR[dtype])


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=slow_compiled), pytest.param(torch.bfloat16, marks=slow_compiled)],
)
def test_groups_and_very_many_documents(machine, dtype):
    cu = bounds(*torch.arange(130).remainder(5).tolist())
    check(cu, cu, PLAIN, case(cu, cu, 16, dtype, heads=6, kv_heads=2), floor=FLOOR[dtype])


@pytest.mark.parametrize("wrong", [[0, 50, 20, 60], [0, 20, 40, 90], [-5, 20, 40, 60], [0, 2**31 - 1, 40, 60]])
@pytest.mark.skipif(not INTERPRETING, reason="documents may overlap: only the interpreter can overlook that race")
def test_boundaries_that_lie_stay_within_the_tensors(machine, wrong, monkeypatch):
    """The interpreter faults on an access outside; results mean nothing, and documents may overlap."""
    monkeypatch.setattr(interpreter, "watch_races", False)
    cu = torch.tensor(wrong, dtype=torch.int32)
    q, k, v, dout = case(bounds(57), bounds(57), 16, torch.float32)
    out, lse = attention.forward(q, k, v, cu, cu, PLAIN)
    attention.backward(dout, None, q, k, v, out, lse, cu, cu, PLAIN)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=slow_compiled), torch.bfloat16])
def test_padding_of_boundaries_changes_nothing(machine, dtype):
    cu = bounds(30, 20)
    q, k, v, dout = case(cu, cu, 16, dtype, tail=0)
    padded = torch.cat([cu, cu[-1:].expand(5)])
    out, lse = attention.forward(q, k, v, cu, cu, PLAIN)
    same, same_lse = attention.forward(q, k, v, padded, padded, PLAIN)
    assert torch.equal(out, same)
    assert torch.equal(lse, same_lse)
    grads = attention.backward(dout, None, q, k, v, out, lse, cu, cu, PLAIN)
    again = attention.backward(dout, None, q, k, v, out, lse, padded, padded, PLAIN)
    assert all(map(torch.equal, grads, again))


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
    ],
)
def test_every_generation_has_tiles(capability, name):
    assert common._nearest(*capability) == name
    assert attention.TILES[name].keys() == attention.TILES["sm_80"].keys()
