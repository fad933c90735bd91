"""Every op on every backend: values and gradients against float64, odd shapes, and the same bits twice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import lemur_fast as lf
from benchmarks import peers
from lemur_fast.dispatch import BackendError
from tests.dense import bounds, dense
from tests.gpu.conftest import EVERY, on_gpu, pytest_pyfunc_call

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Call:
    """An op on inputs: ours, plain torch, and which inputs get a gradient."""

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: dict[str, Tensor]
    wanted: Sequence[str]

    def on(self, device: torch.device, dtype: torch.dtype) -> Call:
        """The same there, in that dtype."""
        moved = {k: x.to(device, dtype if x.is_floating_point() else None) for k, x in self.inputs.items()}
        return Call(self.ours, self.plain, moved, self.wanted)


def rms_norm(tokens: int, width: int, residual: bool = False) -> Call:
    inputs = {"x": torch.randn(tokens, width), "weight": torch.rand(width) + 0.5}
    inputs |= {"residual": torch.randn(tokens, width)} if residual else {}
    return Call(lf.ops.rms_norm, peers.stock_rms_norm, inputs, tuple(inputs))


def rotary(tokens: int, heads: int, kv_heads: int, head_dim: int) -> Call:
    angles = torch.rand(tokens, head_dim // 2).repeat(1, 2)
    inputs = {"q": torch.randn(tokens, heads, head_dim), "k": torch.randn(tokens, kv_heads, head_dim)}

    def plain(**inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x[0].transpose(0, 1) for x in peers.stock_rotary(**inputs))

    return Call(lf.ops.rotary, plain, inputs | {"cos": angles.cos(), "sin": angles.sin()}, ("q", "k"))


def swiglu(tokens: int, width: int) -> Call:
    inputs = {"gate": 2 * torch.randn(tokens, width), "up": torch.randn(tokens, width)}
    return Call(lf.ops.swiglu, peers.stock_swiglu, inputs, ("gate", "up"))


def _labels(tokens: int, vocab: int) -> Tensor:
    labels = torch.randint(0, vocab, (tokens,))
    labels[::3] = -100  # a third is ignored, the first among them
    return labels


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # By hand, for a GPU's nll_loss has no deterministic kernel, and no trained token means a loss of 0.
    each = functional.cross_entropy(wide, labels, reduction="none")
    return each.sum() / (labels != -100).sum().clamp(min=1)


def cross_entropy(tokens: int, vocab: int) -> Call:
    inputs = {"logits": 2 * torch.randn(tokens, vocab), "labels": _labels(tokens, vocab)}
    return Call(lf.ops.cross_entropy, _loss, inputs, ("logits",))


def linear_cross_entropy(tokens: int, width: int, vocab: int) -> Call:
    weight = torch.randn(vocab, width) / width**0.5
    inputs = {"hidden": torch.randn(tokens, width), "weight": weight, "labels": _labels(tokens, vocab)}
    plain = lambda hidden, weight, labels: _loss(functional.linear(hidden, weight), labels)  # noqa: E731
    ours = functools.partial(lf.ops.linear_cross_entropy, chunk_tokens=max(1, tokens // 3))
    return Call(ours, plain, inputs, ("hidden", "weight"))


def attention(lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int, tail: int = 0, **options: Any) -> Call:
    tokens, cu = sum(lengths) + tail, bounds(*lengths)
    inputs = {"q": torch.randn(tokens, heads, head_dim)}
    inputs |= {name: torch.randn(tokens, kv_heads, head_dim) for name in "kv"}

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lf.ops.attention(q, k, v, cu.to(q.device), **options)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        here = cu.to(q.device)
        return dense(q, k, v, here, here, **options)[0]

    return Call(ours, plain, inputs, ("q", "k", "v"))


CALLS: dict[str, Callable[[], Call]] = {
    "rms_norm": lambda: rms_norm(37, 4096),
    "rms_norm, odd": lambda: rms_norm(5, 1001),
    "rms_norm, one row": lambda: rms_norm(1, 7),
    "rms_norm, wide": lambda: rms_norm(3, 20000),
    "rms_norm + residual": lambda: rms_norm(37, 4096, residual=True),
    "rms_norm + residual, odd": lambda: rms_norm(301, 67, residual=True),
    "rotary": lambda: rotary(37, 8, 8, 128),
    "rotary, grouped": lambda: rotary(131, 6, 2, 64),
    "rotary, odd": lambda: rotary(7, 3, 1, 10),
    "swiglu": lambda: swiglu(37, 11008),
    "swiglu, odd": lambda: swiglu(3, 1001),
    "cross_entropy": lambda: cross_entropy(37, 32000),
    "cross_entropy, odd": lambda: cross_entropy(5, 1013),
    "linear_cross_entropy": lambda: linear_cross_entropy(70, 256, 4000),
    "linear_cross_entropy, odd": lambda: linear_cross_entropy(13, 37, 101),
}
ATTENTION: dict[str, Callable[[], Call]] = {
    "documents": lambda: attention((70, 1, 137), 2, 2, 64),
    "grouped, wide heads": lambda: attention((130, 21), 4, 2, 128),
    "empty documents and a tail": lambda: attention((0, 65, 0, 33), 2, 1, 64, tail=29),
    "one token": lambda: attention((1,), 2, 2, 64),
    "odd heads": lambda: attention((50, 77), 3, 3, 40),
    "heads of 256": lambda: attention((90,), 2, 2, 256),
    "window": lambda: attention((100, 60), 2, 1, 64, window=33),
    "softcap": lambda: attention((80, 40), 4, 2, 64, softcap=20.0),
    "all see all": lambda: attention((80, 40), 4, 2, 64, causal=False),
}


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative error: of 16 bits, of an output that is rounded once about a quarter is used up."""


