"""How an op enters torch: one `torch.library` namespace, the same three steps for every operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("lemur_fast", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Defines the operator ``lemur_fast::<schema>``.

    Args:
        schema: name and signature; functional, so no argument is mutated and no output aliases an input. The first
            argument is a tensor, or a list of some.
        implementation: runs it on real tensors of any device.
        fake: gives the outputs' shapes, dtypes and strides for tracing.

    Returns:
        The operator, to call: looking it up in `torch.ops` takes as long as some of the checks before it.
    """
    name = schema[: schema.index("(")]

    def run(*args: Any) -> Any:
        # torch would give a result without a tangent. Whether an argument has one cannot be seen from in here.
        if forward_ad._current_level >= 0:
            raise NotImplementedError(f"lemur_fast::{name}: forward-mode AD (jvp, jacfwd) is not supported")
        # Autocast stays active inside an operator. The dtypes were settled by the public function, and the
        # reference must not have its float32 products turned into bfloat16 behind its back.
        if torch._C._is_any_autocast_enabled():  # half the time of asking for one type of device
            first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            with torch.autocast(first.device.type, enabled=False):
                return implementation(*args)
        return implementation(*args)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lemur_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.lemur_fast, name).default


def differentiable(name: str, backward: Callable, setup_context: Callable) -> None:
    """Gives the operator `name` its gradient formula."""
    torch.library.register_autograd(f"lemur_fast::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def once_differentiable(name: str) -> None:
    """Makes differentiating the backward operator `name` an error: a silent zero would train a wrong model."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"lemur_fast::{name}: double backward is not supported")

    torch.library.register_autograd(
        f"lemur_fast::{name}", backward, setup_context=lambda ctx, inputs, output: None, lib=_LIBRARY
    )
