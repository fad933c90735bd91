"""How a result is judged: against the exact value, with plain torch in the same dtype as the measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def assert_as_good(name: str, ours: Tensor, stock: Tensor, exact: Tensor, floor: float = 0.0) -> None:
    """|ours - exact| <= |stock - exact| + tol, element by element.

    tol is k roundings of the element and of the tensor's root mean square (an element that is a small difference of
    large terms cannot be better than the rounding of those terms). In 16 bits k is 2: intermediates are float32 and
    only the results are rounded. In float32 k is 32: the intermediates round as coarsely as the results do, and an
    exponential turns the rounding of a log-sum-exp of 10 into ten roundings of a probability. `floor` is added to tol:
    the rounding of terms that cancel.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    assert torch.isfinite(ours[torch.isfinite(exact)]).all(), f"{name}: not finite where the exact value is"
    assert ours.dtype == stock.dtype, f"{name}: {ours.dtype}, expected {stock.dtype}"
    same = ours.double() == exact  # covers infinities
    eps = torch.finfo(ours.dtype).eps
    finite = torch.where(torch.isfinite(exact), exact, 0.0)
    k = 2 if ours.dtype.itemsize == 2 else 32
    tol = k * eps * (finite.abs() + finite.square().mean().sqrt()) + floor
    error, allowed = (ours.double() - exact).abs(), (stock.double() - exact).abs() + tol
    wrong = ~same & ~(error <= allowed)
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements off; worst error {float(error[wrong].max()):.3g}"
        f" where {float(allowed[wrong].min()):.3g} is allowed"
    )


def compare(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    stock: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    grads: Sequence[str],
    exact: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
    floor: float = 0.0,
) -> None:
    """Checks outputs and gradients of `ours` against `stock` in the same dtype and in float64 (`exact`).

    Args:
        ours: takes `inputs` by name.
        stock: plain torch, the same signature.
        inputs: tensors; float ones are widened for the exact run.
        grads: names of the inputs whose gradients are compared.
        exact: what to run in float64; `stock` by default.
        floor: see `assert_as_good`.
    """

    def run(function: Callable, widen: bool) -> tuple[list[Tensor], list[Tensor]]:
        own = {k: (v.double() if widen and v.is_floating_point() else v).detach() for k, v in inputs.items()}
        for k in grads:
            own[k].requires_grad_()
        outputs = function(**own)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
        # float16-exact seeds: the exact run must start from the very same numbers
        seeds = [s.to(torch.bfloat16) for s in seeds]
        kept = [(o, s.to(o)) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
        gradients = (
            torch.autograd.grad([o for o, _ in kept], [own[k] for k in grads], [s for _, s in kept]) if grads else []
        )
        return [o.detach() for o in outputs], list(gradients)

    ours_out, ours_grads = run(ours, False)
    stock_out, stock_grads = run(stock, False)
    exact_out, exact_grads = run(exact or stock, True)
    for i, triple in enumerate(zip(ours_out, stock_out, exact_out, strict=True)):
        assert_as_good(f"output {i}", *triple, floor)
    for name, triple in zip(grads, zip(ours_grads, stock_grads, exact_grads, strict=True), strict=True):
        assert_as_good(f"gradient of {name}", *triple, floor)


def kept_by(function: Callable[..., Any], *inputs: Tensor) -> tuple[Any, int]:
    """What a call returns, and the bytes that it keeps for backward, of storages that its inputs do not hold anyway."""
    held, kept = {x.untyped_storage().data_ptr() for x in inputs}, {}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in held:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = function(*inputs)
    return result, sum(kept.values())