def assert_close(name: str, ours: Tensor, exact: Tensor, least: float, dtype: torch.dtype | None = None) -> None:
    """The whole tensor by its norm, and, so that a wrong row does not drown in a large tensor, four times that by row.

    `least`: of the root mean square that errors are measured by, for what should cancel to 0. `dtype`: of the inputs,
    where it is not that of the result.
    """
    assert ours.shape == exact.shape, name
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    tolerance = TOLERANCE[dtype or ours.dtype]
    wide = ours.double().reshape(max(len(exact), 1) if exact.dim() else 1, -1)
    error, exact = wide - exact.reshape(wide.shape), exact.reshape(wide.shape)
    scale = max(float(exact.square().mean().sqrt()), least)
    assert float(error.square().mean().sqrt()) <= tolerance * scale, f"{name}: {float(error.abs().max()):.3g} off"
    by_row = error.square().mean(-1).sqrt() / (exact.square().mean(-1).sqrt() + scale)
    assert float(by_row.max()) <= 4 * tolerance, f"{name}, row {int(by_row.argmax())}: {float(by_row.max()):.3g} off"


def check(call: Call, least: float = 0.0) -> None:
    """Outputs and gradients against plain torch in float64, on the same device."""

    def run(function: Callable, widen: bool) -> list[Tensor]:
        own = {k: x.double() if widen and x.is_floating_point() else x.clone() for k, x in call.inputs.items()}
        for k in call.wanted:
            own[k].requires_grad_()
        outputs = function(**own)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
        gradients = torch.autograd.grad(outputs, [own[k] for k in call.wanted], seeds)
        return [*(x.detach() for x in outputs), *gradients]

    ours, exact = run(call.ours, False), run(call.plain, True)
    names = [*(f"output {i}" for i in range(len(ours) - len(call.wanted))), *call.wanted]
    for name, a, b in zip(names, ours, exact, strict=True):
        assert_close(name, a, b, least, call.inputs[call.wanted[0]].dtype)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (299, 3)])
def test_a_wrong_element_is_seen(row, column):
    exact = torch.randn(300, 8, dtype=torch.float64)
    assert_close("right", exact.bfloat16(), exact, 0.0)
    wrong = exact.bfloat16()
    wrong[row, column] += 0.5
    with pytest.raises(AssertionError, match="off"):
        assert_close("wrong", wrong, exact, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_matches_float64(backend, place, name, dtype):
    check(CALLS[name]().on(place, dtype))


@pytest.mark.parametrize(
    ("name", "outcome"), [("cuda", BackendError), ("triton", BackendError), ("flash_attn", pytest.skip.Exception)]
)
def test_a_backend_that_every_gpu_has_may_not_refuse(name, outcome):
    """CUDA kernels that were not built are a failure; a package that is not installed is none."""
    call = pytest_pyfunc_call(SimpleNamespace(funcargs={"backend": name}))
    next(call)
    with pytest.raises(outcome, match="was not built"):
        call.throw(BackendError("it was not built"))


attention_backends = pytest.mark.parametrize(
    "served",
    [EVERY[0], *(on_gpu(("cuda", name)) for name in ("triton", "varlen", "flash_attn", "reference"))],
    ids="-".join,
)


@attention_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_matches_float64(served, backend, place, name, dtype):
    check(ATTENTION[name]().on(place, dtype), least=0.1)


def bits(call: Call) -> list[Tensor]:
    inputs = {k: x.clone().requires_grad_(k in call.wanted) for k, x in call.inputs.items()}
    outputs = call.ours(**inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    seeds = [torch.ones_like(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [inputs[k] for k in call.wanted], seeds)]


LARGER = {
    "rms_norm": lambda: rms_norm(2048, 1024),
    "rms_norm + residual": lambda: rms_norm(2048, 1024, residual=True),
    "swiglu": lambda: swiglu(512, 1408),
    "cross_entropy": lambda: cross_entropy(512, 4000),
    "linear_cross_entropy": lambda: linear_cross_entropy(512, 128, 4000),
    "attention": lambda: attention((300, 1, 200, 11), 8, 2, 64),
}


@pytest.mark.parametrize("name", LARGER)
def test_the_same_bits_twice(device, name):
    torch.use_deterministic_algorithms(False)  # as users run it; the mode also changes which backend serves
    call = LARGER[name]().on(device, torch.bfloat16)
    first = bits(call)
    for _ in range(3):
        for a, b in zip(first, bits(call), strict=True):
            assert torch.equal(a, b)
